"""`python -m packer stats`: quantiles and histograms of what the samples hold."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from packer.__main__ import main
from packer.tools.plots import draw_stats
from packer.tools.stats import shard_stats
from tests.helpers.samples import BROKEN, make_shards, png

CAPTIONS = ["one", "two words", "three short words", "", None]


def make_set(folder: Path) -> list[str]:
    """Two shards of five images 16 i high and 32 wide; one is broken, two have no caption."""
    samples = [
        {"key": f"{i}", "image": png(16 * (i + 1), 32, i), "caption": caption}
        for i, caption in enumerate(CAPTIONS)
    ]
    samples[1]["image"] = BROKEN
    return make_shards(folder, samples, 3)


def row(out: str, name: str) -> list[str]:
    found = re.search(rf"^{re.escape(name)}  (.*)$", out, re.MULTILINE)
    assert found, name
    return found[1].split()


def test_quantiles_of_sizes_and_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_set(tmp_path)
    picture = tmp_path / "stats.png"
    assert main(["stats", *shards, "--budgets", "5", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 samples in 2 shard(s)\n")
    # Heights 16, 48, 64, 80 beside a width of 32.
    assert row(out, "short side, pixels")[0::3] == ["16", "32", "32"]
    assert row(out, "long side, pixels")[0::3] == ["32", "56", "80"]
    assert row(out, "tokens at patch 16") == ["2", "2.12", "3.2", "7", "9.4", "9.94", "10", "6.5"]
    assert row(out, "width / height")[0] == "0.4"
    assert row(out, "characters of a caption")[0::3] == ["3", "9", "17"]
    assert row(out, "words of a caption")[-1] == "2"
    assert "tokens: 26 in all, 75.0 % above 5" in out
    assert "formats: png 4" in out
    assert "1 samples have no image whose size can be read, 2 no caption" in out
    assert max(map(len, out.splitlines())) <= 100
    assert f"picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_shard_is_read_to_its_end_whatever_it_holds(tmp_path: Path) -> None:
    first, second = make_set(tmp_path)
    found = shard_stats(first)
    assert found.sizes.tolist() == [[16, 32], [48, 32]]
    assert len(found.num_bytes) == 2
    assert found.samples == 3
    assert found.words.tolist() == [1, 2, 3]
    assert shard_stats(second).characters.tolist() == []


def test_lists_and_drawn_sizes_have_no_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "sizes.tsv"
    table.write_text("height\twidth\tbytes\n100\t50\t7\n30\t60\t9\n")
    picture = str(tmp_path / "a.png")
    assert main(["stats", "--sizes", str(table), "--out", picture]) == 0
    listed = capsys.readouterr().out
    assert row(listed, "encoded image, bytes")[-1] == "8"
    assert main(["stats", "--laion", "500", "--out", picture]) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith("500 images of the LAION-400M fit\n")
    for out in (listed, drawn):
        assert "caption" not in out
    assert "bytes" not in drawn


@pytest.mark.parametrize(
    "values",
    [
        np.array([7]),
        np.array([5, 5, 5]),
        np.array([1, 100_000]),
        np.array([0.5, 0.5]),
        np.arange(1, 12),
        np.array([1.0, 1.01]),
    ],
    ids=str,
)
def test_every_value_is_in_a_bin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: np.ndarray
) -> None:
    """Of few values and of a wide range, on both kinds of axis."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    sizes = np.array([[3, 4], [3, 4]])
    for linear in ((), ("value (unit)",)):
        draw_stats(
            {"value (unit)": values, "nothing": values[:0]},
            sizes,
            tmp_path / "a.png",
            title="A title",
            linear=linear,
        )
        axes = figures[-1].axes[1]
        heights = axes.patches[0].get_data().values
        assert heights.sum() == pytest.approx(100)
        assert axes.get_xlabel() == "value (unit)"
        assert "nothing" not in [a.get_xlabel() for a in figures[-1].axes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one"),
        (["a.tar", "--laion", "5"], "give one"),
        (["--laion", "5", "--patch-size", "0"], "patch_size must be at least 1"),
        (["nowhere.tar"], "does not"),
    ],
)
def test_settings_that_cannot_be_end_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["stats", *arguments])
    except SystemExit as error:  # a setting that is refused while the command line is read
        status = error.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_shards_without_a_readable_image_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path, [{"key": "a", "image": BROKEN}], 1)
    assert main(["stats", *shards]) == 2
    assert "needs images with a size" in capsys.readouterr().err
