"""Run folders written by hand: what `navit train` leaves behind, without training."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from navit.serialize import to_plain
from navit.train.config import TrainConfig, demo


def write_run(
    folder: Path,
    records: Iterable[Mapping[str, Any]] = (),
    *,
    config: TrainConfig | Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    pictures: Iterable[str] = (),
    tail: str = "",
) -> Path:
    """Write a run folder.

    Args:
        folder: Created.
        records: Lines of metrics.jsonl.
        config: Written as config.json; None: the demonstration run's.
        result: Written as result.json, unless None.
        pictures: Names of small PNGs.
        tail: Text after the last line of metrics.jsonl, such as a cut line.
    """
    folder.mkdir(parents=True)
    plain = to_plain(demo() if config is None else config)
    (folder / "config.json").write_text(json.dumps(plain))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    for name in pictures:
        Image.new("RGB", (8, 6), "green").save(folder / name)
    return folder


def records_of(
    steps: int, *, images: int = 10, rate: float = 5.0, every: int = 10, recall: float = 0.5
) -> list[dict[str, Any]]:
    """Return the records of a run at a constant speed that is evaluated at every reading.

    Recall rises linearly to ``recall``; loss falls from 2 towards 1.
    """
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        train = {"loss": 1 + 1 / step, "lr": 1e-3, "gradient_norm": 0.5, "images": images}
        records.append({"event": "train", "step": step, **train})
        if step % every == 0:
            speeds = {"images_per_second": rate, "tokens_per_second": 7 * rate}
            speeds |= {"flops_per_second": 1e9 * rate}
            shares = {"padding": 0.001, "data_wait": 0.02, "drop_rate": 0.5}
            records.append({"event": "rates", "step": step, **speeds, **shares})
            found = {"text_to_image/recall@1": recall * step / steps}
            found |= {"chance/text_to_image/recall@1": 0.002}
            records.append({"event": "eval", "step": step, **found})
    return records
