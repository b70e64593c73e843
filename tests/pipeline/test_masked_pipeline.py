"""Images without labels to a tower: pre-train, stop and resume, probe, fine-tune."""

import json
from pathlib import Path

import pytest
import torch

from navit import NaViT
from navit.train.restore import load_trained
from tests.helpers.samples import png
from tests.pipeline.test_classify_pipeline import DATA, SHAPE, coloured, losses, navit

RUN = (
    *("--sequences-per-batch", "4", "--shuffle-window", "16", "--optim.warmup-steps", "2"),
    *(
        "--workers",
        "0",
        "--eval-every",
        "0",
        "--ema-decay",
        "0.5",
        "--optim.learning-rate",
        "5e-3",
        "packer.resolution:native",
    ),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("images")
    return coloured(folder, 90, 0), coloured(folder, 30, 1)


@pytest.fixture(scope="module")
def trained(shards: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = navit(*train(shards, run, steps=40))
    assert done.returncode == 0, done.stderr
    assert "masked patches, 30 images" in done.stdout
    return run


def train(shards: tuple[str, str], run: Path, *, steps: int, task: str = "masked") -> list[str]:
    settings = ("--steps", str(steps), "--optim.cooldown-steps", "0")
    options = (*RUN, *SHAPE, *DATA, *settings)
    return ["train", task, "--shards", shards[0], "--val", shards[1], "--run", str(run), *options]


def test_a_run_learns_the_colours(trained: Path) -> None:
    """Every image is of one colour and noise, so its visible patches tell the hidden ones."""
    assert (trained / "masked.png").stat().st_size > 10_000
    metrics = json.loads((trained / "result.json").read_text())["metrics"]
    assert metrics["masked_accuracy@1"] > metrics["chance/masked_accuracy@1"] + 0.1
    assert losses(trained)[-1] < 0.6 * losses(trained)[0]


def test_a_stopped_run_goes_on_with_the_same_losses(
    shards: tuple[str, str], trained: Path, tmp_path: Path
) -> None:
    """The corruption too is drawn as if the run had never been stopped."""
    for steps, resume in ((4, []), (8, ["--resume"])):
        done = navit(*train(shards, tmp_path / "parts", steps=steps), *resume)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "parts") == losses(trained)[:8]


def test_its_tower_is_probed_and_fine_tuned(
    shards: tuple[str, str], trained: Path, tmp_path: Path
) -> None:
    loaded = load_trained(trained)
    assert isinstance(loaded.model, NaViT)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    with pytest.raises(ValueError, match="leaves an image tower"):
        loaded.evaluate([shards[1]], sequences_per_batch=2, device=torch.device("cpu"))

    found = tmp_path / "found.json"
    done = navit(
        *("evaluate", trained, "--shards", shards[1], "--train-shards", shards[0]),
        *("--json", found),
    )
    assert done.returncode == 0, done.stderr
    assert "10-shot" in done.stdout

    settings = train(shards, tmp_path / "classes", steps=1, task="classify")
    done = navit(*settings, "--num-classes", "3", "--init", trained)
    assert done.returncode == 0, done.stderr
    tuned = load_trained(tmp_path / "classes", averaged=False).model
    assert not isinstance(tuned, NaViT)
    before = loaded.model.state_dict()
    after = tuned.vision.state_dict()
    for name, value in before.items():  # one step away from it
        torch.testing.assert_close(after[name], value, rtol=0, atol=0.05, msg=name)


@pytest.mark.slow
def test_a_folder_of_images_is_enough(tmp_path: Path) -> None:
    """Flat or with subfolders, whose names mean nothing."""
    for name in ("a.png", "b.png", "below/c.png", "below/d.png", "below/e.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(24, 32, seed=len(name)))
    images = (str(tmp_path / "images"), str(tmp_path / "images" / "below"))
    done = navit(*train(images, tmp_path / "run", steps=2))
    assert done.returncode == 0, done.stderr
    assert "masked patches, 3 images" in done.stdout
    assert "5 images" in done.stderr
