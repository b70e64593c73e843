"""What goes on inside the image tower: the tokens between its blocks, and attention weights.

The fused attention of a forward pass never holds its weights. Here they are computed again, from
the tokens that entered a block and the block's own modules, for one image and one block at a time
and some queries at a time: of n tokens no (n, n) matrix is ever held.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from navit.model.attention import AttentionPlan
from navit.model.block import Attention, Block
from navit.model.pool import AttentionPool
from navit.model.segments import at_least_float32
from navit.model.vision import NaViT
from packer.batch import PackedBatch

CHUNK_VALUES = 2**22
"""Attention weights computed at a time: 16 MiB in float32, whatever the number of tokens."""


@dataclass(frozen=True)
class ImageStates:
    """One image's way through the tower: n = R + m tokens, R of them added, m its patches'."""

    states: tuple[Float[Tensor, "n D"], ...]
    """Tokens before the first block and after each: depth + 1 tensors, added tokens first."""
    positions: Int32[Tensor, "m 2"]
    """(row, col) of each patch token."""
    grid: tuple[int, int]
    """(rows, cols) before dropping."""
    pooled: Float[Tensor, " D"]
    """The image's vector."""

    @property
    def num_prefix(self) -> int:
        """R: class token and registers."""
        return len(self.states[0]) - len(self.positions)


def read_states(tower: NaViT, batch: PackedBatch) -> list[ImageStates]:
    """Encode a batch and keep the tokens between the blocks, in the order of its keys.

    What is kept is (depth + 1) * n * D values an image, so give few images at a time. The tower's
    own forward pass is watched by hooks: these are the tokens it computes, not another's.

    Args:
        tower: In evaluation mode, called without gradients, not compiled.
        batch: On the tower's device.

    Raises:
        ValueError: If the tower is compiled, in training mode, or under autocast.
    """
    if tower.is_compiled or tower.training or torch.is_autocast_enabled(batch.patches.device.type):
        raise ValueError(
            "the tower must be uncompiled, in evaluation mode and outside of autocast to be looked "
            "into; it is not. Take a fresh copy: copy.deepcopy(tower).eval()."
        )
    seen: list[list[Tensor]] = [[] for _ in range(len(tower.blocks) + 1)]
    with torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(tower.blocks):
            before, after = seen[index], seen[index + 1] if index + 1 == len(tower.blocks) else None

            def watch(
                module: nn.Module,
                given: tuple[Tensor, AttentionPlan],
                out: Tensor,
                before: list[Tensor] = before,
                after: list[Tensor] | None = after,
            ) -> None:
                # A forward pass on a CPU takes segments in parts: each is seen once a block.
                before.append(given[0])
                if after is not None:
                    after.append(out)

            handle = block.register_forward_hook(watch)
            stack.callback(handle.remove)
        output = tower(batch)
    plan = output.plan
    longer = plan.attention if plan.prefix is None else plan.prefix.attention
    states = [torch.cat(parts).split_with_sizes(list(longer.lengths)) for parts in seen]
    positions = output.packed_positions.split_with_sizes(list(plan.attention.lengths))
    return [
        ImageStates(
            states=tuple(layer[place] for layer in states),
            positions=positions[place],
            grid=image.grid,
            pooled=output.pooled[index],
        )
        for index, (place, image) in enumerate(
            zip(plan.image_place.tolist(), output.per_image(), strict=True)
        )
    ]


def attention_rows(
    block: Block, x: Float[Tensor, "n D"], *, chunk_values: int = CHUNK_VALUES
) -> Iterator[tuple[int, Float[Tensor, "H rows n"]]]:
    """Compute the attention weights of one image in one block, some queries at a time.

    Besides queries and keys (2 n D values) at most ``chunk_values`` weights, or the H n of a single
    query, are held at once, three times over while the softmax runs.

    Args:
        block: The block.
        x: All tokens of the image, as they enter the block.
        chunk_values: Weights computed at a time.

    Yields:
        Number of the first query, and weights by head that sum to 1 over the keys; float32, or
        float64 for float64 weights.
    """
    attention = block.attn
    with torch.no_grad():
        q, k, _ = split_heads(attention, block.norm1(x))
        rows = max(chunk_values // (q.shape[0] * len(x)), 1)
        for start in range(0, len(x), rows):
            scores = q[:, start : start + rows] @ k.transpose(1, 2)
            yield start, scores.softmax(dim=-1)


def split_heads(attention: Attention, x: Float[Tensor, "n D"]) -> Float[Tensor, "3 H n Dh"]:
    """Return queries, keys and values by head, such that weights are ``softmax(q k^T)``.

    Args:
        attention: The attention of a block.
        x: Its input: the tokens after the block's first norm.
    """
    q, k, v = attention.qkv(x).unflatten(-1, (3, -1, attention.head_dim)).unbind(1)
    q, k = attention.normed(q, k)
    heads = torch.stack([q, k, v]).to(at_least_float32(x.dtype)).transpose(1, 2)
    scale = heads.new_tensor([1 / math.sqrt(attention.head_dim), 1.0, 1.0])
    scaled: Tensor = heads * scale[:, None, None, None]
    return scaled


def pool_weights(pool: AttentionPool, x: Float[Tensor, "m D"]) -> Float[Tensor, "H m"]:
    """Return how much attention pooling takes from each token, by head; rows sum to 1.

    Args:
        pool: The pooling.
        x: The tokens it is given: of patches alone, after the tower's last norm where that comes
            first (`pool_input`).
    """
    with torch.no_grad():
        q = pool.q(pool.probe[None]).view(pool.num_heads, 1, -1)
        k = pool.k(x).view(len(x), pool.num_heads, -1).transpose(0, 1)
        scores = (q @ k.transpose(1, 2))[:, 0].to(at_least_float32(x.dtype))
        weights: Tensor = (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return weights


def pool_input(tower: NaViT, image: ImageStates) -> Float[Tensor, "m D"]:
    """Return the patch tokens that the tower's pooling is given."""
    with torch.no_grad():
        last = image.states[-1]
        tokens = last if tower.config.norm_after_pool else tower.norm(last)
        return tokens[image.num_prefix :]
