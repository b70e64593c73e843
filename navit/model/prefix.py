"""Tokens that are added to every image's own: a class token and registers, in packed form."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from navit.model.attention import AttentionPlan
from navit.model.config import NaViTConfig


class PrefixTokens(nn.Module):
    """The class token (ViT, arXiv:2010.11929) and the registers (arXiv:2309.16588) of each image.

    They stand before an image's patches in its segment, so an image sees its own alone. Their
    positions are part of them: they are learned vectors anyway.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.count = config.num_registers + (config.pool == "cls")
        if self.count:
            # One parameter, the class token first: (R, D).
            self.tokens = nn.Parameter(torch.randn(self.count, config.width) * config.width**-0.5)

    def plan(self, plan: AttentionPlan) -> AttentionPlan:
        """Return the plan of the longer segments."""
        return replace(plan, lengths=tuple(length + self.count for length in plan.lengths))

    def add(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T_plus D"]:
        """Put the tokens before each segment's own; ``plan`` is that of the T patch tokens."""
        tokens = self.tokens.to(x.dtype)
        if not plan.lengths:
            return x + 0 * tokens.sum()  # connected, so that backward gives zeros
        return torch.cat(
            [
                torch.cat([tokens.expand(len(part), -1, -1), part], 1).flatten(0, 1)
                for part in _by_group(x, plan)
            ]
        )

    def split(
        self, x: Float[Tensor, "T_plus D"], plan: AttentionPlan
    ) -> tuple[Float[Tensor, "N R D"], Float[Tensor, "T D"]]:
        """Take the added tokens off again: (those of each segment, the T patch tokens)."""
        if not plan.lengths:
            return x.view(0, self.count, x.shape[1]), x
        parts = _by_group(x, self.plan(plan))
        prefix = torch.cat([part[:, : self.count] for part in parts])
        return prefix, torch.cat([part[:, self.count :].flatten(0, 1) for part in parts])


def _by_group(x: Tensor, plan: AttentionPlan) -> list[Float[Tensor, "count length D"]]:
    parts = zip(plan.groups, x.split_with_sizes(plan.group_tokens), strict=True)
    return [part.view(group.count, group.length, -1) for group, part in parts]
