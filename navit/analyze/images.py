"""Images for an analysis: read one at a time, packed alone, as the model sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from navit.embed.inputs import find_inputs
from navit.embed.parts import Item, read_image
from navit.model import NaViT
from navit.model.inspect import ImageStates, read_states
from packer.assemble import PlacedImage, assemble
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.pack import plan_sample
from packer.patchify import image_patches


@dataclass(frozen=True)
class View:
    """A way to show images to a model: its own, or at another resolution or patch size."""

    name: str
    """Said in pictures: "256 tokens", "patch 32"."""
    tower: NaViT
    """In evaluation mode, float32."""
    packing: PackerConfig
    """What is done to every image; no token is dropped."""

    def pack(self, item: Item) -> PackedBatch:
        """Pack one image alone.

        Raises:
            SkipSample: If the image cannot be read.
        """
        if isinstance(item.image, SkipSample):
            raise item.image
        sample, packing = read_image(item.image, item.key), self.packing
        image = plan_sample(sample, packing)
        patches = image_patches(
            sample.image,
            image.info,
            image.plan,
            decode=packing.decode,
            resample=packing.resample,
            keep_truncated=packing.keep_truncated,
        )
        placed = [[PlacedImage(image.plan, patches)]]
        return assemble(placed, seq_len=image.plan.num_kept, patch_size=packing.patch_size)

    def states(self, batch: PackedBatch) -> ImageStates:
        """Encode one image."""
        (image,) = read_states(self.tower, batch.to(next(self.tower.parameters()).device))
        return image


def make_views(
    tower: NaViT, packing: PackerConfig, budgets: Sequence[int], patch_sizes: Sequence[int]
) -> list[View]:
    """Return the model's own way to see images, and those it is compared with.

    Args:
        tower: The image tower.
        packing: Its own packing.
        budgets: Other token budgets; () takes a quarter of its own.
        patch_sizes: Other patch sizes, at which images keep their resolution: the budget becomes
            the patches of that size with as many pixels. () takes twice its own, of a flexible
            tower.

    Raises:
        ValueError: If patch sizes are asked of a tower that has but one, or one is not positive.
    """
    own, flexible = packing.image_budget, tower.config.patch_buffer is not None
    if patch_sizes and not flexible:
        raise ValueError(
            "patch_sizes needs a model with a patch_buffer, which takes patches of any size; this "
            f"one has patches of {packing.patch_size} pixels alone. Leave patch_sizes out."
        )
    if min((*budgets, *patch_sizes), default=1) < 1:
        raise ValueError(f"budgets and patch sizes must be positive; got {budgets}, {patch_sizes}.")
    views = [View(f"{own} tokens", tower, packing)]
    for budget in budgets or [max(own // 4, 1)]:
        packed = replace(packing, max_tokens=budget, seq_len=max(packing.seq_len, budget))
        views.append(View(f"{budget} tokens", tower, packed))
    for size in patch_sizes or ([2 * packing.patch_size] if flexible else []):
        budget = max(own * packing.patch_size**2 // size**2, 1)
        packed = replace(
            packing, patch_size=size, max_tokens=budget, seq_len=max(packing.seq_len, budget)
        )
        views.append(View(f"patch {size} px, {budget} tokens", tower, packed))
    unique = {view.name: view for view in reversed(views)}
    return [unique[name] for name in dict.fromkeys(view.name for view in views)]


def read_items(given: Sequence[str], most: int) -> Iterator[Item]:
    """Read at most so many images, spread evenly over the inputs where they can be counted.

    Args:
        given: As for `navit.embed.inputs.find_inputs`.
        most: Images wanted.

    Raises:
        ValueError: If an input names no image.
    """
    inputs = find_inputs(given, chunk_size=1)
    chunks = inputs.chunks
    if inputs.count is not None and len(chunks) > most:
        chosen = np.linspace(0, len(chunks) - 1, most).round().astype(int)
        chunks = tuple(chunks[index] for index in chosen)
    return islice(chain.from_iterable(chunk.read() for chunk in chunks), most)


def layer_vectors(image: ImageStates, *, class_token: bool) -> dict[str, list[Float[Tensor, " D"]]]:
    """Return vectors of an image that do not depend on its grid, by kind and layer.

    "patches": the mean of the patch tokens before the first block and after each, then the image's
    vector; "class token": the same of that token, which before the first block is the same for all
    images.

    Args:
        image: One image's tokens.
        class_token: Whether the first of the added tokens is a class token.
    """
    found = {"patches": [x[image.num_prefix :].mean(0) for x in image.states]}
    if class_token:
        found["class token"] = [x[0] for x in image.states]
    return {kind: [*layers, image.pooled] for kind, layers in found.items()}


def pixels_of(batch: PackedBatch) -> UInt8[Tensor, "height width 3"]:
    """Put the patches of a batch of one image together again: what the model sees."""
    side = batch.patch_size
    rows, cols = batch.grid_sizes[0, 0].tolist()
    patches = batch.patches[0, : rows * cols].view(rows, cols, side, side, 3)
    return patches.permute(0, 2, 1, 3, 4).reshape(rows * side, cols * side, 3)
