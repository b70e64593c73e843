"""What a run says about itself: metrics.jsonl, TensorBoard events, rates for the progress bar."""

import json
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from navit.train.ranks import World
from packer.batch import BatchStats

MIB = 2**20


class MetricsLog:
    """Append-only ``metrics.jsonl`` and TensorBoard events of one run folder.

    Args:
        run: The run folder.
        start_step: Lines of later steps, left by a run that was killed after its last checkpoint,
            are removed, so that a resumed run reads like one that was never stopped.
        enabled: Whether anything is written: on several ranks only one writes.
    """

    def __init__(self, run: Path, *, start_step: int = 0, enabled: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        self.enabled = enabled
        if not enabled:
            return
        # Imported here: it takes a second, and evaluation and embedding do without.
        from torch.utils.tensorboard.writer import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        # Replaced, not rewritten: a kill in between would lose the lines of all earlier steps.
        new = self.path.with_suffix(".jsonl.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(new, self.path)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; numbers go to TensorBoard as ``event/name``."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{event}/{name}", value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.enabled:
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


@dataclass
class Usage:
    """What one rank's steps took, and what they were for."""

    stats: BatchStats = field(default_factory=BatchStats)
    """Counts of their batches."""
    waited: float = 0.0
    """Seconds without data."""
    seconds: float = 0.0
    """Seconds in all."""
    flops: int = 0
    """Floating-point operations of the model, forward and backward."""


class Throughput:
    """Rates of training steps over all ranks, their waiting for data included.

    Evaluations and checkpoints between the steps do not count.

    Args:
        world: The ranks.
        peak: Floating-point operations per second this rank's device can do, what MFU is relative
            to; None leaves MFU out.
    """

    def __init__(self, world: World, peak: float | None = None) -> None:
        self.world, self.peak = world, peak
        self._usage = Usage()

    def add(self, stats: BatchStats, *, waited: float, seconds: float, flops: int = 0) -> None:
        """Count a step of this rank: its batches' counts and operations, and its time.

        Args:
            stats: Counts of the step's batches.
            waited: Seconds it waited for them.
            seconds: Seconds it took in all.
            flops: Operations of the model, forward and backward.
        """
        usage = self._usage
        usage.stats = usage.stats + stats
        usage.waited += waited
        usage.seconds += seconds
        usage.flops += flops

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading and start again; a collective.

        Returns:
            Of all ranks together ``images_per_second``, ``tokens_per_second`` (kept tokens) and
            ``flops_per_second`` (the model's operations, forward and backward);
            shares ``padding`` (of token places), ``drop_rate`` (of the images' tokens),
            ``data_wait`` (of the time) and ``mfu`` (of the devices' measured matmul rate); of the
            rank with most ``rss_mib``, the largest resident memory of its process so far, and
            ``cuda_mib``, the most its device had allocated.
        """
        memory = memory_mib(self.world.device)
        found = self.world.gather((self._usage, self.peak, memory))
        self._usage = Usage()
        usages = [usage for usage, _, _ in found]
        stats = sum((usage.stats for usage in usages), BatchStats())
        all_seconds = max(sum(usage.seconds for usage in usages), 1e-9)
        seconds = all_seconds / len(usages)
        rates = {
            "images_per_second": stats.images / seconds,
            "tokens_per_second": stats.tokens / seconds,
            "padding": stats.padding,
            "drop_rate": 1 - stats.tokens / max(stats.tokens_before_drop, 1),
            "data_wait": sum(usage.waited for usage in usages) / all_seconds,
        }
        rates["flops_per_second"] = sum(usage.flops for usage in usages) / seconds
        peaks = [peak for _, peak, _ in found if peak is not None]
        if len(peaks) == len(found):
            rates["mfu"] = rates["flops_per_second"] / sum(peaks)
        for name in memory:
            rates[name] = max(held[name] for _, _, held in found)
        return rates


def memory_mib(device: torch.device) -> dict[str, float]:
    """Return the most memory this process and its CUDA device have held so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    held = {"rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB}
    if device.type == "cuda":
        held["cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return held
