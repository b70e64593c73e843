"""`navit analyze`, from a checkpoint and files to pictures and numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from navit.__main__ import main
from navit.analyze.command import AnalyzeCommand
from navit.analyze.images import View, make_views, pixels_of, read_items
from navit.analyze.results import look_at
from navit.embed.parts import Item
from navit.model import CLIPConfig, NaViT, NaViTConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.serialize import to_plain
from navit.train.checkpoint import Checkpoint, save_checkpoint
from navit.train.config import TrainConfig
from packer.config import PackerConfig
from tests.helpers.samples import BROKEN, noise, png

P = 8
SIDES = [(40, 70), (64, 32), (9, 50), (33, 33), (80, 20), (48, 48), (25, 60), (70, 41)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of different aspect, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate(SIDES):
        (folder / f"{number}.png").write_bytes(png(height, width, number))
    (folder / "z-broken.png").write_bytes(BROKEN)
    return folder


def tower(**changes: Any) -> NaViT:
    torch.manual_seed(1)
    return NaViT(NaViTConfig.named("tiny", patch_size=P, pos_table_size=4, **changes)).eval()


def analyze(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    """Run the command in this process."""
    monkeypatch.setattr("sys.argv", ["navit", "analyze", *map(str, args)])
    return main()


def all_numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in all_numbers(part)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="map", marks=pytest.mark.slow),
        pytest.param(
            {"pool": "cls", "num_registers": 2, "patch_buffer": 12}, id="class token, flexible"
        ),
    ],
)
def test_a_checkpoint_and_photos_give_every_picture_and_finite_numbers(
    changes: dict[str, Any],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tower(**changes).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--folder", out, "--max-tokens", 24, "--rollout-images", 3]
    assert analyze(monkeypatch, tmp_path / "model", "--images", photos, *options) == 0
    printed = capsys.readouterr().out
    names = ["filters", "positions", "attention_distance", "rollout", "layer_similarity"]
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300
        assert str(out / f"{name}.png") in printed
    found = json.loads((out / "analysis.json").read_text())
    assert all(math.isfinite(number) for number in all_numbers(found))
    assert [failure["cause"] for failure in found["failures"]] == ["decode_error"]
    assert "1 image could not be read" in printed
    distance = found["attention_distance"]
    assert distance["images"] == len(SIDES)
    assert torch.tensor(distance["pixels"]).shape == (2, 2)
    added = torch.tensor(distance["attention_on_added_tokens"])
    assert bool((added > 0).all()) == ("num_registers" in changes)
    for rollout in found["rollout"]:
        total = torch.tensor(rollout["shares"]).sum() + rollout["on_added_tokens"]
        assert float(total) == pytest.approx(1, abs=1e-5)
    between = [tuple(pair["between"]) for pair in found["layer_similarity"]]
    assert ("24 tokens", "6 tokens") in between
    assert (("24 tokens", "patch 16 px, 6 tokens") in between) == ("patch_buffer" in changes)
    kinds = {pair["vectors"] for pair in found["layer_similarity"]}
    assert kinds == {"patches", *(["class token"] if changes.get("pool") == "cls" else [])}
    first = torch.tensor(found["layer_similarity"][0]["cka"])
    torch.testing.assert_close(first.diagonal(), torch.ones(4))


def test_a_run_without_images_gives_filters_and_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = tower().config
    config = TrainConfig(
        task="classify",
        num_classes=3,
        packer=PackerConfig(patch_size=P, max_tokens=20),
        model=CLIPConfig(vision=vision),
    )
    tensors = {"model": Classifier(ClassifierConfig(vision, 3)).state_dict()}
    saved = Checkpoint(tensors, {"config": to_plain(config), "step": 1})
    save_checkpoint(tmp_path / "run/checkpoints", 1, saved)
    assert analyze(monkeypatch, tmp_path / "run", "--folder", tmp_path / "out") == 0
    assert "no --images" in capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["analysis.json", "filters.png", "positions.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--images", "{photos}", "--patch-sizes", "4"], "needs a model with a patch_buffer"),
        (["--images", "{photos}", "--budgets", "0"], "must be positive"),
    ],
)
def test_a_wrong_setting_ends_with_its_message(
    options: list[str],
    message: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tower().save_pretrained(tmp_path / "model")
    given = [option.format(photos=photos) for option in options]
    assert analyze(monkeypatch, tmp_path / "model", "--folder", tmp_path / "o", *given) == 2
    assert message in capsys.readouterr().err


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="max_images must be at least 1"):
        AnalyzeCommand("model", max_images=0)


def test_a_view_shows_the_pixels_the_model_is_given() -> None:
    packing = PackerConfig(patch_size=P, max_tokens=100)
    view = View("own", tower(), packing)
    image = noise(24, 40, 3)
    torch.testing.assert_close(pixels_of(view.pack(Item("a", image))), torch.as_tensor(image))


def test_views_of_other_patch_sizes_keep_the_resolution() -> None:
    packing = PackerConfig(patch_size=P, max_tokens=64)
    views = make_views(tower(patch_buffer=12), packing, (64, 16), (4, 16))
    names = ["64 tokens", "16 tokens", "patch 4 px, 256 tokens", "patch 16 px, 16 tokens"]
    assert [view.name for view in views] == names
    image = Item("a", noise(64, 64, 1))
    shapes = [pixels_of(view.pack(image)).shape[:2] for view in views]
    assert shapes == [(64, 64), (32, 32), (64, 64), (64, 64)]


def test_images_are_spread_over_a_folder(photos: Path) -> None:
    assert [Path(item.key).name for item in read_items([str(photos)], 3)] == [
        "0.png",
        "4.png",
        "z-broken.png",
    ]
    assert len(list(read_items([str(photos)], 100))) == len(SIDES) + 1


@pytest.mark.slow
def test_results_do_not_depend_on_how_many_images_a_batch_of_cka_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = View("own", tower(), PackerConfig(patch_size=P, max_tokens=9))
    items = [Item(str(i), noise(10 + i % 13, 30 - i % 17, i)) for i in range(24)]
    found = []
    for size in (8, 100):
        monkeypatch.setattr("navit.analyze.results.CKA_BATCH", size)
        seen = look_at(iter(items), [view, view], rollouts=0).alignment
        assert seen is not None
        assert seen.images == 24
        found.append(torch.stack([values for _, _, values in seen.results()]))
    torch.testing.assert_close(*found, rtol=0, atol=0.15)
