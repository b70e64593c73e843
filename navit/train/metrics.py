"""What a run says about itself: metrics.jsonl, TensorBoard events, rates for the progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from packer.batch import BatchStats


class MetricsLog:
    """Append-only ``metrics.jsonl`` and TensorBoard events of one run folder.

    Args:
        run: The run folder.
        start_step: Lines of later steps, left by a run that was killed after its last checkpoint,
            are removed, so that a resumed run reads like one that was never stopped.
    """

    def __init__(self, run: Path, *, start_step: int = 0) -> None:
        # Imported here: it takes a second, and evaluation and embedding do without.
        from torch.utils.tensorboard.writer import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; numbers go to TensorBoard as ``event/name``."""
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


class Throughput:
    """Images and kept tokens per second of training steps, their waiting for data included.

    Evaluations and checkpoints between the steps do not count.
    """

    def __init__(self) -> None:
        self._seconds = self._waited = 0.0
        self._stats = BatchStats()

    def add(self, stats: BatchStats, *, waited: float, seconds: float) -> None:
        """Count a step's batch, the seconds it waited for it and the seconds it took in all."""
        self._stats = self._stats + stats
        self._waited += waited
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading and start again."""
        seconds = max(self._seconds, 1e-9)
        rates = {
            "images_per_second": self._stats.images / seconds,
            "tokens_per_second": self._stats.tokens / seconds,
            "padding": self._stats.padding,
            "data_wait": self._waited / seconds,
        }
        self._seconds, self._waited, self._stats = 0.0, 0.0, BatchStats()
        return rates
