"""Every benchmark runs, on tiny inputs: a figure that cannot be measured again is no figure."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks.harness import Paired


def check_rows(rows: list[dict[str, Any]]) -> None:
    assert rows
    assert any(isinstance(value, Paired) for row in rows for value in row.values())
    for row in rows:
        for value in row.values():
            if isinstance(value, Paired):
                assert 0 < value.low <= value.ratio <= value.high < math.inf
                assert 0 < value.aa_low <= value.aa_ratio <= value.aa_high < math.inf
            elif isinstance(value, float):
                assert math.isfinite(value)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_a_benchmark_runs_quick_and_prints_a_table(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine a second thread spins for its turn and multiplies the time.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    measured = suite.main([name, "--quick"], results=tmp_path)
    assert list(measured) == [name]
    check_rows(measured[name])
    assert not list(tmp_path.iterdir()), "tiny inputs give no result worth storing"
    lines = capsys.readouterr().out.splitlines()
    progress = next(index for index, line in enumerate(lines) if line.startswith(f"[1/1] {name}: "))
    # A heading, at least one row, and the time it took.
    assert len(lines) - progress >= 4
    assert lines[-1].startswith(f"{name}: ")


def fake(quick: bool = False) -> list[dict[str, Any]]:
    paired = Paired(0.5, 0.4, 0.6, 1.0, 0.9, 1.1, 0.2, 0.4, 10)
    return [{"what": what, "images": 8, "time": paired} for what in ("a", "b")]


def test_a_full_run_stores_rows_with_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = {name: suite.Benchmark(fake, "nothing") for name in suite.BENCHMARKS}
    fakes["image_path"] = suite.Benchmark(lambda quick, photos: fake(quick), "nothing")
    monkeypatch.setattr(suite, "BENCHMARKS", fakes)
    suite.main(["loss", "--no-store"], results=tmp_path)
    assert not list(tmp_path.iterdir())

    suite.main(["loss", "model", "loss"], results=tmp_path)
    assert "[2/2] model" in capsys.readouterr().out
    stored = sorted(tmp_path.iterdir())
    assert [path.stem.rsplit("_", 1)[-1] for path in stored] == ["loss", "model"]
    content = json.loads(stored[0].read_text())
    assert content["rows"][1]["time"]["ratio"] == 0.5
    assert {"command", "commit", "date", "device", "threads", "versions"} <= set(
        content["environment"]
    )

    suite.main([], results=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(fakes)


def test_an_unknown_benchmark_is_refused_with_the_names_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        suite.main(["speed"])
    told = capsys.readouterr().err
    assert all(name in told for name in suite.BENCHMARKS)


def test_a_table_says_once_what_all_rows_share() -> None:
    shown = suite.format_rows(fake()).splitlines()
    assert shown[0] == "images 8, time 0.500 (0.40..0.60; A/A 0.90..1.10)"
    assert [line.strip() for line in shown[1:]] == ["what", "a", "b"]
