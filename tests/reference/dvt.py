"""A dynamic transformer for one image at a time, written out from the paper.

Like `dense_vit` it imports nothing of ours, and takes weights as a state dict.

All matrices are made in full: the softmax of one head after the other, and U for U A U^T.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference.dense_vit import Positions, State, Style, embed, linear, mlp, norm, pool

Image = tuple[Tensor, Tensor, tuple[int, int]]
"""Patches (n, P), positions (n, 2) and the grid of one stage."""


def image_logits(
    state: State,
    stages: Sequence[Image],
    *,
    num_heads: int,
    activation: str = "gelu",
    style: Style,
    pools_class_token: bool = False,
) -> list[Tensor]:
    """Return the logits (C,) of every exit for one image, given at every stage's grid."""
    logits: list[Tensor] = []
    tokens: Tensor | None = None
    relations: Tensor | None = None
    for k, (patches, positions, grid) in enumerate(stages):
        tower = below(state, f"towers.{k}") or below(state, "towers.0")
        reuse = below(state, f"reuse.{k - 1}")
        x = embed(tower, patches, positions, grid, Positions(), style)
        extra = len(tower.get("prefix.tokens", ()))
        if "pre_norm.weight" in tower:
            x = norm(tower, "pre_norm", x, style.norm_eps)
        bias = None
        if relations is not None and "relation.fc1.weight" in reuse:
            u = torch.block_diag(torch.eye(extra).to(x), resize(stages[k - 1][2], grid).to(x))
            bias = torch.stack([u @ a @ u.T for a in mix(below(reuse, "relation"), relations)])
        found = []
        depth = len([name for name in tower if name.endswith("norm1.weight")])
        for i in range(depth):
            block, context = below(tower, f"blocks.{i}"), below(reuse, f"blocks.{i}")
            added = None if bias is None else bias[i * num_heads : (i + 1) * num_heads]
            mixed, scores = attend(block, norm(block, "norm1", x, style.norm_eps), num_heads, added)
            found.append(scores)
            x = x + mixed
            inner = norm(block, "norm2", x, style.norm_eps)
            if context and tokens is not None:
                read = norm(context, "norm", tokens, style.norm_eps)
                # The tower's MLP of the same names, from D over the hidden size to the context's.
                read = mlp({f"mlp.{name}": w for name, w in context.items()}, read, "gelu")
                read = resize(stages[k - 1][2], grid).to(x) @ read
                read = torch.cat([torch.zeros(extra, read.shape[1]).to(x), read])
                inner = torch.cat([inner, read], dim=1)
                wider = torch.cat([block["mlp.fc1.weight"], context["join.weight"]], dim=1)
                block = {**block, "mlp.fc1.weight": wider}
            x = x + mlp(block, inner, activation)
        tokens, relations = x[extra:], torch.cat(found)
        late = style.norm_after_pool
        x = x if late else norm(tower, "norm", x, style.norm_eps)
        vector = x[0] if pools_class_token else pool(tower, x[extra:], num_heads, activation, style)
        vector = norm(tower, "norm", vector, style.norm_eps) if late else vector
        logits.append(linear(state, f"heads.{k}", vector))
    return logits


def attend(block: State, x: Tensor, num_heads: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend over one image's tokens; return them and the logits (H, S, S) with the bias."""
    heads, found = [], []
    parts = [y.chunk(num_heads, dim=1) for y in linear(block, "attn.qkv", x).chunk(3, dim=1)]
    for h, (q, k, v) in enumerate(zip(*parts, strict=True)):
        q, k = norm(block, "attn.q_norm", q), norm(block, "attn.k_norm", k)
        scores = q @ k.T / math.sqrt(q.shape[1])
        if bias is not None:
            scores = scores + bias[h]
        found.append(scores)
        heads.append(torch.softmax(scores, dim=1) @ v)
    return linear(block, "attn.proj", torch.cat(heads, dim=1)), torch.stack(found)


def mix(relation: State, logits: Tensor) -> Tensor:
    """Run the MLP over layers and heads (channels, S, S), pair by pair."""
    rows = [
        torch.stack(
            [linear(relation, "fc2", F.gelu(linear(relation, "fc1", pair))) for pair in row]
        )
        for row in logits.permute(1, 2, 0)
    ]
    return torch.stack(rows).permute(2, 0, 1)


def resize(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Make the matrix (new tokens, old tokens) of torch's own bilinear interpolation."""
    one_each = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    larger = F.interpolate(one_each, size=new, mode="bilinear", align_corners=False)
    return larger.flatten(1).T


def below(state: State, name: str) -> State:
    """Return the part of a state under a name."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
