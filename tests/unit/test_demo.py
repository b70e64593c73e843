"""packer.demo: captions determine scenes, sizes tell nothing, a seed determines the bytes."""

import io
import json
import random
import re
import statistics
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from packer.__main__ import main
from packer.demo import draw_caption, draw_image, draw_scene, ensure_demo, make_demo
from packer.demo.scene import (
    BACKGROUNDS,
    COLOURS,
    DIAMETERS,
    FILLS,
    MAX_WORDS,
    SHAPES,
    TEXTURES,
    Scene,
)
from packer.demo.write import DemoSettings, _draw_size
from packer.plan.types import ImageSize

WORDS = {
    "size": {"small": "small|little|tiny", "large": "large|big"},
    "fill": {
        "striped": "striped|stripes",
        "dotted": "dotted|spotted|dots",
        "checked": "checked|checkered|checks",
        "outlined": "outlined|hollow",
        "solid": "solid|plain",
    },
}
RELATIONS = {
    "left of": "left of",
    "right of": "right of",
    "above": "above|over|on top of",
    "below": "below|under|beneath",
    "inside": "inside|within|in the middle of",
    "around": "around|surrounding|enclosing",
}


def pairs(paths: tuple[Path, ...]) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    return list(samples.values())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(folder: Path, num_train: int = 6, num_val: int = 3, **options: Any) -> Any:
    return make_demo(folder, num_train=num_train, num_val=num_val, progress=False, **options)


def facts(text: str) -> list[dict[str, str]]:
    """Read every object out of a caption: independent of how captions are put together."""
    found = []
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    sizes = "|".join(WORDS["size"].values())
    phrase = rf"({sizes}) ([\w ]*?)\b({shapes})\b( with (?:stripes|dots|checks))?"
    for size, middle, shape, tail in re.findall(phrase, text):
        words = {"shape": shape, "colour": re.search(rf"\b({colours})\b", middle)[1]}  # type: ignore[index]
        words["size"] = next(k for k, v in WORDS["size"].items() if size in v.split("|"))
        fills = (k for k, v in WORDS["fill"].items() if re.search(rf"\b({v})\b", middle + tail))
        words["fill"] = next(fills, "solid")
        found.append(words)
    return found


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_caption_names_every_object_with_all_its_attributes(seed: int) -> None:
    scene = draw_scene(random.Random(seed))
    caption = draw_caption(scene, random.Random(seed + 1))
    stated = sorted(map(sorted, (item.items() for item in facts(caption))))  # type: ignore[type-var]
    shown = sorted(map(sorted, (item.items() for item in scene.attributes()["objects"])))
    assert stated == shown, caption
    assert len(re.findall(r"\w+|[^\w\s]", caption)) <= MAX_WORDS
    named = [name for name in BACKGROUNDS if re.search(rf"\bon .*{name}\b", caption)]
    assert named in ([], [scene.background])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_relation_a_caption_states_is_the_one_drawn(seed: int) -> None:
    scene = draw_scene(random.Random(seed))
    caption = draw_caption(scene, random.Random(seed + 1))
    if len(scene.objects) != 2:
        return
    stated = [key for key, words in RELATIONS.items() if re.search(rf"\b({words})\b", caption)]
    assert len(stated) == 1, caption
    # "A left of B" or "left of B, A": a leading relation names its object first.
    first, second = facts(caption)
    if re.match(rf"(to the )?({RELATIONS[stated[0]]})\b", caption):
        first, second = second, first
    by_colour = {item.colour: item for item in scene.objects}
    a, b = by_colour[first["colour"]], by_colour[second["colour"]]
    drawn = {
        "left of": a.x < b.x - 0.3,
        "right of": a.x > b.x + 0.3,
        "above": a.y < b.y - 0.3,
        "below": a.y > b.y + 0.3,
        "inside": a.diameter < b.diameter / 2 and abs(a.x - b.x) + abs(a.y - b.y) < 0.1,
        "around": b.diameter < a.diameter / 2 and abs(a.x - b.x) + abs(a.y - b.y) < 0.1,
    }
    assert drawn[stated[0]], caption


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_object_hides_another_or_leaves_the_image(seed: int) -> None:
    scene = draw_scene(random.Random(seed))
    for item in scene.objects:
        for centre in (item.x, item.y):
            assert item.diameter / 2 * 1.05 < min(centre, 1 - centre) + 0.02
    for a, b in combinations(scene.objects, 2):
        distance = max(abs(a.x - b.x), abs(a.y - b.y))
        inside = scene.relation == "inside"
        assert inside or distance > 0.97 * (a.diameter + b.diameter) / 2 - 0.02
        assert a.colour != b.colour


def test_every_object_colour_stands_out_from_every_background_used() -> None:
    def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        return float(np.linalg.norm(np.subtract(a, b)))

    for seed in range(500):
        scene = draw_scene(random.Random(seed))
        for item in scene.objects:
            assert distance(COLOURS[item.colour], BACKGROUNDS[scene.background]) > 80
    assert min(distance(a, b) for a, b in combinations(COLOURS.values(), 2)) > 80


def test_training_covers_every_attribute_evenly(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(2000):
        scene = draw_scene(random.Random(seed))
        counts.update([scene.background, scene.texture, scene.relation])
        for item in scene.objects:
            counts.update([item.size, item.fill, item.colour, item.shape])
    for group in (DIAMETERS, FILLS, COLOURS, SHAPES, TEXTURES, BACKGROUNDS):
        share = [counts[name] for name in group]
        assert min(share) > 0.3 * statistics.mean(share)


def identities(sample: dict[str, bytes]) -> set[Any]:
    """What a caption certainly says: its looks two by two, or a lone object's look and place."""
    fields = json.loads(sample["json"])
    looks = [(item["size"], item["colour"], item["shape"]) for item in fields["objects"]]
    if len(looks) == 1:
        return {(fields["relation"], looks[0])}
    return {frozenset(two) for two in combinations(looks, 2)}


def test_no_validation_caption_fits_a_second_validation_image(tmp_path: Path) -> None:
    samples = pairs(make(tmp_path, 20, 150).val)
    assert len({sample["txt"] for sample in samples}) == 150
    for a, b in combinations(samples, 2):
        assert identities(a).isdisjoint(identities(b))


def test_members_carry_image_caption_and_true_size(tmp_path: Path) -> None:
    paths = make(tmp_path, 4, 2)
    for index, sample in enumerate(pairs(paths.train)):
        assert set(sample) == {"jpg", "txt", "json"}
        fields = json.loads(sample["json"])
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            size = (fields["width"], fields["height"])
            assert image.size == size == (fields["orig_width"], fields["orig_height"])
            assert image.mode == "RGB"
        assert fields["key"] == f"{index:06d}"
        assert fields["set"] == "demo"
        assert "class_name" not in fields
        assert facts(sample["txt"].decode())


def test_the_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, options in {
        "a": {"processes": 1},
        "b": {"processes": 2},
        "c": {"processes": 1, "seed": 1},
    }.items():
        make(tmp_path / name, **options)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) == {"demo-train-00000.tar", "demo-val-00000.tar", "demo.json"}
    assert all(a[name] != c[name] for name in a)


def test_more_pairs_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    few, many = make(tmp_path / "few", 5, 3), make(tmp_path / "many", 9, 3)
    assert pairs(many.train)[:5] == pairs(few.train)


def test_content_does_not_depend_on_size_nor_size_on_content() -> None:
    scene = replace(draw_scene(random.Random(7)), texture="plain")
    big, small = (
        draw_image(scene, size).resize((40, 40), Image.Resampling.BOX)
        for size in (ImageSize(160, 160), ImageSize(80, 80))
    )
    difference = np.abs(np.asarray(big, np.float32) - np.asarray(small, np.float32))
    assert difference.mean() < 6


def test_native_sizes_are_spread_like_the_webs(tmp_path: Path) -> None:
    sizes = [_draw_size(DemoSettings(), "train", i) for i in range(3000)]
    sides = np.array(sizes)
    assert sides.min() >= 48
    assert sides.max() <= 400
    assert 70 <= np.median(sides.min(1)) <= 110
    ratio = np.log(sides[:, 0] / sides[:, 1])
    assert abs((ratio > 0).mean() - 0.5) < 0.04  # orientation even
    assert abs(np.sqrt((ratio**2).mean()) - 0.32) < 0.03
    tokens = [statistics.median((h // p) * (w // p) for h, w in sizes) for p in (10, 12)]
    assert 55 <= tokens[1] < tokens[0] <= 105
    large = [_draw_size(DemoSettings(scale=4.0), "train", i) for i in range(300)]
    ratios = [log(min(a) / min(b)) for a, b in zip(large, sizes[:300], strict=True)]
    np.testing.assert_allclose(ratios, log(4), atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_from_one_another_at_the_smallest_size(shape: str) -> None:
    base = draw_scene(random.Random(0))
    item = replace(base.objects[0], size="small", fill="solid", colour="red", diameter=0.26)
    plain = Scene((), "middle", "", "grey", "plain", 0)

    def drawn(name: str) -> np.ndarray[Any, Any]:
        one = replace(item, shape=name, x=0.5, y=0.5, tilt=0.0)
        image = draw_image(replace(plain, objects=(one,)), ImageSize(48, 48))
        return np.asarray(image, np.float32)

    empty = np.asarray(draw_image(plain, ImageSize(48, 48)), np.float32)
    visible = np.abs(drawn(shape) - empty).mean()
    for other in SHAPES:
        if other != shape:
            assert np.abs(drawn(shape) - drawn(other)).mean() > 0.15 * visible


def test_a_complete_folder_is_reused_and_any_other_written_anew(tmp_path: Path) -> None:
    def ensure(**options: Any) -> dict[str, int]:
        ensure_demo(tmp_path, **{"num_train": 4, "num_val": 2, "progress": False, **options})
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = ensure()
    assert ensure() == first
    assert ensure(seed=2) != first
    again = ensure()
    assert again != first
    (tmp_path / "demo-val-00000.tar").write_bytes(b"cut")
    repaired = ensure()
    assert repaired != again
    (tmp_path / "demo.json").write_text("{")
    assert ensure() != repaired


def test_an_interrupted_set_has_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)

    def interrupted(job: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("packer.demo.write.draw_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, seed=3)
    assert not (tmp_path / "demo.json").exists()


def test_shards_hold_500_pairs_and_older_shards_go(tmp_path: Path) -> None:
    (tmp_path / "demo-train-00007.tar").write_bytes(b"old")
    (tmp_path / "mine-00000.tar").write_bytes(b"kept")
    paths = make(tmp_path, 501, 1, scale=0.25)
    assert [len(pairs((path,))) for path in paths.train] == [500, 1]
    names = set(contents(tmp_path))
    assert "demo-train-00007.tar" not in names
    assert "mine-00000.tar" in names
    assert all(a < b for a, b in pairwise(paths.train))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "num_train must be an integer of at least 1; got 0"),
        ({"num_val": -1}, "num_val must be an integer of at least 0; got -1"),
        ({"seed": -5}, "seed must be an integer of at least 0; got -5"),
        ({"scale": 0.1}, r"scale must be between 0.25 .*; got 0.1"),
        ({"scale": float("nan")}, "got nan"),
        ({"processes": 0}, "processes must be at least 1 or None .*got 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


def test_the_command_writes_the_set_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["make-demo", "--folder", str(tmp_path), "--num-train", "3", "--num-val", "2"]
    assert main(arguments) == 0
    assert "train: 3 pairs in 1 shard(s)" in capsys.readouterr().out
    assert main([*arguments[:-1], "-2"]) == 2
    assert "num_val must be an integer of at least 0" in capsys.readouterr().err


def test_help_lists_the_subcommands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "packer", "--help"], capture_output=True, text=True, check=True
    )
    assert "make-demo" in done.stdout


def test_a_script_without_a_main_guard_is_told_so_and_does_not_start_processes_for_ever(
    tmp_path: Path,
) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from packer.demo import make_demo\n"
        f"make_demo({str(tmp_path / 'demo')!r}, num_train=4, num_val=0, processes=2)\n"
    )

    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode != 0
    assert "needs a script whose own work stands below" in done.stderr
