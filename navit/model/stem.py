"""A convolutional stem: pixels of whole images -> tokens, in packed form.

A batch holds patches. An image is put together again from its patches, and images of one grid run
through the convolutions as one dense batch:

    tokens of the batch        by grid                    one dense batch each
    1 1 1 1 2 2 3 3 3 3        2 x 2: 1 1 1 1 3 3 3 3     (2, 3, 2 p, 2 p)
                               1 x 2: 2 2                 (1, 3, p, 2 p)

Norms are per image (GroupNorm) and zeros stand around each image, not around a sequence, so an
image gives the tokens it gives alone. Where every image of a batch has a grid of its own, every
convolution runs once an image: on a CPU that costs nothing, on a GPU small kernels follow each
other. `stem_flops` says what a stem adds to a tower.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navit.model.config import NaViTConfig
from navit.model.conv import Bottleneck, MaxPool, Relu, RootConv, StdConv
from navit.model.transfer import to_device
from packer.batch import PackedBatch


@dataclass(frozen=True)
class GridGroups:
    """The T tokens of a batch by the grid of their image."""

    grids: tuple[tuple[int, int], ...]
    """(rows, cols), no two alike."""
    counts: tuple[int, ...]
    """Images of each grid."""
    members: Int64[Tensor, " T"]
    """Which token comes next where the grids stand one after another."""
    place: Int64[Tensor, " T"]
    """Where each token is among them."""


def group_grids(grids: Sequence[tuple[int, int]], device: torch.device) -> GridGroups:
    """Group the tokens of whole images by grid, on the host.

    Args:
        grids: (rows, cols) of each image, in the plan's order.
        device: Where the tokens are.
    """
    sides = np.asarray(grids, dtype=np.int64).reshape(-1, 2)
    found, group = np.unique(sides, axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    lengths = sides.prod(axis=1)
    starts = np.cumsum(lengths) - lengths
    ordered = lengths[order]
    shift = starts[order] - (np.cumsum(ordered) - ordered)
    members = np.repeat(shift, ordered) + np.arange(int(ordered.sum()))
    return GridGroups(
        grids=tuple((int(rows), int(cols)) for rows, cols in found),
        counts=tuple(np.bincount(group.reshape(-1), minlength=len(found)).tolist()),
        members=to_device(members, device),
        place=to_device(np.argsort(members), device),
    )


class ConvStem(nn.Module):
    """Turn whole images into tokens by convolutions and a projection.

    "resnet" is the root and the first stages of a ResNet with bottleneck units, GroupNorm and
    weight standardisation (BiT, arXiv:1912.11370): the hybrid of ViT (arXiv:2010.11929), section
    3.1 "Hybrid Architecture", appendix B. "convs" is the stem of "Early Convolutions Help
    Transformers See Better" (arXiv:2106.14881): 3 x 3 convolutions, of which the first of each
    stage halves the map and doubles the channels. Its batch norm, which would mix the images of a
    batch, is GroupNorm with standardised filters here. Both end with a projection of the last map
    with the stride that is left to a patch, 1 x 1 in the papers.

    Args:
        config: Names kind, width and stages.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.patch_size, self.checkpointing = config.patch_size, config.checkpointing
        make = _resnet if config.stem == "resnet" else _convs
        self.features, channels = make(config)
        side = config.patch_size // config.stem_stride
        bias = config.biases if config.patch_bias is None else config.patch_bias
        self.proj = nn.Conv2d(channels, config.width, side, stride=side, bias=bias)
        nn.init.normal_(self.proj.weight, std=(channels * side**2) ** -0.5)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(
        self, batch: PackedBatch, token_index: Int64[Tensor, " T"], groups: GridGroups | None
    ) -> Float[Tensor, "T D"]:
        """Embed the images of a batch.

        Args:
            batch: The packed images, each with all its tokens in the order of its rows.
            token_index: Place of each token among the B * L flattened places.
            groups: The tokens by grid; None where there is no image.
        """
        if groups is None:  # connected to every parameter, so that backward gives zeros
            blank = batch.patches.new_zeros(1, 3, self.patch_size, self.patch_size)
            return self._embed([blank])[0][:0]
        places = token_index.index_select(0, groups.members)
        patches = batch.patches.flatten(0, 1).index_select(0, places)
        sizes = [n * r * c for n, (r, c) in zip(groups.counts, groups.grids, strict=True)]
        images = [
            join_patches(part, grid, self.patch_size)
            for part, grid in zip(patches.split_with_sizes(sizes), groups.grids, strict=True)
        ]
        return torch.cat(self._embed(images)).index_select(0, groups.place)

    def _embed(self, maps: list[Tensor]) -> list[Float[Tensor, "_ D"]]:
        """Embed images, a batch for each size, token by token."""
        for unit in self.features:
            if self.checkpointing and torch.is_grad_enabled():
                maps = checkpoint(unit, maps, use_reentrant=False)
            else:
                maps = unit(maps)
        return [self.proj(x).permute(0, 2, 3, 1).flatten(0, 2) for x in maps]

    def check_patches(self, batch: PackedBatch) -> None:
        """Refuse what the stem cannot see whole.

        Raises:
            ValueError: If a patch of the batch has not the model's size, or an image lacks tokens.
        """
        if batch.patch_sizes is not None or batch.patch_size != self.patch_size:
            found = sorted(set(batch.segment_patch_sizes) - {0}) or [batch.patch_size]
            raise ValueError(
                f"All patches of a batch must have the size the stem was made for "
                f"({self.patch_size}); got {found}. Set PackerConfig(patch_size={self.patch_size})."
            )
        segments = zip(
            batch.segment_lengths, batch.segment_grids, batch.segment_images, strict=True
        )
        for length, (rows, cols), image in segments:
            if image >= 0 and length != rows * cols:
                raise ValueError(
                    "A convolutional stem needs every image whole, since its convolutions look "
                    f"beyond a patch; got {batch.keys[image]!r} with {length} of its "
                    f"{rows * cols} tokens. Set PackerConfig(token_drop=NoDrop()), or stem=None."
                )


def join_patches(
    patches: UInt8[Tensor, "n P"], grid: tuple[int, int], patch_size: int
) -> UInt8[Tensor, "N 3 H W"]:
    """Put images of one grid together from their patches, channels last in memory."""
    cells = patches.view(-1, *grid, patch_size, patch_size, 3).transpose(2, 3)
    rows, cols = grid
    return cells.reshape(-1, rows * patch_size, cols * patch_size, 3).permute(0, 3, 1, 2)


def _resnet(config: NaViTConfig) -> tuple[nn.Sequential, int]:
    """Return root and stages, and the channels of the last map."""
    width = config.stem_width
    root = RootConv(width, 7, config.pixel_mean, config.pixel_std)
    units: dict[str, nn.Module] = {"root": _named(conv=root, relu=Relu(), pool=MaxPool())}
    fan_in = width
    for stage, count in enumerate(config.stem_stages):
        channels = width * 2**stage
        for number in range(count):
            stride = 2 if stage and not number else 1
            units[f"stage{stage}_unit{number}"] = Bottleneck(fan_in, channels, stride)
            fan_in = 4 * channels
    return _named(**units), fan_in


def _convs(config: NaViTConfig) -> tuple[nn.Sequential, int]:
    """Return the convolutions, and the channels of the last map."""
    units: dict[str, nn.Module] = {}
    fan_in = 3
    for stage, count in enumerate(config.stem_stages):
        channels = config.stem_width * 2**stage
        for number in range(count):
            conv = StdConv(fan_in, channels, 3, 1 if number else 2)
            if not units:
                conv = RootConv(channels, 3, config.pixel_mean, config.pixel_std)
            units[f"stage{stage}_unit{number}"] = _named(conv=conv, relu=Relu())
            fan_in = channels
    return _named(**units), fan_in


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def stem_flops(config: NaViTConfig, num_tokens: int) -> int:
    """Return the operations of a stem's convolutions, two for each multiply-add.

    They follow from the number of tokens alone: every map has a whole number of places to a patch.

    Args:
        config: A configuration with a stem.
        num_tokens: Tokens of all images together.
    """
    width, stages, side = config.stem_width, config.stem_stages, config.patch_size
    total, places = 0, side**2

    def add(fan_in: int, channels: int, kernel: int) -> None:
        nonlocal total
        total += 2 * places * fan_in * channels * kernel**2

    if config.stem == "convs":
        fan_in = 3
        for stage, count in enumerate(stages):
            places //= 4
            for _ in range(count):
                add(fan_in, width * 2**stage, 3)
                fan_in = width * 2**stage
    else:
        places //= 4
        add(3, width, 7)
        places //= 4
        fan_in = width
        for stage, units in enumerate(stages):
            channels = width * 2**stage
            for unit in range(units):
                add(fan_in, channels, 1)
                places //= 4 if stage and not unit else 1
                add(channels, channels, 3)
                add(channels, 4 * channels, 1)
                if not unit:
                    add(fan_in, 4 * channels, 1)
                fan_in = 4 * channels
    return num_tokens * (total + 2 * places * fan_in * config.width)
