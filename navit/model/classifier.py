"""A classifier: the image tower and a head of one linear layer, or of two."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from navit.model.config import ModelConfig, NaViTConfig
from navit.model.flexi import Flexible
from navit.model.vision import NaViT, PretrainedModel
from packer.batch import PackedBatch

T = TypeVar("T", bound=ModelConfig)


@dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """The image tower and the number of classes."""

    vision: NaViTConfig = field(default_factory=NaViTConfig)
    """The image tower."""
    num_classes: int = 1000
    """C: classes."""
    init_head_bias: float = 0.0
    """Bias of the logits at the start; -log(C - 1), for a sigmoid loss, starts them at 1 / C."""
    representation_size: int | None = None
    """Size of a hidden layer of tanh before the logits, ViT's head for pre-training; None: a linear
    head, ViT's for fine-tuning."""

    def __post_init__(self) -> None:
        if isinstance(self.num_classes, bool) or self.num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer; got {self.num_classes!r}.")
        size = self.representation_size
        if size is not None and (isinstance(size, bool) or size < 1):
            raise ValueError(
                f"representation_size must be a positive integer, or None; got {size!r}."
            )

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives; the tower may be a mapping too."""
        vision = values.get("vision")
        if isinstance(vision, Mapping):
            values = {**values, "vision": NaViTConfig.from_dict(vision)}
        return super().from_dict(values)


class RepresentationHead(nn.Linear):
    """A hidden layer of tanh before the linear layer: logits = W tanh(V x + c) + b.

    Source: ViT (arXiv:2010.11929), section 3.1: "a MLP with one hidden layer at pre-training
    time"; ``pre_logits`` in its code.

    Args:
        width: D, size of the vector.
        size: Size of the hidden layer.
        num_classes: C.
    """

    def __init__(self, width: int, size: int, num_classes: int) -> None:
        super().__init__(size, num_classes)
        self.pre_logits = nn.Linear(width, size)
        nn.init.normal_(self.pre_logits.weight, std=width**-0.5)
        nn.init.zeros_(self.pre_logits.bias)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Return the logits of pooled vectors."""
        return super().forward(torch.tanh(self.pre_logits(x)))


class Classifier(Flexible, PretrainedModel[ClassifierConfig]):
    """Class logits of packed images.

    The head starts at 0, so that fine-tuning starts from what the tower knows.

    Source: NaViT (arXiv:2307.06304), section 3, classification pretraining on JFT with a sigmoid
    loss; ViT (arXiv:2010.11929), section 3.1, the heads.
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.vision = NaViT(config.vision)
        width, size = config.vision.width, config.representation_size
        self.head = (
            nn.Linear(width, config.num_classes)
            if size is None
            else RepresentationHead(width, size, config.num_classes)
        )
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, config.init_head_bias)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the tower, as `NaViT.compile` says."""
        self.vision.compile(*args, **options)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "N C"]:
        """Return the logits of each image, in the order of the batch's keys."""
        logits: Tensor = self.head(self.vision(batch).pooled)
        return logits
