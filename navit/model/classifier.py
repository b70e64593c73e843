"""A classifier: the image tower and one linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

    def __post_init__(self) -> None:
        if isinstance(self.num_classes, bool) or self.num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer; got {self.num_classes!r}.")

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives; the tower may be a mapping too."""
        vision = values.get("vision")
        if isinstance(vision, Mapping):
            values = {**values, "vision": NaViTConfig.from_dict(vision)}
        return super().from_dict(values)


class Classifier(Flexible, PretrainedModel[ClassifierConfig]):
    """Class logits of packed images.

    The head starts at 0, so that fine-tuning starts from what the tower knows.

    Source: NaViT (arXiv:2307.06304), section 3, classification pretraining on JFT with a sigmoid
    loss; ViT (arXiv:2010.11929), section 3.1, the linear head.
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.vision = NaViT(config.vision)
        self.head = nn.Linear(config.vision.width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, config.init_head_bias)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the tower, as `NaViT.compile` says."""
        self.vision.compile(*args, **options)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "N C"]:
        """Return the logits of each image, in the order of the batch's keys."""
        logits: Tensor = self.head(self.vision(batch).pooled)
        return logits
