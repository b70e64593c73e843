"""What a page knows of a run: its settings, its curves, how far it was when, its counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Axis = Literal["step", "images", "tokens", "flops", "hours"]
AXES: dict[Axis, str] = {
    "step": "optimizer steps",
    "images": "images seen",
    "tokens": "kept tokens",
    "flops": "model FLOPs",
    "hours": "hours of steps",
}
"""What a curve can be drawn against, with its name on the page."""
PICTURES = {"packing": "packing.png", "retrieval": "retrieval.png", "masked": "masked.png"}


@dataclass(frozen=True)
class Series:
    """Values of one quantity at rising steps."""

    steps: Floats
    """Optimizer steps, from 1: float64 (N,)."""
    values: Floats
    """Finite values: float64 (N,)."""

    @property
    def last(self) -> float:
        """The newest value; NaN of an empty series."""
        return float(self.values[-1]) if len(self.values) else float("nan")


@dataclass(frozen=True)
class Progress:
    """How far a run was at each step, counted from 0."""

    steps: Floats
    """0 and every step with a record: float64 (N,)."""
    amounts: Mapping[Axis, Floats]
    """By axis, the amount until each of `steps`; an axis the log says nothing of is missing."""

    def at(self, axis: Axis, steps: Floats) -> Floats | None:
        """Return the positions of steps along an axis; None where the log does not say."""
        amounts = self.amounts.get(axis)
        return None if amounts is None else np.interp(steps, self.steps, amounts)

    def total(self, axis: Axis) -> float | None:
        """Return the amount of the whole run."""
        amounts = self.amounts.get(axis)
        return None if amounts is None else float(amounts[-1])


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    """How the page calls it."""
    folder: Path
    """Where it was read."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's ``config.json``."""
    train: Mapping[str, Series] = field(default_factory=dict)
    """By name, what was written at every step: loss, lr, gradient_norm, ..."""
    rates: Mapping[str, Series] = field(default_factory=dict)
    """By name, what was written every few steps: images_per_second, padding, data_wait, ..."""
    evals: Mapping[str, Series] = field(default_factory=dict)
    """By name, the results on the validation set."""
    bad_steps: tuple[int, ...] = ()
    """Steps left out because loss or gradient norm was not finite."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Counts of images, tokens and skipped samples, of the end or of the newest checkpoint."""
    stats_step: int | None = None
    """The step `stats` were counted until."""
    parameters: int | None = None
    """Number of weights."""
    progress: Progress = field(default_factory=lambda: Progress(np.zeros(1), {}))
    """Images, tokens and hours by step."""
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """By kind (`PICTURES`), the drawings that are there."""
    notes: tuple[str, ...] = ()
    """What is missing or damaged, in words for the page."""

    @property
    def last_step(self) -> int:
        """The last step with a record."""
        return int(self.progress.steps[-1])

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run; None where the configuration is missing."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None
