"""Keyed augmentations: each is called as ``transform(uint8 (H, W, 3), generator)``.

The generator is seeded from the sample's key, so an image is augmented the same way on any number
of workers and ranks. Shape and dtype stay. Cropping is part of the plan (`PackerConfig.crop`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Generator, Tensor

# Rec. 601 luma, as Pillow and torchvision turn colour into grey.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror the image left to right with probability ``p``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"RandomFlip: p must be in [0, 1]; got {self.p}. It is a probability.")

    def __call__(
        self, pixels: UInt8[Tensor, "H W 3"], generator: Generator
    ) -> UInt8[Tensor, "H W 3"]:
        """Return the image, mirrored or not."""
        mirrored = torch.rand((), generator=generator).item() < self.p
        return pixels.flip(1) if mirrored else pixels


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast and saturation by random factors from [1 - x, 1 + x].

    Brightness scales the image, contrast blends it with its mean grey, saturation with its own
    grey, in this order. The three are one affine map of the colour, so the image is read once and
    clipped once, at the end.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"ColorJitter: {name} must be in [0, 1]; got {getattr(self, name)}. "
                    "0 leaves it alone; x draws the factor from [1 - x, 1 + x]."
                )

    def __call__(
        self, pixels: UInt8[Tensor, "H W 3"], generator: Generator
    ) -> UInt8[Tensor, "H W 3"]:
        """Return the image with changed colours."""
        spread = torch.tensor([self.brightness, self.contrast, self.saturation])
        draws = torch.rand(3, generator=generator) * 2 - 1
        brightness, contrast, saturation = (1 + spread * draws).tolist()
        luma = torch.tensor(_LUMA)
        # The sum is of integers: the same for any number of threads.
        mean = pixels.sum((0, 1), dtype=torch.int64).float() / (pixels.numel() // 3)
        mean_grey = brightness * float(mean @ luma)
        to_grey = luma.expand(3, 3)
        matrix = (brightness * contrast) * torch.lerp(to_grey, torch.eye(3), saturation)
        offset = torch.full((3,), (1 - contrast) * mean_grey + 0.5)  # 0.5: the cast rounds down
        changed = torch.addmm(offset, pixels.reshape(-1, 3).float(), matrix.T)
        return changed.clamp_(0, 255).to(torch.uint8).view(pixels.shape)


@dataclass(frozen=True)
class Compose:
    """Apply several transforms, one after the other, drawing from one generator."""

    transforms: Sequence[Callable[[Tensor, Generator], Tensor]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def __call__(
        self, pixels: UInt8[Tensor, "H W 3"], generator: Generator
    ) -> UInt8[Tensor, "H W 3"]:
        """Return the image after the last transform."""
        for transform in self.transforms:
            pixels = transform(pixels, generator)
        return pixels
