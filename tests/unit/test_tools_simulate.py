"""`python -m packer simulate`: its table is what placement does, from any source of sizes."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from packer.__main__ import main
from packer.config import PackerConfig
from packer.decode import read_size
from packer.plan.drop import BetaDrop, ConstantDrop
from packer.plan.simulate import laion_lengths, placement_report
from packer.size_index import index_shard, write_index
from packer.tools.simulate import Simulate, shard_sizes
from packer.tools.sources import read_size_list
from packer.tools.table import format_table, percent
from tests.helpers.samples import BROKEN, image_samples, make_shards

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "native_sizes.tsv"


def rows_of(out: str) -> list[list[str]]:
    """Return the cells of the first table's lines."""
    table = out.split("\n\n")[1]
    return [line.split() for line in table.splitlines() if re.match(r"\d", line)]


def test_the_table_says_what_a_report_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "deep" / "sim.png"
    options = ["--images", "1500", "--seq-lens", "256", "512", "--strategies", "exact", "next_fit"]
    drop = ["token-drop:beta-drop", "--token-drop.mean", "0.3", "--token-drop.maximum", "0.6"]
    assert main(["simulate", *options, "--out", str(picture), *drop]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert [row[:2] for row in rows] == [
        ["256", "exact"],
        ["256", "next_fit"],
        ["512", "exact"],
        ["512", "next_fit"],
    ]
    for row in rows:
        seq_len = int(row[0])
        config = PackerConfig(seq_len=seq_len, token_drop=BetaDrop(0.3, 0.6))
        report = placement_report(laion_lengths(1500, config), seq_len, strategy=row[1])
        assert float(row[2]) == pytest.approx(100 * report.padding, abs=1e-4)
        assert float(row[4]) == pytest.approx(report.images_per_sequence, abs=0.01)
        assert int(row[5]) == report.images_per_sequence_max
        assert int(row[9]) == report.delay_max
        assert float(row[11]) > 0
    assert max(map(len, out.splitlines())) <= 100
    assert f"picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_names_every_axis_and_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    simulate = Simulate(images=800, seq_lens=(256, 512), out=tmp_path / "a.png")
    assert simulate.run() == 0
    assert len(figures[0].axes) == 4
    for axes in figures[0].axes:
        assert axes.get_ylabel()
        assert axes.get_title()
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {"lower bound", *simulate.strategies}


def test_image_slots_are_counted_with_and_without_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit no image is lost, and the tool says how many the paper's rule would drop."""
    common = ["simulate", "--images", "2000", "--seq-lens", "1024", "--strategies", "exact"]
    common += ["--out", str(tmp_path / "a.png")]
    assert main([*common]) == 0
    free = capsys.readouterr().out
    slots = [line.split() for line in free.split("\n\n")[2].splitlines() if line[:4] == "1024"]
    limits = [int(row[2]) for row in slots]
    assert limits == sorted(set(limits))
    assert limits[-1] == int(rows_of(free)[0][5])
    assert float(slots[-1][-1]) == 0
    assert float(slots[-1][3]) == 100

    assert main([*common, "--max-images-per-seq", "4"]) == 0
    limited = capsys.readouterr().out
    assert int(rows_of(limited)[0][5]) == 4
    found = re.search(r"L = 1024: (\d+) \(", limited)
    assert found
    assert 100 < int(found[1]) < 2000


@pytest.mark.parametrize("images", ["1", "2", "60"])
def test_a_few_images_make_a_table_and_a_picture_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: str
) -> None:
    options = ["--seq-lens", "256", "--strategies", "exact", "next_fit"]
    assert main(["simulate", "--images", images, *options, "--out", str(tmp_path / "a.png")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[11] for row in rows] == ["-", "-"]  # too few sequences for one step of all ranks


def test_sizes_come_from_a_list_or_from_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = image_samples(30, unit=32)
    samples[4]["image"] = BROKEN + b"\0" * 20
    shards = make_shards(tmp_path, samples, 12)
    sizes = shard_sizes(shards)
    good = [sample["image"] for i, sample in enumerate(samples) if i != 4]
    assert sizes.tolist() == [list(read_size(image).size) for image in good]
    write_index(shards[0], index_shard(shards[0]))
    np.testing.assert_array_equal(shard_sizes(shards), sizes)

    table = tmp_path / "sizes.csv"
    lines = [f"{height},{width}" for height, width in sizes.tolist()]
    table.write_text("\n".join(["height,width", *lines]))
    tables = []
    for source in (["--shards", *shards], ["--sizes", str(table)]):
        options = ["--repeat", "3", "--seq-lens", "256", "--out", str(tmp_path / "a.png")]
        assert main(["simulate", *source, *options]) == 0
        out = capsys.readouterr().out
        assert out.startswith("87 images of ")
        tables.append([row[:-1] for row in rows_of(out)])  # without lengths/s
    assert tables[0] == tables[1]


def test_a_size_list_is_read_with_its_orientation(tmp_path: Path) -> None:
    table = tmp_path / "sizes.tsv"
    table.write_text(
        "set\twidth\theight\texif_orientation\tbytes\na\t30\t20\t1\t7\nb\t30\t20\t6\t8\n"
    )
    found = read_size_list(table)
    assert found.sizes.tolist() == [[20, 30], [30, 20]]
    assert found.num_bytes is not None
    assert found.num_bytes.tolist() == [7, 8]
    array = tmp_path / "sizes.npy"
    np.save(array, found.sizes.astype(np.uint16))
    assert read_size_list(array).sizes.tolist() == [[20, 30], [30, 20]]
    assert read_size_list(array).num_bytes is None


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_the_shared_size_list_is_read_whole() -> None:
    found = read_size_list(SHARED)
    assert found.sizes.shape == (24_747, 2)
    assert found.num_bytes is not None
    assert len(found.num_bytes) == 24_747


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "width\n3\n", "columns are width"),
        ("a.csv", "", "columns are none"),
        ("a.csv", "height,width\n", "has none"),
        ("a.csv", "height,width\n3,0\n", "one of 0 pixels"),
        ("a.csv", "height,width\n3,x\n", "invalid literal"),
        ("a.tsv", "height,width\n3,4\n", "columns are height,width"),
        ("gone.csv", None, "No such file"),
        ("a.npy", "no array", "must be a .tsv"),
    ],
)
def test_a_file_that_is_no_size_list_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="size list must") as error:
        read_size_list(tmp_path / name)
    assert message in str(error.value)
    np.save(tmp_path / "flat.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"int64 \(4,\)"):
        read_size_list(tmp_path / "flat.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images must be at least 1"),
        (["--ranks", "0"], "ranks must be at least 1"),
        (["--sizes", "a.csv", "--shards", "a.tar"], "got both"),
        (["--seq-lens"], "at least one of seq_lens"),
        (["--max-tokens", "300"], "max_tokens must be at most seq_len"),
    ],
)
def test_settings_that_cannot_be_end_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["simulate", *arguments])
    except SystemExit as error:  # a setting that is refused while the command line is read
        status = error.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_setting_of_the_plan_reaches_it() -> None:
    simulate = Simulate(
        patch_size=32, max_tokens=50, max_images_per_seq=3, token_drop=ConstantDrop(0.5), seed=4
    )
    config = simulate._config(256)
    assert (config.seq_len, config.patch_size, config.max_tokens) == (256, 32, 50)
    assert (config.max_images_per_seq, config.token_drop) == (3, ConstantDrop(0.5))


def test_a_table_lines_up_its_columns() -> None:
    text = format_table(["L", "two\nlines", "x"], [["a", "1", "22"], ["bbb", "10.5", "3"]])
    assert text.splitlines() == ["       two", "L    lines   x", "a        1  22", "bbb   10.5   3"]


def test_a_share_that_is_not_zero_never_reads_zero() -> None:
    assert percent(0.0) == "0.00"
    assert percent(0.12345) == "12.35"
    assert percent(0.00001) == "1e-3"
    assert percent(1e-14) == "1e-12"
