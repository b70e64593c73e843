"""The tables of a report: differences, costs and counts of runs side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit.report.compare import (
    difference_rows,
    flatten,
    goals,
    setting_rows,
    skipped_rows,
    stats_rows,
    summary_rows,
)
from navit.report.looks import NONE
from navit.report.read import read_run
from navit.report.runs import Progress, Run, Series
from navit.serialize import to_plain
from navit.train.config import TrainConfig, demo
from packer.plan.drop import BetaDrop
from tests.helpers.run_folders import records_of, write_run

RECALL = "text_to_image/recall@1"


def with_config(name: str, config: TrainConfig) -> Run:
    return Run(name, Path(name), config=to_plain(config))


def evaluated(name: str, values: list[float], *, images_a_step: int = 1) -> Run:
    """A run evaluated at steps 10, 20, ..."""
    steps = 10.0 * np.arange(1, len(values) + 1)
    every = np.arange(10 * len(values) + 1, dtype=float)
    progress = Progress(every, {"step": every, "images": every * images_a_step})
    return Run(name, Path(name), evals={RECALL: Series(steps, np.array(values))}, progress=progress)


def test_only_settings_that_differ_are_listed() -> None:
    base = demo()
    other = replace(
        base, seed=1, packer=replace(base.packer, token_drop=BetaDrop(0.25, 0.4)), run=Path("x")
    )
    rows = {
        r.title: r.cells for r in difference_rows([with_config("a", base), with_config("b", other)])
    }
    assert rows == {
        "packer.token_drop": ("ConstantDrop", "BetaDrop"),
        "packer.token_drop.drop_rate": ("0.3", NONE),
        "packer.token_drop.mean": (NONE, "0.25"),
        "packer.token_drop.maximum": (NONE, "0.4"),
        "seed": ("0", "1"),
    }


def test_a_setting_that_a_run_was_made_before_has_its_default() -> None:
    new = with_config("new", replace(demo(), seed=1))
    older = dict(with_config("a", demo()).config)
    del older["corruption"], older["teacher"]
    old = replace(new, name="old", config=older)
    assert [row.title for row in difference_rows([old, new])] == ["seed"]
    unknown = replace(new, name="unknown", config={**older, "never_there": 3})
    assert "teacher" in [row.title for row in difference_rows([unknown, new])]


def test_a_run_without_a_configuration_differs_in_nothing() -> None:
    runs = [with_config("a", demo()), Run("b", Path("b"))]
    assert difference_rows(runs) == []
    assert difference_rows([*runs, with_config("c", replace(demo(), seed=1))])[0].cells == (
        "0", NONE, "1",
    )  # fmt: skip


def test_all_settings_are_there_once_and_parts_follow_what_they_are_part_of() -> None:
    runs = [with_config("a", demo())]
    names = [row.title for row in setting_rows(runs)]
    assert len(names) == len(set(names)) == len(flatten(runs[0].config))
    assert names.index("packer.token_drop.drop_rate") == names.index("packer.token_drop") + 1


@given(
    a=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    b=st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
def test_a_cost_is_that_of_the_first_evaluation_at_or_beyond_the_quality(
    a: list[float], b: list[float]
) -> None:
    runs = [evaluated("a", a, images_a_step=3), evaluated("b", b)]
    for goal in goals(runs, RECALL):
        for values, cost, images in ((a, goal.costs[0], 3), (b, goal.costs[1], 1)):
            there = [i for i, value in enumerate(values) if value >= goal.value]
            if not there:
                assert cost is None
            else:
                assert cost == {"step": 10 * (there[0] + 1), "images": images * 10 * (there[0] + 1)}
    assert any(goal.value == max(a) for goal in goals(runs, RECALL))


def test_where_less_is_better_the_goal_is_to_come_below() -> None:
    run = replace(evaluated("a", [3.0, 1.0, 2.0]))
    run = replace(run, evals={"val/loss": run.evals[RECALL]})
    (goal,) = goals([run], "val/loss")
    assert goal.value == 1.0
    assert goal.costs[0] is not None
    assert goal.costs[0]["step"] == 20


def cell(runs: list[Run], title: str) -> tuple[str, ...]:
    return next(row.cells for row in summary_rows(runs) if row.title == title)


def test_the_summary_says_what_the_folders_say(tmp_path: Path) -> None:
    fast = write_run(tmp_path / "fast", records_of(20, rate=10.0, recall=0.4))
    slow = write_run(tmp_path / "slow", records_of(20, rate=5.0, recall=0.6))
    runs = [read_run(fast, "fast"), read_run(slow, "slow")]
    assert cell(runs, "Images seen") == ("200", "200")
    assert cell(runs, "Kept tokens") == ("1,400", "1,400")
    assert cell(runs, "Model FLOPs") == ("200 GFLOP", "200 GFLOP")
    assert cell(runs, "Time of steps") == ("20 s", "40 s")
    assert cell(runs, "Images/s") == ("10", "5")
    assert cell(runs, "Text to image: recall@1, last") == ("40.0 %", "60.0 %")
    assert cell(runs, "Text to image: recall@1, best at step") == ("40.0 % at 20", "60.0 % at 20")
    assert cell(runs, "Tokens dropped") == ("50.0 %", "50.0 %")
    best = {row.title: row.best for row in summary_rows(runs)}
    assert best["Images/s"] == {0}
    assert best["Text to image: recall@1, last"] == {1}
    assert best["Padding"] == frozenset(), "equal values: none is best"


def counted(stats: dict[str, Any]) -> Run:
    return Run("run", Path("run"), stats=stats)


def test_skipped_samples_are_counted_by_cause_with_its_meaning() -> None:
    first = counted({"skipped": {"decode_error": 3}, "noted": {"caption_replaced": 1}})
    second = counted({"skipped": {"aspect_ratio": 2, "new_cause": 1}, "noted": {}})
    rows = {row.title: row for row in skipped_rows([first, second, counted({})])}
    assert rows["decode_error"].cells == ("3", "0", NONE)
    assert rows["aspect_ratio"].cells == ("0", "2", NONE)
    assert rows["new_cause"].cells == ("0", "1", NONE)
    assert rows["caption_replaced"].remark.startswith("kept, noted: ")
    assert rows["decode_error"].remark == "skipped: no image, or one that is damaged"


@pytest.mark.parametrize("stats", [{}, {"skipped": None, "places": 0, "tokens": 0}])
def test_missing_counts_are_dashes(stats: dict[str, Any]) -> None:
    rows = stats_rows([counted(stats), counted({"tokens": 90, "places": 100, "samples_read": 7})])
    assert {row.title: row.cells for row in rows} == {
        "Samples read": (NONE, "7"),
        "Padding": (NONE, "10.0 %"),
    }
