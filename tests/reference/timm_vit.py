"""timm's VisionTransformer for one image, written out from its documented behaviour.

Weights come as a state dict under timm's own names. Patches are cut from an image, positions
resized bicubically with antialias, as with ``dynamic_img_size=True``.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def encode(
    state: State,
    image: Tensor,
    *,
    num_heads: int,
    global_pool: str,
    act_layer: str = "gelu",
    norm_eps: float = 1e-6,
    no_embed_class: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encode a normalised image (3, H, W).

    Returns:
        The pooled vector (D,) before the classifier, and the tokens (prefix + patches, D) after
        the norm that comes before pooling, if there is one.
    """
    weight = state["patch_embed.proj.weight"]
    stride = weight.shape[-1]
    patches = F.conv2d(image[None], weight, state.get("patch_embed.proj.bias"), stride=stride)[0]
    grid = (patches.shape[1], patches.shape[2])
    prefix = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    count = sum(map(len, prefix))
    x = torch.cat([*prefix, patches.flatten(1).T])
    x = x + resized(state["pos_embed"][0], grid, 0 if no_embed_class else count, count)
    if "norm_pre.weight" in state:
        x = norm(state, "norm_pre", x, norm_eps)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        name = f"blocks.{i}"
        normed = norm(state, f"{name}.norm1", x, norm_eps)
        added = attention(state, f"{name}.attn", normed, num_heads=num_heads, eps=norm_eps)
        x = x + state.get(f"{name}.ls1.gamma", 1) * added
        added = mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x, norm_eps), act_layer)
        x = x + state.get(f"{name}.ls2.gamma", 1) * added
    if "norm.weight" in state:
        x = norm(state, "norm", x, norm_eps)
    if global_pool == "token":
        vector = x[0]
    elif global_pool == "avg":
        vector = x[count:].mean(0)
    else:
        vector = attention_pool(state, x[count:], num_heads, act_layer, norm_eps)
    if "fc_norm.weight" in state:
        vector = norm(state, "fc_norm", vector, norm_eps)
    return vector, x


def resized(positions: Tensor, grid: tuple[int, int], rows_of_prefix: int, count: int) -> Tensor:
    """Resize the patches' positions to the grid, one axis after the other, keep the prefix's."""
    prefix, table = positions[:rows_of_prefix], positions[rows_of_prefix:]
    if not rows_of_prefix:
        prefix = positions.new_zeros(count, positions.shape[1])
    side = math.isqrt(len(table))
    image = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    for size in ((grid[0], side), grid):
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
    return torch.cat([prefix, image[0].flatten(1).T])


def attention(state: State, name: str, x: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """Attend, with queries and keys normalised per head where the state has norms for them."""
    qkv = linear(state, f"{name}.qkv", x).view(len(x), 3, num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)
    if f"{name}.q_norm.weight" in state:
        q, k = norm(state, f"{name}.q_norm", q, eps), norm(state, f"{name}.k_norm", k, eps)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return linear(state, f"{name}.proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def attention_pool(state: State, x: Tensor, num_heads: int, act_layer: str, eps: float) -> Tensor:
    """Pool by one learned query, with a residual MLP behind."""
    q = linear(state, "attn_pool.q", state["attn_pool.latent"][0, 0]).view(num_heads, -1)
    k, v = linear(state, "attn_pool.kv", x).view(len(x), 2, num_heads, -1).unbind(1)
    weights = torch.einsum("hd,nhd->hn", q, k).div(math.sqrt(q.shape[1])).softmax(-1)
    out = linear(state, "attn_pool.proj", torch.einsum("hn,nhd->hd", weights, v).flatten())
    return out + mlp(state, "attn_pool.mlp", norm(state, "attn_pool.norm", out, eps), act_layer)


def mlp(state: State, name: str, x: Tensor, act_layer: str) -> Tensor:
    """Two linear layers around an activation."""
    x = linear(state, f"{name}.fc1", x)
    if act_layer == "quick_gelu":
        x = x * torch.sigmoid(1.702 * x)
    else:
        x = F.gelu(x, approximate="tanh" if act_layer == "gelu_tanh" else "none")
    return linear(state, f"{name}.fc2", x)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Apply a linear layer."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)
