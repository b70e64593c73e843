"""Masked patch prediction of one image, token by token (ViT, arXiv:2010.11929, appendix B.1.2).

The random bits are those of the model under test, worked out again in Python's own integers.
"""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from tests.reference import dense_vit

WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Fate:
    """What happens to one token."""

    asked: bool
    """Corrupted, hence asked for."""
    masked: bool
    """Replaced by the mask embedding."""
    source: int
    """Token of the image whose embedding stands in its place."""


def mix(x: int) -> int:
    """Scramble a word as MurmurHash3 ends (fmix64)."""
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & WORD
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & WORD
    return x ^ x >> 33


def fates(
    seed: int, key: str, positions: list[list[int]], shares: tuple[float, float, float]
) -> list[Fate]:
    """Decide over the tokens of an image; shares are those corrupted, then masked, then swapped."""
    word = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    word, count, found = mix(word ^ mix(seed)), len(positions), []
    share, mask, swap = shares
    for i, (row, col) in enumerate(positions):
        bits = mix(word ^ mix((row << 32) | col))
        draw = (bits >> 11) / 2**53
        step = 1 + int((mix(bits) >> 11) / 2**53 * (count - 1))
        swapped = share * mask <= draw < share * (mask + swap)
        other = (i + step) % count if swapped else i
        found.append(Fate(draw < share, draw < share * mask, other))
    return found


def colour_class(patch: Tensor) -> int:
    """Return the class of one patch's values, whose tail of zeros has been cut off."""
    number = 0
    for mean in patch.view(-1, 3).double().mean(0).tolist():
        number = 8 * number + int(mean / 32 + 1e-9)
    return number


def image_loss(
    state: dense_vit.State,
    patches: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    decided: list[Fate],
    *,
    num_heads: int,
    embedding: dense_vit.Positions,
    style: dense_vit.Style,
) -> Tensor:
    """Return the mean cross entropy over the corrupted patches of one image; 0 without any.

    Args:
        state: Weights of the model; those of the tower begin with ``vision.``.
        patches: Its n kept patches (n, P).
        positions: (row, col) of each.
        grid: (rows, cols) before dropping.
        decided: The fate of each.
        num_heads: Of the tower.
        embedding: How its positions are embedded.
        style: The rest of its shape.
    """
    tower = {
        name.removeprefix("vision."): x for name, x in state.items() if name.startswith("vision.")
    }
    nowhere = {**tower, "pos_embed.table": torch.zeros(1, tower["norm.weight"].shape[0]).double()}
    nowhere.pop("prefix.tokens", None)
    x = dense_vit.embed(nowhere, patches, positions, grid, dense_vit.Positions(), style)
    rows = [state["mask_embed"] if fate.masked else x[fate.source] for fate in decided]
    places = [embedding.embed(tower, place, grid) for place in positions.tolist()]
    x = torch.stack(rows) + torch.stack(places)
    extra = tower.get("prefix.tokens", x[:0])
    tokens = dense_vit.encode(tower, torch.cat([extra, x]), num_heads, "gelu", style)[len(extra) :]
    if style.norm_after_pool:
        tokens = dense_vit.norm(tower, "norm", tokens, style.norm_eps)
    losses = [
        -(state["head.weight"] @ token + state["head.bias"]).log_softmax(0)[colour_class(patch)]
        for token, patch, fate in zip(tokens, patches, decided, strict=True)
        if fate.asked
    ]
    return torch.stack(losses).mean() if losses else tokens.sum() * 0
