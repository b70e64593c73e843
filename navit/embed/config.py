"""`EmbedConfig`: how images become vectors, and what follows from the model where nothing is said.

A model is best at the resolution and on the grids it was trained with:

    model                                   token budget          resize         decode
    a run of ours                           the run's             the run's      the run's
    SigLIP 2 (grid, "antialias")            256, or its file's    fill_budget    full
    FlexiViT ("antialias", a class token)   240 x 240 pixels      allow_enlarge  reduced
    SigLIP, CLIP, ViT (another grid)        its table's size      allow_enlarge  reduced
    any other of ours                       the table's, 256      shrink_only    reduced

SigLIP 2's are those of its own processor. The processors of SigLIP, CLIP and ViT make a square of
any image; here it keeps its aspect ratio, at as many tokens. At 256 tokens NaViT is within 0.3 % of
its full quality (arXiv:2307.06304).
"""

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch

from navit.model.config import NaViTConfig
from packer.config import DecodeMode, PackerConfig
from packer.plan.drop import NoDrop
from packer.plan.patch_size import OnePatchSize
from packer.plan.resize import Native, NoCrop, ResizePolicy

SEQ_LEN = 1024
"""Token places a sequence; more where an image's budget is larger. The model leaves padding out, so
it decides nothing but how finely a batch is filled."""

_MAX_WORKERS = 16
_FLEXIVIT_SIDE = 240  # pixels: `res` of big_vision's configs/proj/flexivit


@dataclass(frozen=True)
class EmbedConfig:
    """How images become vectors; what is None follows from the model."""

    max_tokens: int | None = None
    """Token budget of one image; None: that of the training run, of a SigLIP 2's processor, else
    the square of the model's position table (256)."""
    resize: ResizePolicy | None = None
    """Whether an image below the budget is enlarged: "shrink_only", "allow_enlarge", or
    "fill_budget" for the grids of Hugging Face's NaFlex; None: what the model was trained with."""
    decode: DecodeMode | None = None
    """"reduced" decodes large JPEGs at a fraction of their size, "full" every pixel; None: "full"
    for a SigLIP 2, whose processor does so, or what the run did."""
    normalize: bool = False
    """Whether each vector is scaled to length 1. Off, since it can be done later and not undone."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"bf16" runs matrix products in bfloat16; "auto" does so on CUDA alone: on a CPU a vector then
    does not depend, beyond 1e-5, on what is embedded beside it."""
    device: str = "auto"
    """"auto": for a model, where it is; for a checkpoint, CUDA where there is one."""
    batch_tokens: int = 16_384
    """Tokens the model is given at a time; lower it where the device's memory ends."""
    workers: int | None = None
    """Processes that read and decode; 0 does it in this one. None: for the command one a core on
    CUDA and one on a CPU, for `navit.embed_images` none."""
    keep_truncated: bool = False
    """Whether a truncated image is embedded with its missing part grey instead of failing."""
    max_pixels: int = PackerConfig.max_pixels
    """Larger images fail undecoded (checked from the header)."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "max_pixels"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer; got {value!r}.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0; got {self.workers}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16'; got {self.precision!r}.")
        if self.max_tokens is not None and self.max_tokens > self.batch_tokens:
            raise ValueError(
                f"batch_tokens must be at least max_tokens ({self.max_tokens}), else an image fits "
                f"no batch; got {self.batch_tokens}."
            )

    def packing(
        self,
        vision: NaViTConfig,
        *,
        trained: PackerConfig | None = None,
        stated_tokens: int | None = None,
    ) -> PackerConfig:
        """Say what is done to every image: whole, with every token, within the budget.

        Args:
            vision: The image tower.
            trained: The packing of the run that made the model, where it is known.
            stated_tokens: The token budget the checkpoint states for its processor.

        Raises:
            ValueError: If a setting is out of its range.
        """
        budget, resize, decode = _defaults(vision)
        if trained is not None:
            budget, resize, decode = trained.image_budget, trained.resize, trained.decode
        budget = self.max_tokens or stated_tokens or budget
        packing = PackerConfig(
            patch_size=vision.patch_size,
            seq_len=max(SEQ_LEN, budget),
            max_tokens=budget,
            resize=self.resize or resize,
            decode=self.decode or decode,
            resample="bilinear" if _is_naflex(vision) else "bicubic",
            max_pixels=self.max_pixels,
            keep_truncated=self.keep_truncated,
        )
        if trained is None:
            return packing
        # Whatever else the run did to its images, such as the kernel they were resized with.
        return replace(
            trained,
            resolution=Native(),
            crop=NoCrop(),
            token_drop=NoDrop(),
            patch_sizes=OnePatchSize(),
            fill_leftover=False,
            max_images_per_seq=None,
            max_aspect_ratio=None,
            patch_size=packing.patch_size,
            seq_len=packing.seq_len,
            max_tokens=packing.max_tokens,
            resize=packing.resize,
            decode=packing.decode,
            max_pixels=packing.max_pixels,
            keep_truncated=packing.keep_truncated,
        )

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the type of the matrix products; None leaves them in the weights' own."""
        if self.precision == "auto":
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
            return torch.bfloat16 if fast else None
        return torch.bfloat16 if self.precision == "bf16" else None

    def command_workers(self, device: torch.device) -> int:
        """Return the number of processes the command reads with."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return min(cores, _MAX_WORKERS) if device.type == "cuda" else min(cores - 1, 1)


def _defaults(vision: NaViTConfig) -> tuple[int, ResizePolicy, DecodeMode]:
    """Return budget, resize and decode for a model whose run is not known."""
    budget = vision.pos_table_size**2
    if vision.pos_embed != "grid":
        return budget, "shrink_only", "reduced"
    if _is_flexivit(vision):  # its table is not the grid of any size it was trained at
        return max(_FLEXIVIT_SIDE // vision.patch_size, 1) ** 2, "allow_enlarge", "reduced"
    if _is_naflex(vision):
        return budget, "fill_budget", "full"
    return budget, "allow_enlarge", "reduced"


def _is_naflex(vision: NaViTConfig) -> bool:
    """Whether positions are read as SigLIP 2 reads them, whose processor is then matched."""
    return _antialiased(vision) and not _is_flexivit(vision)


def _is_flexivit(vision: NaViTConfig) -> bool:
    """Whether they are read so in a flexible tower with a class token; SigLIP has none."""
    return _antialiased(vision) and vision.pool == "cls" and vision.patch_buffer is not None


def _antialiased(vision: NaViTConfig) -> bool:
    return vision.pos_embed == "grid" and vision.pos_interpolation == "antialias"
