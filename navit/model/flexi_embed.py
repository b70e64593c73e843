"""Patches of any size, mixed in one batch -> vectors of model width, from one buffer of weights."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from navit.model.config import PerChannel
from navit.model.patch_embed import HALVES, project
from navit.model.pi_resize import pi_resize
from navit.model.transfer import to_device
from packer.batch import PackedBatch


@dataclass(frozen=True)
class PatchGroups:
    """The T tokens of a batch by the size of their patches, in pixels."""

    sizes: tuple[int, ...]
    """The sizes there are, rising."""
    members: tuple[Int64[Tensor, " _"], ...]
    """Which of the T tokens have each size."""
    place: Int64[Tensor, " T"]
    """Where each token is when the groups stand one after another."""


def group_patches(
    sizes: tuple[int, ...], lengths: tuple[int, ...], device: torch.device
) -> PatchGroups:
    """Group tokens by patch size, on the host.

    Args:
        sizes: Patch size of each segment, in the plan's order.
        lengths: Tokens of each segment.
        device: Where the tokens are.
    """
    per_token = np.repeat(np.asarray(sizes, dtype=np.int64), np.asarray(lengths, dtype=np.int64))
    found = np.unique(per_token)
    members = [np.flatnonzero(per_token == size) for size in found]
    place = np.empty(len(per_token), dtype=np.int64)
    place[np.concatenate(members)] = np.arange(len(per_token))
    return PatchGroups(
        sizes=tuple(found.tolist()),
        members=tuple(to_device(index, device) for index in members),
        place=to_device(place, device),
    )


class FlexiPatchEmbed(nn.Module):
    """Project patches of any size by weights that are resized from one buffer to each size.

    Patches of one size are multiplied together. The other way, to map every patch to the buffer's
    size (``<x, P w> = <P^T x, w>``) and multiply all at once, costs a buffer's products for every
    patch, however small: `python -m benchmarks flexi` compares the two.

    Source: FlexiViT (arXiv:2212.08013), section 3.4 "Pseudo-inverse resize"; appendix A.

    Args:
        buffer: Side in pixels the weights are kept at; 32 in the paper.
        width: D.
        bias: Whether the projection has a bias.
        mean: Mean of red, green and blue in [0, 1].
        std: Their standard deviation.
    """

    def __init__(
        self,
        buffer: int,
        width: int,
        *,
        bias: bool = False,
        mean: PerChannel = HALVES,
        std: PerChannel = HALVES,
    ) -> None:
        super().__init__()
        self.buffer, self.mean, self.std = buffer, mean, std
        self.proj = nn.Linear(3 * buffer**2, width, bias=bias)
        # The resize keeps the variance of a token of independent pixels, so this is each size's.
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(
        self,
        batch: PackedBatch,
        token_index: Int64[Tensor, " T"],
        groups: PatchGroups | None,
    ) -> Float[Tensor, "T D"]:
        """Embed the real tokens of a batch.

        Args:
            batch: The packed images.
            token_index: Place of each token among the B * L flattened places.
            groups: The tokens by patch size; None where the batch has one size.
        """
        patches = batch.patches.flatten(0, 1)
        if groups is None:
            return self._project(patches, token_index, batch.patch_size)
        parts = [
            self._project(patches, token_index.index_select(0, members), size)
            for size, members in zip(groups.sizes, groups.members, strict=True)
        ]
        return torch.cat(parts).index_select(0, groups.place)

    def _project(self, patches: Tensor, index: Tensor, size: int) -> Tensor:
        """Embed the patches at some places, all of one size; what follows a smaller one is cut."""
        chosen = patches[:, : 3 * size**2].index_select(0, index)
        weight = pi_resize(self.proj.weight, size)
        return project(chosen, weight, self.proj.bias, self.mean, self.std)

    def check_patches(self, batch: PackedBatch) -> None:
        """Take patches of any size."""
