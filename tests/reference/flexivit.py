"""FlexiViT for one image, written out from big_vision's model code, under its names.

Where the code fits an image into a square grid, this takes an image of any whole number of patches
on either side: nothing in the model asks for a square.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Params = dict[str, Tensor]


def encode(params: Params, image: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Encode an image (H, W, 3) of pixels in [-1, 1].

    Returns:
        The vector before the classifier (D,), and the patches' tokens (rows, cols, D).
    """
    kernel = resample_patch_embedding(params["embedding/kernel"], patch_size)
    weight = kernel.permute(3, 2, 0, 1)
    x = F.conv2d(image.permute(2, 0, 1)[None], weight, params["embedding/bias"], stride=patch_size)
    rows, cols = x.shape[2:]
    positions = params["pos_embedding"]
    side = math.isqrt(positions.shape[1])
    grid = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    if (rows, cols) != (side, side):
        grid = F.interpolate(grid, (rows, cols), mode="bilinear", antialias=True)
    x = (x + grid)[0].flatten(1).T
    if "cls" in params:
        x = torch.cat([params["cls"][0], x])
    depth = len({name.split("/")[1] for name in params if "/encoderblock_" in name})
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        y = norm(params, f"{block}/LayerNorm_0", x)
        x = x + attention(params, f"{block}/MultiHeadDotProductAttention_0", y, y)
        x = x + mlp(params, f"{block}/MlpBlock_0", norm(params, f"{block}/LayerNorm_1", x))
    x = norm(params, "Transformer/encoder_norm", x)
    patches = x[1:] if "cls" in params else x
    if "cls" in params:
        vector = x[0]
    elif "MAPHead_0/probe" in params:
        probe = params["MAPHead_0/probe"][0]
        y = attention(params, "MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
        y = y + mlp(params, "MAPHead_0/MlpBlock_0", norm(params, "MAPHead_0/LayerNorm_0", y))
        vector = y[0]
    else:
        vector = x.mean(0)
    return vector, patches.view(rows, cols, -1)


def resample_patch_embedding(kernel: Tensor, new: int) -> Tensor:
    """Resize (h, w, c, D) by the pseudo-inverse of a bilinear resize of whole patches."""
    old = kernel.shape[0]
    if old == new:
        return kernel
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(basis, (new, new), mode="bilinear").flatten(
        1
    )  # row k: basis k, resized
    inverse = torch.linalg.pinv(resized).to(kernel.dtype)
    return torch.einsum("nk,kcd->ncd", inverse, kernel.flatten(0, 1)).unflatten(0, (new, new))


def attention(params: Params, name: str, queries: Tensor, x: Tensor) -> Tensor:
    """Attend in heads, whose axes the kernels name."""
    q = torch.einsum("nd,dhe->hne", queries, params[f"{name}/query/kernel"])
    k = torch.einsum("nd,dhe->hne", x, params[f"{name}/key/kernel"])
    v = torch.einsum("nd,dhe->hne", x, params[f"{name}/value/kernel"])
    q, k, v = (
        y + params[f"{name}/{part}/bias"][:, None]
        for y, part in ((q, "query"), (k, "key"), (v, "value"))
    )
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    out = torch.einsum("hne,hed->nd", weights @ v, params[f"{name}/out/kernel"])
    return out + params[f"{name}/out/bias"]


def mlp(params: Params, name: str, x: Tensor) -> Tensor:
    """Two products around flax's GELU, which is the tanh form where nothing is said."""
    x = x @ params[f"{name}/Dense_0/kernel"] + params[f"{name}/Dense_0/bias"]
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ params[f"{name}/Dense_1/kernel"] + params[f"{name}/Dense_1/bias"]


def norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Layer norm over the last axis, with flax's 1e-6."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * params[f"{name}/scale"] + params[f"{name}/bias"]
