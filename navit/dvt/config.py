"""Configuration of a dynamic vision transformer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from navit.model.config import ModelConfig, NaViTConfig

T = TypeVar("T", bound=ModelConfig)


@dataclass(frozen=True)
class DVTConfig(ModelConfig):
    """K stages of growing token budgets, each with its own exit.

    Source: DVT (arXiv:2105.15075), sections 3.1 and 3.2; sizes of the reuse modules as in the
    authors' code.
    """

    vision: NaViTConfig = field(default_factory=NaViTConfig)
    """The image tower of every stage. With ``checkpointing`` its images are run again in the
    backward pass: block by block, or with `relation_reuse` bucket by bucket."""
    num_classes: int = 1000
    """C: classes."""
    num_stages: int = 3
    """K: stages, at least two."""
    feature_reuse: bool = True
    """Whether a stage's blocks read the last tokens of the stage before."""
    relation_reuse: bool = True
    """Whether a stage's attention logits start from those of the stage before. Images then run in
    buckets of equal grids, with dense attention."""
    shared: bool = False
    """Whether one tower serves all stages (our variant); False: one each, as in the paper. Exits
    and reuse modules are each stage's own."""
    context_dim: int = 48
    """Channels that a block's MLP reads of the stage before."""
    context_hidden: int = 128
    """Hidden size of the MLP that makes them."""
    relation_ratio: int = 3
    """Hidden channels of the MLP over attention logits, times layers x heads."""
    max_logits: int = 1 << 24
    """Most attention logits, of all layers, heads and images at the largest stage, that are kept at
    a time (64 MiB in float32, some 6 times that at the peak of inference): a larger bucket is run
    in parts. One image is never split."""

    def __post_init__(self) -> None:
        numbers = ("num_classes", "context_dim", "context_hidden", "relation_ratio", "max_logits")
        for name in numbers:
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("num_stages", self.num_stages, 2)

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives; the tower may be a mapping too."""
        vision = values.get("vision")
        if isinstance(vision, Mapping):
            values = {**values, "vision": NaViTConfig.from_dict(vision)}
        return super().from_dict(values)


def _check_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
