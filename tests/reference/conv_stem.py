"""The convolutional stems for one image, written out; imports nothing of ours.

A convolution is a sum over the places of its filter, a norm a loop over groups. Weights come as a
state dict, under the names of the stem under test.
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def tokens(
    state: State,
    image: Tensor,
    *,
    kind: str,
    stages: tuple[int, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Turn an image (H, W, 3) of pixels in [0, 255] into tokens (rows, cols, D)."""
    kernel = state["proj.weight"]
    centre, spread = (torch.tensor(x, dtype=kernel.dtype) for x in (mean, std))
    x = ((image.to(kernel) / 255 - centre) / spread).permute(2, 0, 1)
    features = {
        name.removeprefix("features."): value
        for name, value in state.items()
        if name.startswith("features.")
    }
    x = resnet(features, x, stages) if kind == "resnet" else convs(features, x, stages)
    side = kernel.shape[-1]
    out = convolved(x, kernel, side, pad=False).permute(1, 2, 0)
    return out + state.get("proj.bias", 0)


def resnet(state: State, x: Tensor, stages: tuple[int, ...]) -> Tensor:
    """Root, max pooling and bottleneck units."""
    x = max_pool(normed_conv(state, "root.conv", x, 2).clamp(min=0))
    for stage, units in enumerate(stages):
        for unit in range(units):
            name, stride = f"stage{stage}_unit{unit}", 2 if stage > 0 and unit == 0 else 1
            y = normed_conv(state, f"{name}.conv1", x, 1).clamp(min=0)
            y = normed_conv(state, f"{name}.conv2", y, stride).clamp(min=0)
            y = normed_conv(state, f"{name}.conv3", y, 1)
            if f"{name}.shortcut.weight" in state:
                x = normed_conv(state, f"{name}.shortcut", x, stride)
            x = (x + y).clamp(min=0)
    return x


def convs(state: State, x: Tensor, stages: tuple[int, ...]) -> Tensor:
    """3 x 3 convolutions, the first of each stage with stride 2."""
    for stage, count in enumerate(stages):
        for i in range(count):
            x = normed_conv(state, f"stage{stage}_unit{i}.conv", x, 2 if i == 0 else 1)
            x = x.clamp(min=0)
    return x


def normed_conv(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """Convolve with filters of mean 0 and variance 1 each, and normalise."""
    filters = []
    for one in state[f"{name}.weight"]:
        centred = one - one.mean()
        filters.append(centred / (centred.square().mean().sqrt() + 1e-5))
    return group_norm(state, f"{name}.norm", convolved(x, torch.stack(filters), stride))


def convolved(x: Tensor, kernel: Tensor, stride: int, *, pad: bool = True) -> Tensor:
    """Convolve (C, H, W) with zeros around it, the odd row and column of them right and below."""
    side = kernel.shape[-1]
    rows, cols = x.shape[1] // stride, x.shape[2] // stride
    before = max(side - stride, 0) // 2 if pad else 0
    room = x.new_zeros(x.shape[0], x.shape[1] + side, x.shape[2] + side)
    room[:, before : before + x.shape[1], before : before + x.shape[2]] = x
    out = x.new_zeros(len(kernel), rows, cols)
    for i in range(side):
        for j in range(side):
            seen = room[:, i::stride, j::stride][:, :rows, :cols]
            out = out + torch.einsum("kc,chw->khw", kernel[:, :, i, j], seen)
    return out


def max_pool(x: Tensor) -> Tensor:
    """The largest of each 3 x 3 window that starts at an even place; nothing beyond the edge."""
    rows, cols = x.shape[1] // 2, x.shape[2] // 2
    out = [
        [x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].amax((1, 2)) for c in range(cols)]
        for r in range(rows)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in out], dim=1)


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Normalise each of 32 groups of channels, or fewer, over all places of this one image."""
    channels = len(x)
    groups = math.gcd(32, channels)
    groups = groups // 2 if groups == channels > 1 else groups
    parts = []
    for part in x.chunk(groups):
        centred = part - part.mean()
        parts.append(centred / (centred.square().mean() + 1e-6).sqrt())
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    return torch.cat(parts) * scale[:, None, None] + shift[:, None, None]
