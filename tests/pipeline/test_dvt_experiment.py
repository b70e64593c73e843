"""The ablation of the reuse modules runs, resumes where it stopped, and tells its results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.experiments.dvt import run
from benchmarks.experiments.dvt.__main__ import main
from benchmarks.experiments.dvt.data import NUM_CLASSES, draw_objects
from benchmarks.experiments.dvt.run import ARMS, QUICK, Result
from benchmarks.experiments.dvt.summary import format_table
from navit.dvt import exits_loss

ARGS = ["--quick", "--steps", "4"]


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_all_arms_run_and_a_second_call_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*ARGS, "--seeds", "2", "--folder", str(tmp_path)]
    assert main(args) == 0
    table = capsys.readouterr().out
    for arm in ARMS:
        assert f"| {arm.name} |" in table
    assert "75.7 % / 80.0 %" in table
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert {(row["arm"], row["seed"]) for row in results} == {
        (arm.name, seed) for arm in ARMS for seed in (0, 1)
    }
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.pt"))

    monkeypatch.setattr(run, "exits_loss", None)  # a step would fail
    assert main(args) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["results"] == results


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*ARGS, "--seeds", "1", "--folder"]
    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 2)
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    record = losses["whole"]

    def noting(logits: Any, labels: Tensor) -> Tensor:
        loss = exits_loss(logits, labels)
        record.append(loss.item())
        if record is losses["parts"] and len(record) == 4:  # in the fourth step, after a checkpoint
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(run, "exits_loss", noting)
    assert main([*args, str(tmp_path / "whole")]) == 0
    record = losses["parts"]
    assert main([*args, str(tmp_path / "parts")]) == 130
    assert "run the command again to go on" in capsys.readouterr().err
    assert main([*args, str(tmp_path / "parts")]) == 0
    whole, parts = losses["whole"], losses["parts"]
    assert parts[:4] + parts[6:] == whole, "steps 3 and 4 were done twice, the rest once"
    assert parts[4:6] == whole[2:4]


@pytest.mark.slow
def test_runs_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--seeds", "1", "--folder", str(tmp_path)]
    (tmp_path / "settings.json").write_text("{}")
    assert main([*ARGS, *folder]) == 2
    assert "must have the same settings" in capsys.readouterr().err


def test_drawn_objects_are_the_same_at_every_call_and_have_many_classes() -> None:
    first, again = (draw_objects(60, seed=1, progress=False) for _ in range(2))
    assert all((a["image"] == b["image"]).all() for a, b in zip(first, again, strict=True))
    labels = {sample["label"] for sample in first}
    assert len(labels) > 20
    assert labels <= set(range(NUM_CLASSES))
    assert len({sample["image"].shape for sample in first}) == 5


def test_the_table_pairs_differences_by_seed() -> None:
    def result(arm: str, seed: int, *accuracy: float) -> Result:
        return Result(arm, seed, accuracy, (1e6, 3e6), 0.1)

    table = format_table(
        [
            result("none", 0, 0.1, 0.2),
            result("none", 1, 0.3, 0.6),
            result("both", 0, 0.2, 0.3),
            result("both", 1, 0.4, 0.7),
        ]
    )
    assert "| none | 20.0% ± 14.1% | 40.0% ± 28.3% | 1.0 / 3.0 |" in table
    assert "<br>+10.0% ± 0.0%" in table
    assert QUICK.test_images < 100  # what `--quick` prints is no result
