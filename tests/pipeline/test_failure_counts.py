"""What a run that meets many bad samples counts, prints at its end, and when it stops instead."""

import tarfile
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from packer.errors import TooManyFailures
from packer.plan.place import Placement
from packer.stream import PackedStream
from packer.tally import tally_text
from tests.helpers.bad_input import (
    NEIGHBOURS,
    Members,
    P,
    between,
    check_neighbours,
    config,
    good,
    image,
    members_of,
    outcome,
    stream,
    write_tar,
)
from tests.helpers.damage import png_that_claims
from tests.helpers.samples import BROKEN, cut_png, drain, png


def shards_with_every_defect(folder: Path) -> list[str]:
    """Write five shards that hold one of each defect, and nine good samples."""
    bad: Members = []
    for key, sample in {
        "b0": image(BROKEN),
        "b1": image(png_that_claims(60_000, 60_000)),
        "b2": image(png(1, 50)),
        "b3": {"image": png(P, P)},
    }.items():
        bad += members_of({"key": key} | sample)
    bad += [("b4.txt", b"no image"), ("b5.png", png(P, P)), ("b5.txt", b"caf\xe9")]
    first = write_tar(folder / "samples.tar", between([*bad, *members_of(good("a0"))]))
    shards = [first]
    for i, name in enumerate(("cut", "corrupt", "open", "gone"), 1):
        members = [m for j in range(2) for m in members_of(good(f"{name}{i}{j}"))]
        shards.append(write_tar(folder / f"{name}.tar", members))
    with tarfile.open(shards[1]) as tar:  # the others have the same layout
        second, end = tar.getmember("cut11.txt").offset, tar.offset
    path = Path(shards[1])
    path.write_bytes(path.read_bytes()[: second + 100])
    path = Path(shards[2])
    path.write_bytes(path.read_bytes()[:second] + bytes([1]) * 1024)
    path = Path(shards[3])
    path.write_bytes(path.read_bytes()[:end])
    return shards


@pytest.mark.parametrize("workers", [0, 2])
def test_the_table_at_the_end_of_a_run_counts_every_sample_by_cause(
    tmp_path: Path, workers: int
) -> None:
    shards = shards_with_every_defect(tmp_path)
    opened = PackedStream(
        shards, config(max_aspect_ratio=40.0), sequences_per_batch=2, epochs=1, num_streams=2
    )
    Path(shards[-1]).unlink()
    found = outcome(drain(DataLoader(opened, batch_size=None, num_workers=workers)))

    assert found.images.keys() == {*NEIGHBOURS, "b5", "cut10", "corrupt20", "open30", "open31"}
    assert found.stats.skipped == {
        "decode_error": 1,
        "too_many_pixels": 1,
        "aspect_ratio": 1,
        "missing_image": 1,
        "missing_caption": 1,
        "duplicate_key": 1,
        "truncated_shard": 1,
        "corrupt_shard": 1,
        "missing_shard": 1,
    }
    assert found.stats.noted == {"caption_replaced": 1, "unterminated_shard": 1}
    table = [line.split()[:3] for line in tally_text(found.stats).splitlines()]
    assert table[:3] == [
        ["samples", "read", "18"],
        ["images", "kept", "9"],
        ["skipped", "9", "50.000"],
    ]
    assert {row[0]: int(row[1]) for row in table[3:12]} == found.stats.skipped
    assert table[12][:2] == ["noted", "2"]
    assert {row[0]: int(row[1]) for row in table[13:15]} == found.stats.noted


# Too many in a row


def all_bad(folder: Path, kind: str) -> list[str]:
    """Two shards of a good sample and many bad ones."""
    bad = {"image": png(P, P), "caption": "b"}
    bad |= {
        "header": image(BROKEN),
        "pixels": {"image": cut_png(P, P)},
        "caption": {"caption": None},
    }.get(kind, {})
    shards = []
    for i in range(4):
        members = members_of(good(f"a{i}"))
        for j in range(6):
            members += members_of(bad | {"key": f"b{i}{j}"})
        shards.append(write_tar(folder / f"shard-{i}.tar", members))
    return shards


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("header", r"shard-0.tar/b04 \(decode_error: OSError: Truncated File Read"),
        ("pixels", r"shard-0.tar/b0\d \(decode_error: OSError: image file is truncated"),
        ("caption", r"shard-0.tar/b04 \(missing_caption: members: jpg"),
        ("shard", r"missing_shard: \S*/shard-4.tar: .*No such file"),
    ],
    ids=["header", "pixels", "caption", "shard"],
)
def test_after_k_in_a_row_a_run_ends_with_a_message_that_names_shard_and_key(
    tmp_path: Path, kind: str, named: str, workers: int
) -> None:
    shards = all_bad(tmp_path, kind)
    if kind == "shard":
        shards = [write_tar(tmp_path / f"shard-{i}.tar", members_of(good("a0"))) for i in range(9)]
    placement = Placement("next_fit")
    opened = PackedStream(
        shards,
        config(max_failures_in_row=5, seq_len=4, placement=placement),
        sequences_per_batch=1,
        shuffle_shards=False,
    )
    if kind == "shard":
        for path in shards:
            Path(path).unlink()
    with pytest.raises(TooManyFailures, match="fewer than 5 samples in a row .*" + named) as caught:
        drain(DataLoader(opened, batch_size=None, num_workers=workers))
    assert "raise max_failures_in_row" in str(caught.value)


@pytest.mark.parametrize("kind", ["header", "pixels", "caption"])
def test_a_good_sample_between_them_resets_the_count(tmp_path: Path, kind: str) -> None:
    """Six bad ones in a row, four times: K = 7 lets them pass, and each is counted."""
    placement = Placement("next_fit")
    found = stream(all_bad(tmp_path, kind), config(max_failures_in_row=7, placement=placement))
    assert found.stats.samples_read == 28
    cause = "missing_caption" if kind == "caption" else "decode_error"
    assert found.stats.skipped == {cause: 24}
    check_neighbours(found, [f"a{i}" for i in range(4)])
