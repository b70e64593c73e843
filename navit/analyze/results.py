"""What an analysis finds, gathered image by image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from navit.analyze.cka import MIN_IMAGES, MinibatchCka
from navit.analyze.distance import attention_distance, uniform_distance
from navit.analyze.images import View, layer_vectors, pixels_of
from navit.analyze.rollout import attention_rollout
from navit.embed.parts import Item
from navit.model.inspect import ImageStates
from packer.errors import SkipSample

CKA_BATCH = 32
"""Images a batch of CKA; of so many the vectors of all layers are held."""


@dataclass(frozen=True)
class Rollout:
    """Attention rollout of one image."""

    key: str
    """What the image is called."""
    pixels: UInt8[Tensor, "height width 3"]
    """The image as the model sees it."""
    shares: Float[Tensor, "rows cols"]
    """Share of the image's vector by patch; with those of added tokens they sum to 1."""
    on_added: float
    """Share of class token and registers."""


@dataclass
class Distances:
    """Attention distance by layer and head, one entry an image."""

    pixels: list[Tensor] = field(default_factory=list)
    """Mean distance in pixels of the resized image: (depth, H)."""
    diagonals: list[Tensor] = field(default_factory=list)
    """The same as a share of the image's diagonal."""
    on_added: list[Tensor] = field(default_factory=list)
    """Share of attention on added tokens."""
    uniform: list[tuple[float, float]] = field(default_factory=list)
    """What uniform attention would give: pixels, share of the diagonal."""

    def add(self, view: View, image: ImageStates) -> None:
        """Count an image."""
        side = view.packing.patch_size
        diagonal = side * (image.grid[0] ** 2 + image.grid[1] ** 2) ** 0.5
        found = attention_distance(view.tower, image)
        uniform = uniform_distance(image.positions) * side
        self.pixels.append(found.patches * side)
        self.diagonals.append(found.patches * side / diagonal)
        self.on_added.append(found.on_added)
        self.uniform.append((uniform, uniform / diagonal))

    def describe(self) -> dict[str, Any]:
        """Return the means over the images, JSON-ready."""
        pixels, diagonals = zip(*self.uniform, strict=True)
        return {
            "images": len(self.pixels),
            "pixels": torch.stack(self.pixels).mean(0).tolist(),
            "share_of_diagonal": torch.stack(self.diagonals).mean(0).tolist(),
            "attention_on_added_tokens": torch.stack(self.on_added).mean(0).tolist(),
            "uniform_pixels": sum(pixels) / len(pixels),
            "uniform_share_of_diagonal": sum(diagonals) / len(diagonals),
        }


@dataclass
class Alignment:
    """CKA of the first view with each view, by kind of vector."""

    views: Sequence[View]
    """The views; the first is the model's own."""
    pairs: dict[str, list[MinibatchCka]] = field(default_factory=dict)
    """One a view, by kind of vector."""
    _waiting: list[list[dict[str, list[Tensor]]]] = field(default_factory=list)

    def add(self, seen: Sequence[ImageStates]) -> None:
        """Count an image, given in each view."""
        named = self.views[0].tower.config.pool == "cls"
        self._waiting.append([layer_vectors(image, class_token=named) for image in seen])
        # So that what is left at the end is never too little for a batch of its own.
        if len(self._waiting) == CKA_BATCH + MIN_IMAGES:
            self._count(CKA_BATCH)

    def finish(self) -> None:
        """Count the images that still wait."""
        if len(self._waiting) >= MIN_IMAGES:
            self._count(len(self._waiting))

    def _count(self, number: int) -> None:
        batch, self._waiting = self._waiting[:number], self._waiting[number:]
        for kind in batch[0][0]:
            layers = [
                [torch.stack(x) for x in zip(*(image[v][kind] for image in batch), strict=True)]
                for v in range(len(self.views))
            ]
            pairs = self.pairs.setdefault(kind, [MinibatchCka() for _ in self.views])
            for pair, other in zip(pairs, layers, strict=True):
                pair.add(layers[0], other)

    @property
    def images(self) -> int:
        """Images counted."""
        return next((pairs[0].images for pairs in self.pairs.values()), 0)

    def results(self) -> Iterator[tuple[str, str, Float[Tensor, "A B"]]]:
        """Yield kind of vector, name of the other view, and CKA by layers."""
        for kind, pairs in self.pairs.items():
            for view, pair in zip(self.views, pairs, strict=True):
                yield kind, view.name, pair.result()


@dataclass
class Findings:
    """All that images tell of a model."""

    distances: Distances = field(default_factory=Distances)
    """Attention distance in the model's own view."""
    rollouts: list[Rollout] = field(default_factory=list)
    """Of the first images."""
    alignment: Alignment | None = None
    """CKA; None where no image was read."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Key and cause of each image that could not be read."""


def look_at(items: Iterator[Item], views: Sequence[View], *, rollouts: int) -> Findings:
    """Show images to a model one by one, in each view.

    Held at a time: one image's tokens between the blocks (depth + 1 tensors of (n, D)), the
    weights of some queries of one block, the layers' mean vectors of up to 36 images, and the
    pictures of ``rollouts`` images.

    Args:
        items: The images.
        views: The model's own view, then those it is compared with.
        rollouts: Images whose attention rollout is kept.
    """
    found, own = Findings(alignment=Alignment(views)), views[0]
    assert found.alignment is not None
    for item in items:
        try:
            batches = [view.pack(item) for view in views]
        except SkipSample as error:
            found.failures.append((item.key, error.cause))
            continue
        image = own.states(batches[0])
        found.distances.add(own, image)
        if len(found.rollouts) < rollouts:
            shares = attention_rollout(own.tower, image)
            on_patches = shares[image.num_prefix :].view(image.grid)
            on_added = float(shares[: image.num_prefix].sum())
            found.rollouts.append(Rollout(item.key, pixels_of(batches[0]), on_patches, on_added))
        others = [v.states(b) for v, b in zip(views[1:], batches[1:], strict=True)]
        found.alignment.add([image, *others])
    found.alignment.finish()
    return found
