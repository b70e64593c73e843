"""Tokens that are added to every image's own: a class token and registers, in packed form."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from navit.model.attention import AttentionPlan
from navit.model.config import NaViTConfig
from navit.model.transfer import to_device


@dataclass(frozen=True)
class PrefixPlan:
    """N segments of R added tokens and their own T patch tokens, together S = N R + T."""

    attention: AttentionPlan
    """The longer segments."""
    source: Int64[Tensor, " S"]
    """Where each token comes from: added ones first (N R of them), then the patches' (T)."""
    added: Int64[Tensor, " NR"]
    """Place of each added token among the S."""
    patches: Int64[Tensor, " T"]
    """Place of each patch token among the S."""


def plan_prefix(plan: AttentionPlan, count: int) -> PrefixPlan:
    """Make room for ``count`` tokens before each segment's own, on the host."""
    lengths = np.asarray(plan.lengths, dtype=np.int64)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    patches = np.arange(len(segment)) + (segment + 1) * count
    starts = np.cumsum(lengths) - lengths + np.arange(len(lengths)) * count
    added = (starts[:, None] + np.arange(count)).reshape(-1)
    source = np.empty(len(patches) + len(added), dtype=np.int64)
    source[np.concatenate([added, patches])] = np.arange(len(source))
    longer = replace(plan, lengths=tuple((lengths + count).tolist()))
    return PrefixPlan(longer, *(to_device(x, plan.device) for x in (source, added, patches)))


class PrefixTokens(nn.Module):
    """The class token (ViT, arXiv:2010.11929) and the registers (arXiv:2309.16588) of each image.

    They stand before an image's patches in its segment, so an image sees its own alone. A class
    token with a learned position of its own, as in ViT (timm: ``no_embed_class=False``), is the sum
    of two learned vectors: one vector here. `navit.pretrained` adds them where it loads such a
    model; trained from the start the two would differ only in the optimizer's step, both taking it.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.count = config.num_prefix
        if self.count:
            # One parameter, the class token first: (R, D).
            self.tokens = nn.Parameter(torch.randn(self.count, config.width) * config.width**-0.5)

    def add(self, x: Float[Tensor, "T D"], plan: PrefixPlan) -> Float[Tensor, "S D"]:
        """Put the tokens before each segment's own."""
        repeats = plan.added.shape[0] // self.count
        both = torch.cat([self.tokens.to(x.dtype).repeat(repeats, 1), x])
        return both.index_select(0, plan.source)

    def split(
        self, x: Float[Tensor, "S D"], plan: PrefixPlan
    ) -> tuple[Float[Tensor, "N R D"], Float[Tensor, "T D"]]:
        """Take the added tokens off again: (those of each segment, the T patch tokens)."""
        added = x.index_select(0, plan.added).view(-1, self.count, x.shape[1])
        return added, x.index_select(0, plan.patches)
