"""One stage of a cascade: a network, what its images are packed as, and its class logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from navit.evaluate.run import evaluation_packing
from navit.model import CLIP
from packer.batch import PackedBatch
from packer.config import PackerConfig


@dataclass(frozen=True, eq=False)
class Stage:
    """A network at a token budget.

    Stages may share one network, which is then asked at growing budgets (our variant), or have one
    each (as DVT trains them).
    """

    model: nn.Module
    """A `Classifier`, a `CLIP` with `classes`, or any module from a batch to (N, C) logits."""
    packing: PackerConfig
    """Token budget (``max_tokens``), patch size and all else that is done to an image."""
    classes: Float[Tensor, "C E"] | None = None
    """Of a CLIP: one vector of length 1 for each class (`navit.evaluate.prompts.class_vectors`)."""

    def __post_init__(self) -> None:
        if isinstance(self.model, CLIP) and self.classes is None:
            raise ValueError(
                "a CLIP needs class vectors to classify by; got classes=None. Encode prompts with "
                "navit.evaluate.prompts.class_vectors."
            )

    def logits(self, batch: PackedBatch) -> Float[Tensor, "N C"]:
        """Return the class logits of a batch on the model's device, float32 or better.

        Those of a CLIP are the scaled similarities to the class vectors.
        """
        if not isinstance(self.model, CLIP):
            found: Tensor = self.model(batch)
            return found if found.dtype == torch.float64 else found.float()
        image = self.model.encode_image(batch, normalize=True)
        assert self.classes is not None
        # Similarities of one image lie close together: half precision would tie them.
        with torch.autocast(image.device.type, enabled=False):
            scale = self.model.logit_scale.to(image.dtype)
            scores: Tensor = scale * (image @ self.classes.to(image.device, image.dtype).T)
        return scores

    def repeats(self, other: "Stage") -> bool:
        """Whether the two answer the same where their plans of an image are the same."""
        pixels = ("decode", "resample", "keep_truncated")
        return (
            self.model is other.model
            and self.classes is other.classes
            and all(getattr(self.packing, n) == getattr(other.packing, n) for n in pixels)
        )


def budget_stages(
    model: nn.Module,
    packing: PackerConfig,
    budgets: Sequence[int],
    *,
    classes: Tensor | None = None,
) -> tuple[Stage, ...]:
    """Return the stages of one network at several token budgets: whole images, every token.

    Args:
        model: The network all stages share.
        packing: Packing it was trained with; cropping, dropping and resolution sampling are off.
        budgets: Most tokens of an image, rising.
        classes: Class vectors of a CLIP.

    Raises:
        ValueError: If the budgets do not rise.
    """
    if not budgets or any(b < 1 for b in budgets) or list(budgets) != sorted(set(budgets)):
        raise ValueError(
            f"the token budgets of a cascade must be positive and rise; got {list(budgets)}."
        )
    whole = evaluation_packing(packing)
    return tuple(
        Stage(
            model,
            replace(whole, max_tokens=budget, seq_len=max(packing.seq_len, budget)),
            classes,
        )
        for budget in budgets
    )


def max_probability(logits: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Return the largest probability of a softmax over the classes; 0 where it is not finite.

    Source: DVT (arXiv:2105.15075); NaViT (arXiv:2307.06304), appendix D.
    """
    return logits.softmax(-1).amax(-1).nan_to_num(0.0)
