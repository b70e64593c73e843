"""Masked prediction and fine-tuning at twice the resolution run, resume, and tell their results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments.vit import run
from benchmarks.experiments.vit.__main__ import main
from benchmarks.experiments.vit.measure import histograms
from benchmarks.experiments.vit.run import Result
from benchmarks.experiments.vit.summary import draw, format_tables
from tests.helpers.batches import pack_images, random_images


@pytest.mark.slow
def test_both_experiments_run_and_a_second_call_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    args = ["--quick", "--seeds", "2", "--folder", str(tmp_path / "runs")]
    args += ["--data", str(tmp_path / "data")]
    try:
        assert main(args) == 0
        table = capsys.readouterr().out
        assert "the numbers mean nothing" in table
        for arm in ("random weights", "masked prediction", "144, interpolated", "36 tokens"):
            assert f"| {arm} |" in table
        results = json.loads((tmp_path / "runs" / "summary.json").read_text())["results"]
        assert len(results) == 2 * (3 + 6)

        def fails(*given: Any) -> None:
            raise AssertionError("nothing is left to train")

        monkeypatch.setattr(run, "train", fails)
        assert main(args) == 0
        assert json.loads((tmp_path / "runs" / "summary.json").read_text())["results"] == results
    finally:
        torch.set_num_threads(threads)


def test_differences_are_paired_by_seed_and_every_run_is_drawn(tmp_path: Path) -> None:
    results = [
        Result("masked", arm, seed, steps, {"colour": accuracy + 0.1 * seed, "fill": 0.5})
        for seed in (0, 1)
        for arm, accuracy, steps in (("random weights", 0.2, 0), ("masked prediction", 0.25, 9))
    ]
    table = format_tables(results)
    assert "| arm | steps | colour | fill |" in table
    assert "| random weights | 0 | 25.0% ± 7.1% | 50.0% ± 0.0% |" in table
    assert "| masked prediction | 9 | 30.0% ± 7.1%<br>+5.0% ± 0.0% |" in table
    assert "classifiers" not in table
    assert draw(results, tmp_path / "accuracy.png").stat().st_size > 10_000


def test_a_histogram_counts_the_colours_of_an_image_alone() -> None:
    images = random_images(5, seed=0, patch_size=4)
    together = histograms(pack_images(images, patch_size=4, seq_len=30))
    alone = torch.cat([histograms(pack_images([image], patch_size=4)) for image in images])
    assert torch.equal(together, alone)
    torch.testing.assert_close(together.sum(1), torch.ones(5))
