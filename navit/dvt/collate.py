"""`StagedCollator`: one mini-batch packed once for every stage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from packer.batch import PackedBatch
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.plan.drop import NoDrop


class StagedCollator:
    """Pack the samples of a mini-batch at several token budgets, for `DVT`.

    Crop, augmentation and resolution are drawn from the sample's key, so that all stages see the
    same picture; only the number of its tokens differs. An image that is small has the same grid at
    several stages, as it is not enlarged. Each stage decodes for itself: a cheap one reads a JPEG
    at an eighth of its size.

    Args:
        config: Packing of all stages but for the budget; token dropping must be off.
        budgets: Most tokens of an image at each stage, rising.
        transform: As for `PackingCollator`.

    Raises:
        ValueError: If the budgets do not rise, tokens are dropped, or, as for `PackingCollator`.
    """

    def __init__(
        self,
        config: PackerConfig,
        budgets: Sequence[int],
        *,
        transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if not budgets or any(b < 1 for b in budgets) or list(budgets) != sorted(set(budgets)):
            raise ValueError(
                f"The token budgets of the stages must be positive and rise; got {list(budgets)}."
            )
        if not isinstance(config.token_drop, NoDrop):
            raise ValueError(
                "Stages reuse each other's tokens, so every image keeps all of them: token_drop "
                f"must be NoDrop(); got {config.token_drop!r}."
            )
        self.stages = tuple(
            PackingCollator(
                replace(config, max_tokens=budget, seq_len=max(config.seq_len, budget)),
                transform=transform,
            )
            for budget in budgets
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and augmentations from now on, in running workers too."""
        for stage in self.stages:
            stage.set_epoch(epoch)

    def __call__(self, samples: Sequence[Any]) -> tuple[PackedBatch, ...]:
        """Pack samples (see `packer.sample.as_sample`) into a batch for each stage.

        A sample that cannot be decoded is left out at every stage.
        """
        return tuple(stage(samples) for stage in self.stages)
