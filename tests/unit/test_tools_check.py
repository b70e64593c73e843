"""`python -m packer check` says exactly what a stream would skip, and where."""

import logging
import re
import tarfile
from dataclasses import replace
from functools import reduce
from io import BytesIO
from operator import add
from pathlib import Path
from typing import Any

import pytest

from packer.__main__ import main
from packer.batch import BatchStats
from packer.config import PackerConfig
from packer.stream import PackedStream
from packer.tools.check import check_shard
from tests.helpers.samples import BROKEN, cut_png, png

MEMBERS = [
    ("good", {"png": png(16, 24), "txt": b"fine"}),
    ("broken", {"jpg": BROKEN, "txt": b"no image"}),
    ("cut", {"png": cut_png(), "txt": b"its pixels are cut"}),
    ("silent", {"png": png(16, 16)}),
    ("empty", {"png": png(16, 16), "txt": b"  "}),
    ("blind", {"txt": b"no image at all"}),
    ("strip", {"png": png(8, 240), "txt": b"a strip"}),
    ("latin", {"png": png(16, 16), "txt": "caf\xe9".encode("latin-1")}),
    ("good", {"png": png(16, 16), "txt": b"the key comes twice"}),
    ("large", {"png": png(80, 80), "txt": b"large"}),
    ("last", {"png": png(24, 16), "txt": b"fine too"}),
]
CONFIG = PackerConfig(
    patch_size=8, seq_len=64, max_pixels=6000, max_aspect_ratio=20.0, max_failures_in_row=99
)
OPTIONS = ["--max-pixels", "6000", "--max-aspect-ratio", "20"]


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """A clean shard, one with a defect of every kind, and one cut inside a sample."""
    clean = write_tar(tmp_path / "a.tar", MEMBERS[:1])
    bad = write_tar(tmp_path / "b.tar", MEMBERS)
    cut = Path(write_tar(tmp_path / "c.tar", [MEMBERS[0], MEMBERS[-1]]))
    with tarfile.open(cut) as tar:
        inside = tar.getmember("last.png").offset_data + 100
    cut.write_bytes(cut.read_bytes()[:inside])
    return [clean, bad, str(cut)]


def streamed(shards: list[str], config: PackerConfig, need: Any) -> BatchStats:
    stream = PackedStream(
        shards, config, sequences_per_batch=2, need=need, epochs=1, num_streams=1, rank=0
    )
    return reduce(add, (batch.stats for batch in stream))


@pytest.mark.parametrize("need", ["caption", "label", None])
def test_it_counts_what_a_stream_counts(shards: list[str], need: Any) -> None:
    """Sample by sample and cause by cause, with decoding."""
    # Without need a batch decides whether a caption is missing: where others in it have one.
    config = CONFIG if need else replace(CONFIG, missing_caption="keep")
    checks = [check_shard(shard, config=config, need=need, decode=True) for shard in shards]
    checked = reduce(add, (check.stats for check in checks))
    real = streamed(shards, config, need)
    assert checked.samples_read == real.samples_read
    assert checked.skipped == real.skipped
    assert checked.noted == real.noted
    assert checked.images == real.images
    assert checked.images + sum(checked.skipped.values()) == checked.samples_read


def test_without_decoding_only_headers_are_judged(shards: list[str]) -> None:
    headers, pixels = (
        check_shard(shards[1], config=CONFIG, need="caption", decode=decode).stats.skipped
        for decode in (False, True)
    )
    assert dict(pixels) == {**headers, "decode_error": headers["decode_error"] + 1}


def test_every_cause_is_named_with_shard_and_key(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *shards, "--decode", *OPTIONS]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r"^3 shard\(s\) read, 1 of them without a defect", out)
    expected = {
        "decode_error": ["b.tar/broken", "b.tar/cut"],
        "missing_caption": ["b.tar/silent", "b.tar/empty"],
        "missing_image": ["b.tar/blind"],
        "aspect_ratio": ["b.tar/strip"],
        "too_many_pixels": ["b.tar/large"],
        "duplicate_key": ["good"],
        "truncated_shard": ["c.tar"],
        "caption_replaced": ["b.tar/latin"],
    }
    for cause, places in expected.items():
        block = re.search(rf"^{cause}: (\d+).*\n((?:  .*\n?)+)", out, re.MULTILINE)
        assert block, cause
        assert [place for place in places if place not in block[2]] == []


def test_a_clean_set_ends_with_status_0_and_nothing_to_name(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", shards[0], "--decode"]) == 0
    out = capsys.readouterr().out
    assert "1 shard(s) read, 1 of them without a defect" in out
    assert "decode_error" not in out


def test_only_the_first_of_a_cause_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [(f"{i:02d}", {"jpg": BROKEN, "txt": b"x"}) for i in range(7)]
    paths = [write_tar(tmp_path / f"{name}.tar", samples) for name in "ab"]
    assert main(["check", *paths, "--first", "2"]) == 1
    out = capsys.readouterr().out
    assert "decode_error: 14, the first 2" in out
    assert len(re.findall(r"^  [ab]\.tar/0", out, re.MULTILINE)) == 2


def test_more_failures_in_a_row_than_a_run_endures_are_all_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(str(i), {"jpg": BROKEN}) for i in range(150)])
    check = check_shard(path, config=PackerConfig(), need=None, decode=False, first=1)
    assert check.stats.skipped == {"decode_error": 150}
    assert [finding.where for finding in check.findings] == ["a.tar/0"]


@pytest.mark.slow
def test_several_processes_find_the_same(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for workers in ("1", "2"):
        assert main(["check", *shards, "--decode", "--workers", workers, *OPTIONS]) == 1
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_log_is_as_it_was_before(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Findings are collected from the log; what others set up there must survive."""
    logger = logging.getLogger("packer")
    before = list(logger.handlers), logger.propagate
    check_shard(shards[1], config=CONFIG, need=None, decode=False)
    assert (list(logger.handlers), logger.propagate) == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one tar shard"),
        (["nowhere.tar"], "does not"),
        (["a.tar", "--first", "-1"], "must not be negative"),
        (["a.tar", "--workers", "0"], "workers must be at least 1"),
    ],
)
def test_wrong_settings_end_with_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", MEMBERS[:1])
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err
