from pathlib import Path

import pytest

from navit.train.metrics import MetricsLog, Throughput, read_metrics
from packer import BatchStats


def test_lines_are_read_back_and_events_are_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, {"loss": 2.5})
        log.write("bad_loss", 2, {"keys": ["a", "b"]})

    assert read_metrics(log.path) == [
        {"event": "train", "step": 1, "loss": 2.5},
        {"event": "bad_loss", "step": 2, "keys": ["a", "b"]},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_resumed_log_forgets_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write("train", step, {"loss": step})
    with log.path.open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')  # cut by a kill

    with MetricsLog(tmp_path, start_step=3) as log:
        log.write("train", 4, {"loss": 40})

    assert [(line["step"], line["loss"]) for line in read_metrics(log.path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_rates_are_counts_over_the_seconds_of_the_steps_since_the_last_reading() -> None:
    timed = Throughput()
    timed.add(BatchStats(images=10, tokens=90, places=100), waited=0.5, seconds=1.0)
    timed.add(BatchStats(images=10, tokens=100, places=100), waited=0.5, seconds=1.0)

    first = timed.read()
    timed.add(BatchStats(images=4, tokens=100, places=100), waited=0.0, seconds=4.0)

    assert first == pytest.approx(
        {"images_per_second": 10, "tokens_per_second": 95, "padding": 0.05, "data_wait": 0.5}
    )
    assert timed.read() == pytest.approx(
        {"images_per_second": 1, "tokens_per_second": 25, "padding": 0, "data_wait": 0}
    )
