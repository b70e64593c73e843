import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.batch import BatchStats
from packer.errors import CAUSES, NOTED_CAUSES
from packer.tally import tally_text

SOURCES = sorted((Path(__file__).parents[2] / "packer").rglob("*.py"))
COUNTING = {"SkipSample": 0, "Defect": 0, "on_problem": 0, "note": 0, "_ended": 1}
"""Functions and exceptions that take a cause, and its place among their arguments."""

counts = st.integers(0, 10**9)
by_cause = st.dictionaries(st.sampled_from([*CAUSES, "of_another"]), counts)


def causes_in_the_code() -> Iterator[str]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = node.args[COUNTING[name] :][:1] if name in COUNTING else []
                yield from (cause.value for cause in given if isinstance(cause, ast.Constant))


def test_every_cause_in_the_code_is_explained_and_no_other() -> None:
    assert set(causes_in_the_code()) == set(CAUSES)
    assert set(CAUSES) >= NOTED_CAUSES
    assert all(CAUSES.values())


def test_a_table_says_what_became_of_every_sample() -> None:
    first = BatchStats(
        samples_read=12_345, images=12_000, tokens=300, tokens_before_drop=400, places=400
    )
    second = BatchStats(
        skipped={"missing_caption": 45, "decode_error": 290}, noted={"caption_replaced": 2}
    )
    assert tally_text(first + second).splitlines() == [
        "samples read                12,345",
        "images kept                 12,000  97.205 %",
        "images waiting                  10   0.081 %  read, not yet in a batch",
        "skipped                        335   2.714 %",
        "  decode_error                 290   2.349 %  no image, or one that is damaged",
        "  missing_caption               45   0.365 %  no caption, or an empty one",
        "noted                            2   0.016 %  defects that cost no sample",
        "  caption_replaced               2   0.016 %  caption not UTF-8, bytes replaced",
        "padding                        100  25.000 %  of all token places",
        "tokens dropped                 100  25.000 %  of the images' tokens",
    ]


@given(skipped=by_cause, noted=by_cause, images=counts, tokens=counts, filled=counts)
def test_a_table_fits_80_columns_and_has_every_count(
    skipped: dict[str, int], noted: dict[str, int], images: int, tokens: int, filled: int
) -> None:
    stats = BatchStats(
        samples_read=images + sum(skipped.values()) + sum(noted.values()),
        images=images,
        tokens=tokens,
        tokens_before_drop=2 * tokens,
        tokens_filled=min(filled, tokens),
        places=2 * tokens,
        skipped=skipped,
        noted=noted,
    )
    lines = tally_text(stats).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines == [line.rstrip() for line in lines]
    for cause, count in [*skipped.items(), *noted.items()]:
        found = [line.split() for line in lines if line.split()[0] == cause]
        assert not count or f"{count:,}" in [words[1] for words in found]
    assert any(line.startswith("images waiting") for line in lines) == any(noted.values())


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0.000 %"), (4, "<0.001 %"), (5, "0.001 %"), (10**6, "100.000 %")]
)
def test_a_share_too_small_to_show_is_not_shown_as_none(count: int, shown: str) -> None:
    line = tally_text(BatchStats(samples_read=10**6, images=count)).splitlines()[1]
    assert line.split()[3:] == shown.split()


def test_an_empty_run_has_a_table() -> None:
    assert [line.split() for line in tally_text(BatchStats()).splitlines()] == [
        ["samples", "read", "0"],
        ["images", "kept", "0"],
        ["skipped", "0"],
    ]
