"""`python -m packer show` and plans as text and picture: what is shown is what was planned."""

import re
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from packer.__main__ import main
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ConstantDrop, kept_indices
from packer.plan.image import plan_image
from packer.plan.resize import RandomCrop
from packer.plan.show import plan_text
from packer.plan.types import ImagePlan, ImageSize
from packer.report import draw_plan
from packer.tools.show import Show
from tests.helpers.samples import image_samples, make_shards

CONFIG = PackerConfig(patch_size=16, seq_len=64, token_drop=ConstantDrop(0.25))


def plans(*sizes: tuple[int, int], config: PackerConfig = CONFIG) -> tuple[ImagePlan, ...]:
    return tuple(plan_image(f"image {i}", ImageSize(*size), config) for i, size in enumerate(sizes))


def test_a_plan_is_told_image_by_image_and_sequence_by_sequence() -> None:
    text = plan_text([plans((64, 80), (32, 33)), ()], 64, width=16)
    assert text.split("\n") == [
        "2 images in 2 sequences of 64 tokens, 85.94 % padding",
        "",
        "image         pixels   patches  tokens  kept  drop %",
        "image 0      64 x 80     4 x 5      20    15    25.0",
        "image 1      32 x 33     2 x 2       4     3    25.0",
        "",
        "   0 ████············  28.12 %  15 3",
        "   1 ················   0.00 %  empty",
    ]


def test_crops_are_told_where_there_are_some() -> None:
    config = PackerConfig(seq_len=64, crop=RandomCrop(0.5))
    image = plans((100, 90), config=config)[0]
    assert image.box is not None
    line = plan_text([(image,)], 64).split("\n")[3]
    assert f"{image.box.height} x {image.box.width}" in line


@given(
    lengths=st.lists(st.integers(1, 12), max_size=6),
    width=st.integers(1, 80),
    spare=st.integers(0, 30),
)
def test_a_bar_is_as_long_as_its_tokens(lengths: list[int], width: int, spare: int) -> None:
    seq_len = max(sum(lengths) + spare, 1)
    images = plans(*[(16, 16 * n) for n in lengths], config=PackerConfig(seq_len=seq_len))
    bar = plan_text([images], seq_len, width=width, max_images=0).split("\n")[-1][5 : 5 + width]
    ends = [round(sum(lengths[: i + 1]) * width / seq_len) for i in range(len(lengths))]
    expected = "".join(
        "█▒"[i % 2] * (end - start)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    assert bar == expected.ljust(width, "·")


def test_long_plans_are_cut_and_say_so() -> None:
    sequences = [plans((64, 64), (16, 16))] * 5
    text = plan_text(sequences, 64, max_images=3, max_sequences=2)
    assert "... and 7 images more" in text
    assert "... and 3 sequences more" in text
    assert len(re.findall(r"^image \d", text, re.MULTILINE)) == 3
    named = plan_text([(plans((16, 16))[0]._replace(key="shard/" + "k" * 60),)], 64)
    assert max(map(len, named.splitlines())) <= 100
    with pytest.raises(ValueError, match=r"places; got one of 24 tokens"):
        plan_text([plans((64, 64), (64, 64))], 10)


def test_a_drawn_plan_has_each_kept_patch_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    images = plans((64, 80), (48, 32))
    path = draw_plan([images, ()], 64, tmp_path / "new" / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    pictures = [np.asarray(image.get_array()) for image in figures[0].axes[0].images]
    for image, picture in zip(images, pictures, strict=True):
        cells = picture.reshape(image.grid.rows, 8, image.grid.cols, 8, 3).transpose(0, 2, 1, 3, 4)
        flat = (cells == cells[:, :, :1, :1]).all((2, 3, 4)).ravel()  # dropped ones are hatched
        kept = kept_indices(image.grid.num_tokens, image.num_kept, image.kept_draw)
        assert np.flatnonzero(flat).tolist() == kept.tolist()
    said = [text.get_text() for text in figures[0].texts]
    assert "2 images in 2 sequences of 64 tokens, 84.38 % padding" in said
    with pytest.raises(ValueError, match="at least one sequence"):
        draw_plan([], 64, tmp_path / "plan.png")


def test_drawn_sizes_fill_the_sequences_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    assert main(["show", "--sequences", "3", "--out", str(picture), "--seq-len", "256"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"\d+ images in 3 sequences of 256 tokens, ", out)
    assert max(map(len, out.splitlines())) <= 100
    assert f"picture: {picture}" in out
    config = PackerConfig(seq_len=256, max_tokens=256, token_drop=BetaDrop(0.25, 0.4))
    planned = list(islice(Show(config=config).plan(), 3))
    assert plan_text(planned, 256, width=48) in out
    for image in planned[0]:
        assert image == plan_image(image.key, image.size, config)


def test_leftover_places_are_filled_where_the_settings_say_so() -> None:
    config = PackerConfig(seq_len=50, token_drop=ConstantDrop(0.5), fill_leftover=True)
    tokens = [sum(i.num_kept for i in s) for s in islice(Show(config=config).plan(), 20)]
    plain = replace(config, fill_leftover=False)
    before = [sum(i.num_kept for i in s) for s in islice(Show(config=plain).plan(), 20)]
    assert all(a >= b for a, b in zip(tokens, before, strict=True))
    assert sum(tokens) > sum(before)


def test_a_list_of_sizes_is_planned_in_its_order_or_shuffled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "sizes.csv"
    table.write_text("height,width\n" + "\n".join(f"{16 * i},16" for i in range(1, 9)))
    config = ["--seq-len", "40", "--max-tokens", "40", "token-drop:no-drop"]
    shown = []
    for shuffle in ([], ["--shuffle"]):
        options = ["--sizes", str(table), *shuffle, "--out", str(tmp_path / "a.png")]
        assert main(["show", *options, *config]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]
    for out in shown:
        assert "8 images in 1 sequence of 40 tokens, 10.00 % padding" in out
    assert re.search(r"90\.00 %  1 2 3 4 5 6 \.\.\. \(8 images\)", shown[0])


def test_a_batch_of_shards_is_shown_with_its_tally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path, image_samples(20), 10)
    options = ["--patch-size", "8", "--seq-len", "32", "--max-tokens", "32", "--sequences", "2"]
    out = []
    for number in ("0", "1"):
        picture = tmp_path / f"batch-{number}.png"
        assert main(["show", *shards, *options, "--batch", number, "--out", str(picture)]) == 0
        out.append(capsys.readouterr().out)
        assert re.match(r"\d+ images? in 2 sequences of 32 tokens", out[-1])
        assert picture.exists()
        assert "samples read" in out[-1]
    assert out[0] != out[1]
    assert main(["show", *shards, *options, "--batch", "99"]) == 2
    assert "batch must be below" in capsys.readouterr().err
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert main(["show", str(tmp_path / "empty.tar"), *options]) == 2
    assert "batch must be below 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "0"], "sequences must be at least 1"),
        (["--batch", "-1"], "batch at least 0"),
        (["a.tar", "--sizes", "a.csv"], "got both"),
        (["nowhere.tar"], "does not"),
    ],
)
def test_settings_that_cannot_be_end_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["show", *arguments])
    except SystemExit as error:  # a setting that is refused while the command line is read
        status = error.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
