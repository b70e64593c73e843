"""SIGKILL at random moments, checkpoint writes among them, costs nothing but the steps redone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from navit.train.checkpoint import find_checkpoint, load_tensors, read_state, stored_tensors
from navit.train.metrics import read_metrics
from tests.helpers.launches import kill_at_random
from tests.helpers.samples import image_samples, make_shards


def everything(run: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """Read the newest checkpoint: model, average and optimizer; and all of its state but names."""
    path = find_checkpoint(run)
    tensors = {
        group: {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in infos.items()}
        for group, infos in stored_tensors(path).items()
    }
    load_tensors(path, tensors)
    return tensors, {name: value for name, value in read_state(path).items() if name != "config"}


def check(folder: Path, kills: int, steps: int) -> list[str]:
    shards = make_shards(folder / "shards", image_samples(48), 12)
    options = ("--steps", str(steps), "--checkpoint-every", "2")

    met = kill_at_random(folder, shards, *options, kills=kills, timeout=600)

    tensors, state = everything(folder / "killed")
    expected_tensors, expected_state = everything(folder / "undisturbed")
    assert {"model", "ema", "optimizer"} == set(tensors)
    torch.testing.assert_close(tensors, expected_tensors, rtol=0, atol=0)
    assert state == expected_state
    lines, expected_lines = (
        [line for line in read_metrics(folder / name / "metrics.jsonl") if line["event"] == "train"]
        for name in ("killed", "undisturbed")
    )
    assert lines == expected_lines
    assert len(lines) == steps
    return met


def test_a_run_killed_3_times_ends_with_the_weights_of_one_never_stopped(tmp_path: Path) -> None:
    check(tmp_path, kills=3, steps=16)


@pytest.mark.slow
def test_a_run_killed_30_times_ends_with_the_weights_of_one_never_stopped(tmp_path: Path) -> None:
    met = check(tmp_path, kills=30, steps=120)

    assert met.count("saving") >= 5, met
    assert met.count("steps") >= 5, met
