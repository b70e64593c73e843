"""Convolutions of a stem: weight-standardised, each followed by a norm of its image alone.

Everything here takes a list of maps, one for each size of image, so that filters are standardised
once a batch and not once a size: with 26 sizes that took three quarters of the time.

Source: the code of ViT (arXiv:2010.11929), whose hybrid starts with the ResNet of BiT
(arXiv:1912.11370, section 3.1: "Group Normalization and Weight Standardization").
"""

from math import gcd

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from navit.model.attention import compute_dtype
from navit.model.config import PerChannel

Maps = list[Float[Tensor, "_ _ _ _"]]
"""(images, channels, height, width) for each size of image."""


class StdConv(nn.Module):
    """A convolution by filters of mean 0 and variance 1 (arXiv:1903.10520), and a group norm.

    Zeros are put around the map as TensorFlow's "SAME" does where the stride divides the sides: the
    odd one right and below. The authors' weights then mean what they mean there.

    Args:
        fan_in: Channels of the map.
        channels: Channels of the result.
        side: Side of a filter.
        stride: Places between two filters' places.
    """

    def __init__(self, fan_in: int, channels: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        shape = (channels, fan_in, side, side)
        self.weight = nn.Parameter(torch.randn(shape) * (fan_in * side**2) ** -0.5)
        self.norm = make_group_norm(channels)

    def forward(self, maps: Maps) -> Maps:
        """Convolve maps whose sides the stride divides."""
        side, filters = self.weight.shape[-1], self.filters()
        return [
            self.norm(F.conv2d(padded(x, side, self.stride), filters, stride=self.stride))
            for x in maps
        ]

    def filters(self) -> Float[Tensor, "K C s s"]:
        """Return the standardised filters, computed in float32 at least."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return ((weight - mean) / (deviation + 1e-5)).to(self.weight.dtype)


class RootConv(StdConv):
    """The first convolution: it takes pixels and normalises them by channel.

    The mean is taken from the pixels, exact in bfloat16 where it is 0.5, as in
    `navit.model.patch_embed.PatchEmbed`; the deviation divides the filters. The zeros around an
    image are then pixels of the mean.

    Args:
        channels: Channels of the result.
        side: Side of a filter.
        mean: Mean of red, green and blue in [0, 1].
        std: Their standard deviation.
    """

    def __init__(self, channels: int, side: int, mean: PerChannel, std: PerChannel) -> None:
        super().__init__(3, channels, side, stride=2)
        self.mean, self.std = mean, std

    def forward(self, maps: list[UInt8[Tensor, "_ 3 _ _"]]) -> Maps:
        """Convolve images."""
        return super().forward([self._centred(images) for images in maps])

    def _centred(self, images: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        centred = images.to(compute_dtype(images.device, self.weight.dtype))
        for channel, mean in enumerate(self.mean):
            centred[:, channel].sub_(255 * mean)
        return centred

    def filters(self) -> Float[Tensor, "K 3 s s"]:
        """Return the standardised filters over 255 deviations."""
        parts = zip(super().filters().unbind(1), self.std, strict=True)
        return torch.stack([part * (1 / (255 * std)) for part, std in parts], dim=1)


class Bottleneck(nn.Module):
    """A residual unit: 1 x 1, 3 x 3 and 1 x 1 convolutions, the last to 4 times the channels.

    It starts as its shortcut alone: the last norm's scale starts at 0.

    Args:
        fan_in: Channels of the map.
        channels: Channels between the convolutions.
        stride: Of the 3 x 3 convolution and the shortcut.
    """

    def __init__(self, fan_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv1 = StdConv(fan_in, channels, 1)
        self.conv2 = StdConv(channels, channels, 3, stride)
        self.conv3 = StdConv(channels, wide, 1)
        self.shortcut: StdConv | None = None
        if fan_in != wide or stride != 1:
            self.shortcut = StdConv(fan_in, wide, 1, stride)
        nn.init.zeros_(self.conv3.norm.weight)

    def forward(self, maps: Maps) -> Maps:
        """Transform maps."""
        inner = [F.relu(x) for x in self.conv1(maps)]
        inner = [F.relu(x) for x in self.conv2(inner)]
        outer = maps if self.shortcut is None else self.shortcut(maps)
        return [F.relu(x + y) for x, y in zip(outer, self.conv3(inner), strict=True)]


class Relu(nn.Module):
    """Set what is negative to 0."""

    def forward(self, maps: Maps) -> Maps:
        """Transform maps."""
        return [F.relu(x) for x in maps]


class MaxPool(nn.Module):
    """The largest of 3 x 3 values, at every other place."""

    def forward(self, maps: Maps) -> Maps:
        """Pool maps of values that are not negative, for which zeros around them are nothing."""
        return [F.max_pool2d(padded(x, 3, 2), 3, 2) for x in maps]


def padded(x: Float[Tensor, "N C H W"], side: int, stride: int) -> Float[Tensor, "N C _ _"]:
    """Put the zeros of "SAME" around maps whose sides the stride divides."""
    total = max(side - stride, 0)
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after)) if total else x


def make_group_norm(channels: int) -> nn.GroupNorm:
    """Return ViT's group norm of 32 groups, or of as many below that as the channels allow.

    A group has at least two channels: of the one place a small image's last map may have, a single
    channel would be normalised to nothing.
    """
    groups = gcd(32, channels)
    return nn.GroupNorm(groups if groups < channels else max(groups // 2, 1), channels, eps=1e-6)
