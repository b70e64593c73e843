"""What is measured, and what one token budget gave: settings and results of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from navit.evaluate.probes import ProbeConfig
from packer.batch import BatchStats

Metric = Literal["retrieval", "prompts", "classifier", "linear", "few_shot", "knn", "shape"]
METRICS: tuple[Metric, ...] = (
    *("retrieval", "prompts", "classifier"),
    *("linear", "few_shot", "knn", "shape"),
)
PROBES = ("linear", "few_shot", "knn")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    metrics: tuple[Metric, ...] = METRICS
    """Which metrics, where the data allow them."""
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    """How image vectors are probed."""
    features: Literal["pooled", "embedding"] = "pooled"
    """What is probed: the image tower's vector, or a CLIP's projected one of length 1."""
    templates: tuple[str, ...] | None = None
    """Prompts; None: those of the data set, else `DEFAULT_TEMPLATES`."""
    class_names: tuple[str, ...] | None = None
    """Names of the labels; None: those of the data set."""
    sequences_per_batch: int = 8
    """B."""
    workers: int = 0
    """Processes that read and decode."""
    progress: bool = True
    """Whether to show a progress bar."""


@dataclass(frozen=True)
class BudgetResult:
    """What a model is worth at one token budget, and what that costs."""

    max_tokens: int
    """Token budget of an image."""
    metrics: dict[str, float]
    """Shares in [0, 1] by name (and the ridge strength of a linear probe)."""
    stats: BatchStats
    """Counts of the validation pass."""
    seconds: float
    """Time of the validation pass, reading and decoding included."""
    model_seconds: float
    """Of this, the image tower's."""
    captions: int = 0
    """Captions of the images that took part in retrieval."""
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By set: its classes, validation images and training images."""
    train_stats: BatchStats | None = None
    """Counts of the training pass; None without one."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know of them."""
    patch_size: int | None = None
    """Side of a patch in pixels; None: the model's own."""

    @property
    def mean_tokens(self) -> float:
        """Tokens an image, on average."""
        return self.stats.tokens / max(self.stats.images, 1)

    @property
    def images_per_second(self) -> float:
        """Images/s of the validation pass, reading and decoding included."""
        return self.stats.images / max(self.seconds, 1e-9)

    @property
    def model_images_per_second(self) -> float:
        """Images/s of the image tower alone."""
        return self.stats.images / max(self.model_seconds, 1e-9)


def check_patch_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the patch sizes, each once and rising.

    Raises:
        ValueError: If one is not positive.
    """
    if any(size < 1 for size in sizes):
        raise ValueError(f"patch sizes must be positive, in pixels; got {list(sizes)}.")
    return tuple(sorted(set(sizes)))


def check_budgets(budgets: Sequence[int]) -> tuple[int, ...]:
    """Return the token budgets, each once and rising.

    Raises:
        ValueError: If one is not positive.
    """
    if any(budget < 1 for budget in budgets):
        raise ValueError(f"token budgets must be positive; got {list(budgets)}.")
    return tuple(sorted(set(budgets)))
