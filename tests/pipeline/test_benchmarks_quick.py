"""Every benchmark runs, on tiny inputs: a figure that cannot be measured again is no figure."""

import json
import math
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as suite
from benchmarks import bench_image_path, peers
from benchmarks.harness import Paired, paired_ratio


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


SLOW = {"scale", "step", "loader", "flexi", "cascade", "vectors"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in suite.BENCHMARKS
    ],
)
def test_a_benchmark_runs_quick_and_prints_a_table(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine a second thread spins for its turn and multiplies the time.
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_threads(1))
    torch.set_num_threads(1)
    try:
        measured = suite.main([name, "--quick"], results=tmp_path)
    finally:
        set_threads(threads)
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
    fakes["loader"] = suite.Benchmark(
        lambda quick, photos: fake(quick), "nothing", reads_photos=True
    )
    monkeypatch.setattr(suite, "BENCHMARKS", fakes)
    suite.main(["loss", "--no-store"], results=tmp_path)
    assert not list(tmp_path.iterdir())

    suite.main(["loss", "towers", "loss"], results=tmp_path)
    assert "[2/2] towers" in capsys.readouterr().out
    stored = sorted(tmp_path.iterdir())
    assert [path.stem.rsplit("_", 1)[-1] for path in stored] == ["loss", "towers"]
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


def test_programs_that_time_themselves_are_compared_by_what_they_return() -> None:
    found = paired_ratio(lambda: 3.0, lambda: 2.0, pairs=2, self_timed=True)
    assert (found.ratio, found.aa_ratio) == (1.5, 1.0)
    assert (found.seconds_a, found.seconds_b) == (3.0, 2.0)


def jpeg(size: tuple[int, int], orientation: int = 1, mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), 9).convert(mode).save(
        buffer, "JPEG", exif=exif
    )
    return buffer.getvalue()


def test_photographs_and_figures_of_original_size_are_measured_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {
        "0.jpg": jpeg((70, 50)),
        "0.json": json.dumps({"set": "openstax", "bytes": "original"}).encode(),
        "1.jpg": jpeg((40, 60)),
        "1.json": json.dumps({"set": "caltech101", "bytes": "original"}).encode(),
        "2.jpg": jpeg((90, 90)),
        "2.json": json.dumps({"set": "caltech101", "bytes": "scaled"}).encode(),
        "3.txt": b"not an image",
    }
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg((48, 32)))
    (folder / "turned.jpg").write_bytes(jpeg((48, 33), orientation=6))
    (folder / "grey.jpg").write_bytes(jpeg((48, 34), mode="L"))
    (folder / "broken.jpg").write_bytes(b"nothing")

    threads = torch.get_num_threads()
    rows = bench_image_path.run(quick=True, photos=[tmp_path / "pairs.tar", folder])

    assert torch.get_num_threads() == threads
    found = {(row["kind"], row["max_tokens"]): row["images"] for row in rows}
    counts = {"photographs": 2, "figures": 1}
    assert found == {(kind, n): counts[kind] for kind in counts for n in (64, 256, 1024)}
    check_rows(rows)
    # Peers are measured where they are installed, and named where they are not.
    told = capsys.readouterr().out
    for name, package in peers.PREPARERS.items():
        assert (f"speed_to_{name}" in rows[0]) == peers.is_there(package)
        assert peers.is_there(package) or package in told.splitlines()[0]
    with pytest.raises(ValueError, match="must hold RGB JPEGs of original size"):
        bench_image_path.run(quick=True, photos=[tmp_path])
