from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from navit.train.metrics import MetricsLog, Throughput, memory_mib, read_metrics
from navit.train.ranks import World, alone
from packer import BatchStats

CPU = torch.device("cpu")


class Gathered(World):
    """A rank among others whose values are given."""

    def gather(self, value: Any) -> list[Any]:
        """Return this rank's value with those of a twin whose steps took half the time."""
        usage, peak, memory = value
        twin = type(usage)(usage.stats, usage.waited, usage.seconds / 2, 2 * usage.flops)
        return [value, (twin, peak, {"rss_mib": memory["rss_mib"] + 1})]


def test_lines_are_read_back_and_events_are_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, {"loss": 2.5, "images": 3})
        log.write("bad_loss", 2, {"keys": ["a", "b"]})
        log.write("train", 3, {"loss": 1.25})

    assert read_metrics(log.path) == [
        {"event": "train", "step": 1, "loss": 2.5, "images": 3},
        {"event": "bad_loss", "step": 2, "keys": ["a", "b"]},
        {"event": "train", "step": 3, "loss": 1.25},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curves = {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert curves == {"train/loss": [(1, 2.5), (3, 1.25)], "train/images": [(1, 3.0)]}


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


def test_a_log_that_is_not_enabled_leaves_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", enabled=False) as log:
        log.write("train", 1, {"loss": 1.0})

    assert list(tmp_path.iterdir()) == []


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_rates_are_counts_over_the_seconds_of_the_steps_since_the_last_reading() -> None:
    timed = Throughput(alone(CPU), peak=1000.0)
    counts = {"images": 10, "places": 100, "tokens_before_drop": 125}
    timed.add(BatchStats(tokens=90, **counts), waited=0.5, seconds=1.0, flops=400)
    timed.add(BatchStats(tokens=100, **counts), waited=0.5, seconds=1.0, flops=600)

    first = timed.read()
    timed.add(BatchStats(images=4, tokens=100, places=100), waited=0.0, seconds=4.0)
    second = timed.read()

    assert first.pop("rss_mib") > 1
    assert first == pytest.approx(
        {
            "images_per_second": 10,
            "tokens_per_second": 95,
            "padding": 0.05,
            "drop_rate": 0.24,
            "data_wait": 0.5,
            "flops_per_second": 500,
            "mfu": 0.5,
        }
    )
    assert (second["images_per_second"], second["tokens_per_second"]) == (1, 25)
    assert (second["padding"], second["data_wait"], second["mfu"]) == (0, 0, 0)


def test_rates_of_several_ranks_are_those_of_all_together() -> None:
    timed = Throughput(Gathered(0, 2, 0, CPU, None), peak=1000.0)
    counts = {"images": 10, "places": 100, "tokens_before_drop": 100}
    timed.add(BatchStats(tokens=80, **counts), waited=0.5, seconds=4.0, flops=1500)

    rates = timed.read()

    assert rates["images_per_second"] == pytest.approx(20 / 3)  # in 3 seconds on average
    assert rates["tokens_per_second"] == pytest.approx(160 / 3)
    assert (rates["padding"], rates["drop_rate"]) == pytest.approx((0.2, 0.2))
    assert rates["data_wait"] == pytest.approx(1 / 6)
    assert rates["mfu"] == pytest.approx(4500 / 3 / 2000)
    assert rates["rss_mib"] == pytest.approx(memory_mib(CPU)["rss_mib"] + 1, abs=50)


def test_without_a_peak_there_is_no_utilization() -> None:
    timed = Throughput(alone(CPU))
    timed.add(BatchStats(images=1, tokens=1, places=1), waited=0.0, seconds=1.0, flops=5)

    assert "mfu" not in timed.read()
