"""NaViT for one image or caption at a time, written out from the papers; imports nothing of ours.

Weights come as a state dict, under the names of the model under test. Every step is the plain
formula: a full softmax matrix, separate keys and values, no packing.
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def image_vector(
    state: State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    *,
    num_heads: int,
    activation: str = "gelu",
) -> Tensor:
    """Encode the kept patches (n, P) of one image at positions (n, 2) of its grid."""
    return pool(
        state,
        image_tokens(state, patches, positions, grid, num_heads=num_heads, activation=activation),
        num_heads,
        activation,
    )


def image_tokens(
    state: State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    *,
    num_heads: int,
    activation: str = "gelu",
) -> Tensor:
    """Encode one image into its tokens (n, D) after the last norm."""
    dtype = state["norm.weight"].dtype
    pixels = (patches.to(dtype) - 127.5) / 127.5
    x = pixels @ state["patch_embed.proj.weight"].T + state.get("patch_embed.proj.bias", 0)
    for axis, (name, side) in enumerate(zip(("rows", "cols"), grid, strict=True)):
        x = x + torch.stack([position(state, name, int(p) / side) for p in positions[:, axis]])
    return encode(state, x, num_heads, activation)


def caption_vector(
    state: State, ids: Tensor, *, num_heads: int, activation: str = "gelu"
) -> Tensor:
    """Encode the token ids (n,) of one caption."""
    x = state["token_embed.weight"][ids] + state["pos_embed.weight"][: len(ids)]
    return pool(state, encode(state, x, num_heads, activation), num_heads, activation)


def position(state: State, axis: str, fraction: float) -> Tensor:
    """Embed one fractional position by learned Fourier features or an interpolated table."""
    if f"pos_embed.{axis}.frequencies" in state:
        angle = state[f"pos_embed.{axis}.frequencies"] * fraction
        return state[f"pos_embed.{axis}.amplitude"] * torch.cat([angle.sin(), angle.cos()])
    table = state[f"pos_embed.{axis}.table"]
    place = fraction * len(table)
    low = min(math.floor(place), len(table) - 1)
    high = min(low + 1, len(table) - 1)
    return table[low] + (place - low) * (table[high] - table[low])


def encode(state: State, x: Tensor, num_heads: int, activation: str) -> Tensor:
    """Run the blocks and the last norm on one image's tokens (n, D)."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        block = {
            name.removeprefix(f"blocks.{i}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{i}.")
        }
        x = x + self_attention(block, norm(block, "norm1", x), num_heads)
        x = x + mlp(block, norm(block, "norm2", x), activation)
    return norm(state, "norm", x)


def self_attention(block: State, x: Tensor, num_heads: int) -> Tensor:
    """Attend over one image's tokens, head by head."""
    q, k, v = linear(block, "attn.qkv", x).chunk(3, dim=1)
    heads = []
    for q_h, k_h, v_h in zip(*(y.chunk(num_heads, dim=1) for y in (q, k, v)), strict=True):
        if "attn.q_norm.weight" in block:
            q_h, k_h = norm(block, "attn.q_norm", q_h), norm(block, "attn.k_norm", k_h)
        heads.append(torch.softmax(q_h @ k_h.T / math.sqrt(q_h.shape[1]), dim=1) @ v_h)
    return linear(block, "attn.proj", torch.cat(heads, dim=1))


def pool(state: State, x: Tensor, num_heads: int, activation: str) -> Tensor:
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
    return (
        out + mlp(head, norm(head, "norm", out), activation) if "pool.norm.weight" in state else out
    )


def mlp(block: State, x: Tensor, activation: str) -> Tensor:
    """Two linear layers around a GELU, exact or in its tanh form."""
    x = linear(block, "mlp.fc1", x)
    if activation == "gelu_tanh":
        share = 1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        share = 1 + torch.erf(x / math.sqrt(2))
    return linear(block, "mlp.fc2", 0.5 * x * share)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Apply a linear layer, with a bias where the state has one."""
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Layer norm over the last axis, epsilon 1e-6."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)
