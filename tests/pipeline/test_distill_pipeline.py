"""A flexible student taught by a fixed run: start, learn, stop and resume, evaluate at any size."""

import shutil
from pathlib import Path

import pytest
import torch

from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.data import read_image_set
from navit.evaluate.results import Settings
from navit.evaluate.source import Subject
from navit.train.checkpoint import find_checkpoint, load_tensors, stored_tensors
from navit.train.restore import load_trained
from tests.pipeline.test_classify_pipeline import DATA, RUN, SHAPE, Done, coloured, losses, navit

FLEXIBLE = (
    *("--model.vision.patch-buffer", "16", "packer.resolution:native"),
    *("packer.token-drop:no-drop", "packer.patch-sizes:random-patch-size"),
    *("--packer.patch-sizes.sizes", "4", "8", "16"),
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Shards, and a run of patches of 8 pixels on them."""
    folder = tmp_path_factory.mktemp("teacher")
    shards = ["--shards", coloured(folder, 90, 0), "--val", coloured(folder, 30, 1)]
    run = folder / "run"
    done = navit(
        *("train", "classify", *shards, "--run", run, "--steps", "8", *RUN[:-1], *SHAPE, *DATA),
        "packer.resolution:native",
    )
    assert done.returncode == 0, done.stderr
    return shards, run


def student(
    shards: list[str],
    run: Path,
    teacher: Path,
    *more: str,
    steps: int,
    init: Path,
) -> Done:
    return navit(
        *("train", "classify", *shards, "--run", run, "--steps", str(steps), *RUN[:-1], *SHAPE),
        *(*DATA, "--init", init, "--teacher", teacher, "--checkpoint-every", "4", *more, *FLEXIBLE),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = find_checkpoint(run)
    infos = stored_tensors(path)["model"]
    found = {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in infos.items()}
    load_tensors(path, {"model": found})
    return found


@pytest.mark.slow
def test_a_flexible_student_learns_from_a_fixed_run_and_goes_on_as_if_never_stopped(
    taught: tuple[list[str], Path], tmp_path: Path
) -> None:
    shards, teacher = taught
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = student(shards, whole, teacher, steps=8, init=teacher)
    assert done.returncode == 0, done.stderr
    assert losses(whole)[-1] < losses(whole)[0]

    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")
    done = student(shards, stopped, teacher, "--resume", steps=8, init=teacher)
    assert done.returncode == 0, done.stderr
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(stopped)[name]), name

    trained = load_trained(whole)
    device = torch.device("cpu")
    subject = Subject(trained.model.to(device), trained.config.packer, device, None)
    evaluator = BudgetEvaluator(
        subject,
        read_image_set([shards[3]], kind="classes"),
        None,
        Settings(metrics=("classifier",), progress=False),
    )
    tokens = [evaluator.evaluate(patch_size=size).mean_tokens for size in (4, 8, 16)]
    assert tokens[0] > tokens[1] > tokens[2]


@pytest.mark.slow
def test_another_teacher_than_the_runs_is_refused(
    taught: tuple[list[str], Path], tmp_path: Path
) -> None:
    shards, teacher = taught
    run, other = tmp_path / "run", tmp_path / "other"
    assert student(shards, run, teacher, steps=4, init=teacher).returncode == 0
    trained = load_trained(teacher).model
    with torch.no_grad():
        trained.head.bias.add_(1)  # type: ignore[union-attr, operator]
    trained.save_pretrained(other)
    done = student(shards, run, other, "--resume", steps=6, init=teacher)
    assert done.returncode == 2
    assert "another teacher" in done.stderr


@pytest.mark.slow
def test_a_run_neither_loses_its_teacher_nor_is_given_one(
    taught: tuple[list[str], Path], tmp_path: Path
) -> None:
    shards, teacher = taught
    with_one, without = tmp_path / "with", tmp_path / "without"
    none = ("--teacher", "None")
    assert student(shards, with_one, teacher, steps=4, init=teacher).returncode == 0
    assert student(shards, without, teacher, *none, steps=4, init=teacher).returncode == 0
    for run, options in ((with_one, none), (without, ())):
        done = student(shards, run, teacher, "--resume", *options, steps=6, init=teacher)
        assert done.returncode == 2
        assert "one of the two has none" in done.stderr
