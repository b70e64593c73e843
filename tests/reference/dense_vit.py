"""NaViT for one image or caption at a time, written out from the papers; imports nothing of ours.

Weights come as a state dict, under the names of the model under test. Every step is the plain
formula: a full softmax matrix, separate keys and values, no packing.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Style:
    """What differs between families beyond the weights they have."""

    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_after_pool: bool = False
    causal: bool = False
    pool_last: bool = False


@dataclass(frozen=True)
class Positions:
    """How a grid's places are embedded."""

    coordinates: str = "fractional"
    combine: str = "sum"
    table_size: int = 16
    interpolation: str = "antialias"

    def embed(self, state: State, place: list[int], grid: tuple[int, int]) -> Tensor:
        """Embed one (row, col): both coordinates' embeddings combined, or a resized table's."""
        if "pos_embed.table" in state:
            table = resized_table(state["pos_embed.table"], grid, self.interpolation)
            return table[place[0], place[1]]
        sides = grid if self.coordinates == "fractional" else (self.table_size, self.table_size)
        parts = [
            position(state, axis, p / side, self)
            for axis, p, side in zip(("rows", "cols"), place, sides, strict=True)
        ]
        if self.combine == "stack":
            return torch.cat(parts)
        return parts[0] * parts[1] if self.combine == "product" else parts[0] + parts[1]


def image_vector(
    state: State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    *,
    num_heads: int,
    activation: str = "gelu",
    embedding: Positions = Positions(),
    style: Style = Style(),
    pools_class_token: bool = False,
) -> Tensor:
    """Encode the kept patches (n, P) of one image at positions (n, 2) of its grid."""
    x = embed(state, patches, positions, grid, embedding, style)
    x = encode(state, x, num_heads, activation, style)
    extra = len(state.get("prefix.tokens", ()))
    # A class token stands first; registers are passed over.
    vector = x[0] if pools_class_token else pool(state, x[extra:], num_heads, activation, style)
    return norm(state, "norm", vector, style.norm_eps) if style.norm_after_pool else vector


def image_tokens(
    state: State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    *,
    num_heads: int,
    activation: str = "gelu",
    embedding: Positions = Positions(),
    style: Style = Style(),
) -> Tensor:
    """Encode one image into its patches' tokens (n, D) as they leave the model."""
    x = embed(state, patches, positions, grid, embedding, style)
    x = encode(state, x, num_heads, activation, style)
    return x[len(state.get("prefix.tokens", ())) :]


def embed(
    state: State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    embedding: Positions,
    style: Style,
) -> Tensor:
    """Project patches, add positions, and put the class token and registers in front."""
    dtype = state["norm.weight"].dtype
    mean, std = (torch.tensor(x, dtype=dtype) for x in (style.pixel_mean, style.pixel_std))
    pixels = ((patches.to(dtype).unflatten(1, (-1, 3)) / 255 - mean) / std).flatten(1)
    x = pixels @ state["patch_embed.proj.weight"].T + state.get("patch_embed.proj.bias", 0)
    x = x + torch.stack([embedding.embed(state, p, grid) for p in positions.tolist()])
    return torch.cat([state["prefix.tokens"], x]) if "prefix.tokens" in state else x


def caption_vector(
    state: State,
    ids: Tensor,
    *,
    num_heads: int,
    activation: str = "gelu",
    style: Style = Style(),
) -> Tensor:
    """Encode the token ids (n,) of one caption."""
    x = state["token_embed.weight"][ids] + state["pos_embed.weight"][: len(ids)]
    x = encode(state, x, num_heads, activation, style)
    return x[-1] if style.pool_last else pool(state, x, num_heads, activation, style)


def position_2d(
    state: State,
    place: list[int],
    grid: tuple[int, int],
    coordinates: str = "fractional",
    combine: str = "sum",
    table_size: int = 16,
    interpolation: str = "antialias",
) -> Tensor:
    """Embed one position of a grid: a row's and a column's embedding combined, or a table's."""
    if "pos_embed.table" in state:
        return resized_table(state["pos_embed.table"], grid, interpolation)[place[0], place[1]]
    if coordinates == "absolute":
        grid = (table_size, table_size)
    parts = [
        position(state, axis, p / side, table_size)
        for axis, p, side in zip(("rows", "cols"), place, grid, strict=True)
    ]
    if combine == "stack":
        return torch.cat(parts)
    return parts[0] * parts[1] if combine == "product" else parts[0] + parts[1]


def resized_table(table: Tensor, grid: tuple[int, int], interpolation: str) -> Tensor:
    """Resize a table (n * n, D) to (rows, cols, D) by torch's own interpolation.

    One axis after the other: in one call torch's CPU kernels with antialias (found in 2.13) give
    every row of a result of one column the first row's weights.
    """
    side = math.isqrt(len(table))
    options: dict[str, Any] = {
        "antialias": {"mode": "bilinear", "antialias": True},
        "corners": {"mode": "bilinear", "align_corners": True},
        "bicubic": {"mode": "bicubic"},
        "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    }[interpolation]
    image = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    for size in ((grid[0], side), grid):
        image = torch.nn.functional.interpolate(image, size, **options)
    return image[0].permute(1, 2, 0)


def position(
    state: State, axis: str, coordinate: float, embedding: Positions = Positions()
) -> Tensor:
    """Embed one coordinate: Fourier features, fixed sinusoids or an interpolated table."""
    part = {
        name.removeprefix(f"pos_embed.{axis}."): value
        for name, value in state.items()
        if name.startswith(f"pos_embed.{axis}.")
    }
    if "table" in part:
        table = part["table"]
        place = coordinate * len(table)
        low = min(math.floor(place), len(table) - 1)
        high = min(low + 1, len(table) - 1)
        return table[low] + (place - low) * (table[high] - table[low])
    if "frequencies" in part:
        angle = part["frequencies"] * coordinate
    else:  # the transformer's (arXiv:1706.03762, section 3.5), in patches
        half = len(state["norm.weight"]) // (4 if embedding.combine == "stack" else 2)
        place = coordinate * embedding.table_size
        shift = 0.5 if axis == "cols" and embedding.combine != "stack" else 0
        angles = [place / 10_000 ** ((i + shift) / half) for i in range(half)]
        angle = torch.tensor(angles, dtype=torch.float64).to(part["amplitude"])
    return part["amplitude"] * torch.cat([angle.sin(), angle.cos()])


def encode(
    state: State, x: Tensor, num_heads: int, activation: str, style: Style = Style()
) -> Tensor:
    """Run the norms and blocks on one image's tokens (n, D)."""
    eps = style.norm_eps
    if "pre_norm.weight" in state:
        x = norm(state, "pre_norm", x, eps)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        block = {
            name.removeprefix(f"blocks.{i}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{i}.")
        }
        added = self_attention(block, norm(block, "norm1", x, eps), num_heads, style)
        x = x + block.get("branch1.scale", 1) * added
        added = mlp(block, norm(block, "norm2", x, eps), activation)
        x = x + block.get("branch2.scale", 1) * added
    return x if style.norm_after_pool else norm(state, "norm", x, eps)


def self_attention(block: State, x: Tensor, num_heads: int, style: Style = Style()) -> Tensor:
    """Attend over one image's tokens, head by head."""
    q, k, v = linear(block, "attn.qkv", x).chunk(3, dim=1)
    heads = []
    for q_h, k_h, v_h in zip(*(y.chunk(num_heads, dim=1) for y in (q, k, v)), strict=True):
        if "attn.q_norm.weight" in block:
            q_h = norm(block, "attn.q_norm", q_h, style.norm_eps)
            k_h = norm(block, "attn.k_norm", k_h, style.norm_eps)
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[1])
        if style.causal:
            scores = torch.stack(
                [
                    torch.cat([row[: i + 1], torch.full_like(row[i + 1 :], -math.inf)])
                    for i, row in enumerate(scores)
                ]
            )
        heads.append(torch.softmax(scores, dim=1) @ v_h)
    return linear(block, "attn.proj", torch.cat(heads, dim=1))


def pool(
    state: State, x: Tensor, num_heads: int, activation: str, style: Style = Style()
) -> Tensor:
    """Pool one image's tokens (n, D): attention pooling where the state has a probe, else mean."""
    if "pool.probe" not in state:
        return x.mean(0)
    q = linear(state, "pool.q", state["pool.probe"])
    k, v = linear(state, "pool.k", x), linear(state, "pool.v", x)
    heads = []
    for q_h, k_h, v_h in zip(
        q.chunk(num_heads), k.chunk(num_heads, dim=1), v.chunk(num_heads, dim=1), strict=True
    ):
        heads.append(torch.softmax(k_h @ q_h / math.sqrt(len(q_h)), dim=0) @ v_h)
    out = linear(state, "pool.proj", torch.cat(heads))
    head = {name.removeprefix("pool."): value for name, value in state.items()}
    if "pool.norm.weight" not in state:
        return out
    return out + mlp(head, norm(head, "norm", out, style.norm_eps), activation)


def mlp(block: State, x: Tensor, activation: str) -> Tensor:
    """Two linear layers around a GELU: exact, in its tanh form, or CLIP's."""
    x = linear(block, "mlp.fc1", x)
    if activation == "quick_gelu":
        return linear(block, "mlp.fc2", x / (1 + torch.exp(-1.702 * x)))
    if activation == "gelu_tanh":
        share = 1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        share = 1 + torch.erf(x / math.sqrt(2))
    return linear(block, "mlp.fc2", 0.5 * x * share)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Apply a linear layer, with a bias where the state has one."""
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(state: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)
