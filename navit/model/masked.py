"""Masked patch prediction: a tower learns to tell the colours of patches it does not see."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from navit.model.config import ModelConfig, NaViTConfig
from navit.model.corrupt import (
    COLOURS,
    Corrupted,
    Corruption,
    colour_classes,
    draw_corruption,
    key_bits,
)
from navit.model.transfer import to_device
from navit.model.vision import NaViT, PretrainedModel, TokenPlan, gather_positions
from packer.batch import PackedBatch

T = TypeVar("T", bound=ModelConfig)


@dataclass(frozen=True)
class MaskedConfig(ModelConfig):
    """The image tower and what is done to its patches."""

    vision: NaViTConfig = field(default_factory=NaViTConfig)
    """The image tower."""
    corruption: Corruption = field(default_factory=Corruption)
    """Shares of corrupted patches."""
    seed: int = 0
    """Of the corruption in training, with the number of steps."""

    def __post_init__(self) -> None:
        if self.vision.stem is not None:
            raise ValueError(
                "masked prediction replaces embeddings of patches, and a convolutional stem has "
                "seen a patch's pixels in those of its neighbours; got "
                f"stem={self.vision.stem!r}. Set it to None."
            )

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives; the parts may be mappings too."""
        made = dict(values)
        if isinstance(values.get("vision"), Mapping):
            made["vision"] = NaViTConfig.from_dict(values["vision"])
        if isinstance(values.get("corruption"), Mapping):
            made["corruption"] = Corruption.from_dict(values["corruption"])
        return super().from_dict(made)


@dataclass(frozen=True)
class MaskedOutput:
    """Predictions for the K corrupted patches of a batch of N images, sorted by images' lengths."""

    logits: Float[Tensor, "K 512"]
    """Scores of the colours, float32 or better."""
    colours: Int64[Tensor, " K"]
    """The right ones."""
    image: Int64[Tensor, " K"]
    """Which of the N images each patch is of."""
    places: Int64[Tensor, " K"]
    """Where each patch is among the B * L places of the batch."""
    num_images: int
    """N."""

    def losses(self) -> Float[Tensor, " N"]:
        """Return each image's mean cross entropy over its corrupted patches; 0 without any."""
        each = F.cross_entropy(self.logits, self.colours, reduction="none")
        nothing = each.new_zeros(self.num_images)  # bincount would wait for the device
        counts = nothing.index_add(0, self.image, torch.ones_like(each))
        return nothing.index_add(0, self.image, each) / counts.clamp(min=1)


class MaskedPredictor(PretrainedModel[MaskedConfig]):
    """An image tower that tells the mean colours of corrupted patches, 512 classes.

    Patches are corrupted after they are embedded and before positions are added, so a masked one is
    known by its place. An image's loss, and its gradients, are the same packed with any others or
    alone.

    In training a patch's fate follows from the seed, the number of steps taken (`after_step`), its
    image's key and its place: not from rank, batch or accumulation.

    The tower's pooling is not used and keeps its first weights; train it with what comes after.

    Source: ViT (arXiv:2010.11929), appendix B.1.2 "Self-supervision".
    """

    config_class = MaskedConfig

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        width = config.vision.width
        self.vision = NaViT(config.vision)
        if self.vision.pool is not None:  # DDP waits for every weight that could have a gradient
            self.vision.pool.requires_grad_(requires_grad=False)
        self.mask_embed = nn.Parameter(torch.randn(width) * width**-0.5)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(width, COLOURS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the tower, as `NaViT.compile` says."""
        self.vision.compile(*args, **options)

    def forward(self, batch: PackedBatch) -> Float[Tensor, " N"]:
        """Return the loss of each image, in the order of the batch's keys.

        In training each step has a corruption of its own; in evaluation it is always the same.
        """
        return self.predict(batch, self.step_seed() if self.training else 0).losses()

    def step_seed(self) -> Int64[Tensor, ""]:
        """Return the seed of the present step, which no other step or evaluation has."""
        return ((self.config.seed % 2**31 << 32) + 1) + self.steps

    @torch.no_grad()
    def after_step(self) -> None:
        """Draw another corruption from now on."""
        self.steps += 1

    def predict(self, batch: PackedBatch, seed: int | Int64[Tensor, ""]) -> MaskedOutput:
        """Predict the colours of the patches a seed corrupts.

        Finding them waits for the device, before the blocks are asked for.

        Raises:
            ValueError: As `NaViT.forward`.
        """
        device = batch.patches.device
        seed = seed.to(device) if isinstance(seed, Tensor) else torch.tensor(seed).to(device)
        found: list[tuple[Tensor, Tensor]] = []

        def corrupt(x: Tensor, plan: TokenPlan) -> Tensor:
            fate, image = self._fates(batch, plan, seed)
            asked = fate.asked.nonzero().squeeze(1)
            found.append((asked, image.index_select(0, asked)))
            mixed = x.index_select(0, fate.source)
            return torch.where(fate.masked[:, None], self.mask_embed.to(x.dtype), mixed)

        output = self.vision(batch, edit=corrupt)
        [(asked, image)] = found
        tokens = output.packed_tokens.index_select(0, asked)
        if self.config.vision.norm_after_pool:
            tokens = self.vision.norm(tokens)
        logits = self.head(tokens)
        return MaskedOutput(
            logits=logits.to(torch.promote_types(logits.dtype, torch.float32)),
            colours=_colours(batch, output.plan, asked),
            image=image,
            places=output.plan.token_index.index_select(0, asked),
            num_images=batch.num_images,
        )

    def _fates(
        self, batch: PackedBatch, plan: TokenPlan, seed: Int64[Tensor, ""]
    ) -> tuple[Corrupted, Int64[Tensor, " T"]]:
        """Decide the fate of the tokens; return it and which image each is of."""
        device = batch.patches.device
        lengths = np.asarray(plan.attention.lengths, dtype=np.int64)
        segment = to_device(np.repeat(np.arange(len(lengths)), lengths), device)
        # Lengths and starts are those of the sorted segments: bits and images follow them.
        order = torch.empty_like(plan.image_place)
        order[plan.image_place] = torch.arange(len(order), device=device)
        bits = to_device(key_bits(batch.keys), device)
        fate = draw_corruption(
            self.config.corruption,
            seed,
            bits[order],
            segment,
            to_device(lengths, device),
            to_device(np.cumsum(lengths) - lengths, device),
            gather_positions(batch, plan)[0],
        )
        return fate, order[segment]


def _colours(batch: PackedBatch, plan: TokenPlan, asked: Int64[Tensor, " K"]) -> Tensor:
    """Return the colour classes of the tokens asked for."""
    places = plan.token_index.index_select(0, asked)
    patches = batch.patches.flatten(0, 1).index_select(0, places)
    if batch.patch_sizes is None:
        return colour_classes(patches, batch.patch_size**2)
    sizes = np.repeat(batch.segment_patch_sizes, batch.segment_lengths)
    return colour_classes(patches, to_device(sizes, patches.device)[places] ** 2)
