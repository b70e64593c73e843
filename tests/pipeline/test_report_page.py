"""`navit report`: from run folders to one page that stands alone."""

import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from navit.__main__ import COMMANDS
from navit.report.page import build_page
from navit.report.read import read_run, read_runs
from navit.report.runs import AXES, Run
from navit.train.config import demo
from tests.helpers.run_folders import records_of, write_run

_VOID = {"meta", "input", "img", "link", "br"}


class Page(HTMLParser):
    """Reads a page, and fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id") is not None]


def folders(root: Path) -> list[Path]:
    pictures = ["packing.png", "retrieval.png"]
    stats = {"samples_read": 410, "images": 400, "skipped": {"decode_error": 10}, "noted": {}}
    first = write_run(
        root / "native",
        records_of(40, recall=0.5),
        config=replace(demo(), steps=40),
        result={"step": 40, "stats": stats},
        pictures=pictures,
    )
    second = write_run(
        root / "square", records_of(30, recall=0.4), config=replace(demo(), seed=7), tail='{"ev'
    )
    return [first, second]


def test_the_command_writes_one_page_that_needs_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = folders(tmp_path / "runs"), tmp_path / "pages" / "report.html"

    assert COMMANDS["report"]([*map(str, runs), "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "square: not finished: step 30 of 260." in printed
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    page = Page(out.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    assert "url(" not in page.text
    assert "@import" not in page.text
    for said in (
        "native",
        "square",
        "Training loss",
        "Settings that differ",
        "seed",
        "Waiting for data",
    ):
        assert said in page.text
    assert "skipped: no image, or one that is damaged" in page.text
    assert "1 line of metrics.jsonl could not be read" in page.text
    assert "packing.png is not there." in page.text, "of the second run"


def test_pictures_are_in_the_page_whole(tmp_path: Path) -> None:
    runs = read_runs(folders(tmp_path))
    page = Page(build_page(runs, title="two"))
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        image = Image.open(BytesIO(b64decode(source.partition("base64,")[2])))
        assert image.size == (8, 6)
    without = build_page(runs, title="two", show_pictures=False)
    assert "<img" not in without


def test_every_plot_is_there_for_every_axis_and_the_switches_reach_it(tmp_path: Path) -> None:
    page = Page(build_page(read_runs(folders(tmp_path)), title="two"))
    plots = [attrs["class"] for tag, attrs in page.tags if tag == "div" and "plot" in str(attrs)]
    cards = sum(1 for tag, attrs in page.tags if tag == "section")
    assert cards == 10  # loss, recall, six rates, learning rate, gradient norm
    assert sorted(plots) == sorted(f"plot axis-{axis}" for axis in AXES for _ in range(cards))
    wanted = [f"by-{axis}" for axis in AXES] + ["show-run-0", "show-run-1"]
    assert page.ids() == wanted
    labelled = [attrs["for"] for tag, attrs in page.tags if tag == "label"]
    assert sorted(map(str, labelled)) == sorted(wanted)
    style = "".join(page.words)
    for name in wanted:
        assert f"#{name}:" in style


@given(name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
def test_what_comes_from_a_run_cannot_become_markup(name: str) -> None:
    run = Run(f"<i>{name}</i>&\"'", Path("run"), notes=(f"<script>{name}",))
    page = Page(build_page([run], title=run.name))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "i" not in {tag for tag, _ in page.tags}
    assert run.name in page.words
    assert any(f"<script>{name}" in words for words in page.words)


def test_names_of_metrics_and_settings_are_escaped_too(tmp_path: Path) -> None:
    records = [*records_of(10), {"event": "rates", "step": 10, "<b>rate": 3.0}]
    records += [{"event": "eval", "step": 10, "<b>set/accuracy@1": 0.5}]
    folder = write_run(tmp_path / "run", records, config={"<b>setting": "<b>", "steps": 10})
    page = Page(build_page([read_run(folder, "run")], title="one"))
    assert "<b>set: accuracy@1" in page.text.replace("  ", " ")
    assert [tag for tag, _ in page.tags].count("b") == len(read_run(folder, "run").notes)


@pytest.mark.parametrize("num_records", [0, 1, 9])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, num_records: int) -> None:
    folder = write_run(tmp_path / "run", records_of(num_records))
    page = Page(build_page([read_run(folder, "run")], title="one"))
    assert "there is no evaluation" in page.text or num_records == 0
    assert ("There are none" in page.text) == (num_records == 0)
    assert "hours of steps" not in page.text, "not known before the first reading"


def test_a_page_is_replaced_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    runs, out = folders(tmp_path / "runs"), tmp_path / "report.html"
    out.write_text("old")
    assert COMMANDS["report"]([str(runs[0]), "--out", str(out), "--no-pictures"]) == 0
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(OSError, match="report"):
        COMMANDS["report"]([str(runs[0]), "--out", str(out / "inside.html")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_many_runs_keep_apart_by_colour_and_dash(tmp_path: Path) -> None:
    runs = [Run(f"run {i}", Path(f"{i}")) for i in range(17)]
    style = build_page(runs, title="many")
    looks = re.findall(r"\.run-\d+\{(--run:.*?)\}", style)
    assert len(looks) == len(set(looks)) == 17
