"""Labelled shards to a classifier: train, evaluate, stop and resume, start from weights."""

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from navit import NaViT, NaViTConfig
from navit.__main__ import main as navit_main
from navit.train.metrics import read_metrics
from packer.shards import iter_shard, write_shards
from tests.helpers.samples import encode_png

SHAPE = (
    *("--model.vision.width", "32", "--model.vision.depth", "1", "--model.vision.num-heads", "2"),
    *("--model.vision.mlp-dim", "64", "--model.vision.pool", "mean"),
)
DATA = ("--packer.patch-size", "8", "--packer.seq-len", "64", "--packer.max-tokens", "32")
RUN = (
    *("--num-classes", "3", "--sequences-per-batch", "4"),
    *("--shuffle-window", "16", "--optim.warmup-steps", "2"),
    *("--workers", "0", "--eval-every", "0", "packer.resolution:native"),
)


def coloured(folder: Path, count: int, seed: int) -> str:
    """Write images in which one of three colours is the class; return the shard."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        label = int(rng.integers(3))
        height, width = rng.integers(2, 6, 2) * 8
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        pixels[..., label] += 150
        samples.append({"key": f"{i:04d}", "image": encode_png(pixels), "label": label})
    return write_shards(samples, folder / f"s{seed}-%02d.tar", samples_per_shard=count)[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("classes")
    return ["--shards", coloured(folder, 90, 0), "--val", coloured(folder, 30, 1)]


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def navit(*arguments: str | Path) -> Done:
    """Run a command in this process: starting one takes longer than these runs."""
    out, err = StringIO(), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setattr("sys.argv", ["navit", *map(str, arguments)])
        status = navit_main()
    return Done(status, out.getvalue(), err.getvalue())


def losses(run: Path) -> list[float]:
    return [x["loss"] for x in read_metrics(run / "metrics.jsonl") if x["event"] == "train"]


@pytest.mark.parametrize("kind", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_a_run_learns_the_classes_and_evaluates_as_it_says(
    shards: list[str], kind: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = navit(
        *("train", "classify", *shards, "--run", run, *RUN, *SHAPE, *DATA),
        *("--steps", "40", "--optim.cooldown-steps", "4", "--label-loss", kind),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["accuracy@1"] > 0.9
    assert "classification of 30 images" in done.stdout
    assert losses(run)[-1] < 0.7 * losses(run)[0]

    again = tmp_path / "found.json"
    done = navit("evaluate", run, "--shards", shards[3], "--json", again)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(again.read_text())["results"][0]["metrics"]
    assert {n: metrics[n] for n in result["metrics"]} == pytest.approx(result["metrics"])


def test_a_stopped_run_goes_on_with_the_same_losses(shards: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, steps, resume in ((whole, "8", ()), (parts, "4", ()), (parts, "8", ("--resume",))):
        done = navit(
            *("train", "classify", *shards, "--run", run, *RUN, *SHAPE, *DATA),
            *("--steps", steps, "--optim.cooldown-steps", "0", *resume),
        )
        assert done.returncode == 0, done.stderr
    assert losses(parts) == losses(whole)


@pytest.mark.slow
@pytest.mark.slow
def test_fine_tuning_starts_from_weights_at_a_higher_resolution(
    shards: list[str], tmp_path: Path
) -> None:
    config = NaViTConfig.named(
        "tiny", patch_size=8, width=48, mlp_dim=96, pool="mean", pos_embed="grid", pos_table_size=2
    )
    NaViT(config).save_pretrained(tmp_path / "weights")
    run = tmp_path / "run"
    larger = ("--packer.seq-len", "128", "--packer.max-tokens", "64")
    options = (*RUN, "--packer.patch-size", "8", *larger, "--packer.resize", "allow_enlarge")
    done = navit(
        *("train", "classify", *shards, "--run", run, *options, "--steps", "60"),
        *("--init", tmp_path / "weights"),
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads((run / "config.json").read_text())["model"]["vision"]
    assert (stored["width"], stored["pool"], stored["pos_embed"]) == (48, "mean", "grid")
    assert json.loads((run / "result.json").read_text())["metrics"]["accuracy@1"] > 0.9

    other = navit(
        *("train", "classify", *shards, "--run", tmp_path / "other", *RUN),
        *("--packer.patch-size", "16", "--init", tmp_path / "weights"),
    )
    assert other.returncode == 2
    assert "patch_size must be that of the weights" in other.stderr
    assert "(8); got 16" in other.stderr


def as_folder(shard: str, folder: Path) -> Path:
    """Write a shard's images as files below one subfolder a class, and one broken file."""
    for raw in iter_shard(shard, on_problem=lambda cause, detail: None):
        target = folder / "rgb"[int(raw.members["cls"])] / f"{raw.key.rpartition('/')[2]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(raw.members["png"])
    (folder / "r" / "broken.jpg").write_bytes(b"no image")
    (folder / "r" / "notes.txt").write_text("passed over")
    return folder


@pytest.mark.slow
def test_a_folder_with_one_subfolder_a_class_trains_stops_and_resumes(
    shards: list[str], tmp_path: Path
) -> None:
    train, val = as_folder(shards[1], tmp_path / "train"), as_folder(shards[3], tmp_path / "val")
    options = ("--shards", train, "--val", val, *RUN[2:], *SHAPE, *DATA)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # More than an epoch: 90 images of some 9 tokens are 4 batches of 4 x 64 places.
    for run, steps, resume in ((whole, "24", ()), (parts, "7", ()), (parts, "24", ("--resume",))):
        done = navit(
            *("train", "classify", *options, "--run", run),
            *("--steps", steps, "--optim.cooldown-steps", "0", *resume),
        )
        assert done.returncode == 0, done.stderr
        # The broken file, once in the run however often it is stopped.
        assert re.search(r"decode_error +1 ", done.stdout), done.stdout
    assert "91 images of 3 classes" in done.stderr
    assert losses(parts) == losses(whole)
    result = json.loads((parts / "result.json").read_text())
    assert result["metrics"]["accuracy@1"] > 0.9

    # The names of the classes, not their places among the folders there are, are the labels.
    for name in "gb":
        shutil.rmtree(val / name)
    found = tmp_path / "found.json"
    done = navit("evaluate", parts, "--shards", val, "--json", found)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text())["results"][0]["metrics"]["accuracy@1"] > 0.9
    assert "decode_error" in done.stdout
    (val / "yellow").mkdir()
    done = navit("evaluate", parts, "--shards", val)
    assert done.returncode == 2
    assert "must be the classes 'b', 'g', 'r'; got 'yellow' beside" in done.stderr


def test_classes_must_be_counted(shards: list[str]) -> None:
    done = navit("train", *shards, "--task", "classify")
    assert done.returncode == 2
    assert "task 'classify' needs num_classes of at least 1; got 0" in done.stderr
