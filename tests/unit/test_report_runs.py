"""Run folders as a report reads them: whole, unfinished, damaged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.clip import CLIP
from navit.report.read import count_parameters, read_run, read_runs, short_names
from navit.serialize import to_plain
from navit.train.config import TrainConfig, classify, demo
from tests.helpers.run_folders import records_of, write_run


def test_a_whole_run_is_read_without_a_note(tmp_path: Path) -> None:
    stats = {"samples_read": 210, "images": 200, "skipped": {"decode_error": 10}}
    folder = write_run(
        tmp_path / "whole",
        records_of(20, images=10),
        config=replace(demo(), steps=20),
        result={"step": 20, "stats": stats},
        pictures=["packing.png", "retrieval.png"],
    )

    run = read_run(folder, "whole")

    assert run.notes == ()
    assert run.last_step == run.planned_steps == run.stats_step == 20
    assert run.train["loss"].values.tolist() == [1 + 1 / step for step in range(1, 21)]
    assert run.evals["text_to_image/recall@1"].steps.tolist() == [10, 20]
    assert run.stats == stats
    assert set(run.pictures) == {"packing", "retrieval"}


@given(
    readings=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 50), st.floats(0.5, 100)), min_size=1
    )
)
def test_hours_add_up_the_seconds_that_the_rates_came_from(
    readings: list[tuple[int, int, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A rate is images over seconds; images over the rate must give the seconds back."""
    records, step, seconds, tokens = [], 0, 0.0, 0.0
    for steps, images, took in readings:
        for _ in range(steps):
            step += 1
            records.append({"event": "train", "step": step, "loss": 1.0, "images": images})
        read = steps * images
        rates = {"images_per_second": read / took, "tokens_per_second": 30 * read / took}
        rates |= {"flops_per_second": 1e9 * read / took}
        records.append({"event": "rates", "step": step, **rates})
        seconds, tokens = seconds + took, tokens + 30 * read

    folder = tmp_path_factory.mktemp("run") / "run"
    progress = read_run(write_run(folder, records, config={}), "run").progress

    assert progress.total("hours") == pytest.approx(seconds / 3600)
    assert progress.total("tokens") == pytest.approx(tokens)
    assert progress.total("flops") == pytest.approx(1e9 * tokens / 30)
    assert progress.total("images") == sum(steps * images for steps, images, _ in readings)
    assert np.all(np.diff(progress.amounts["hours"]) >= 0)


def test_steps_after_the_last_reading_count_at_its_rates(tmp_path: Path) -> None:
    records = records_of(15, images=10, rate=5.0)
    run = read_run(write_run(tmp_path / "run", records), "run")
    assert run.progress.total("hours") == pytest.approx(15 * 10 / 5 / 3600)


def test_a_line_that_was_being_written_is_left_out_and_said(tmp_path: Path) -> None:
    whole = read_run(write_run(tmp_path / "whole", records_of(20)), "run")
    cut = read_run(
        write_run(tmp_path / "cut", records_of(20), tail='{"event": "train", "st'), "run"
    )
    assert cut.train["loss"].values.tolist() == whole.train["loss"].values.tolist()
    assert any("1 line of metrics.jsonl could not be read" in note for note in cut.notes)
    assert set(cut.notes) - set(whole.notes) == {n for n in cut.notes if "1 line" in n}


def test_values_that_are_no_numbers_or_not_finite_make_no_curve(tmp_path: Path) -> None:
    lines = [
        {"event": "train", "step": 1, "loss": float("nan"), "lr": 1.0, "name": "x", "flag": True},
        {"event": "train", "step": 2, "loss": 3.0, "lr": float("inf")},
        {"event": "train", "step": 2, "loss": 4.0},
        ["no record"],
        {"event": "train", "loss": 5.0},
    ]
    run = read_run(write_run(tmp_path / "run", lines), "run")
    assert set(run.train) == {"loss", "lr"}
    assert run.train["loss"].steps.tolist() == [2], "a resumed run writes a step again"
    assert run.train["loss"].last == 4.0
    assert any("2 lines" in note for note in run.notes)


def test_a_bad_step_counts_its_images_and_no_loss(tmp_path: Path) -> None:
    lines = [
        {"event": "train", "step": 1, "loss": 1.0, "images": 4},
        {"event": "bad_loss", "step": 2, "loss": "nan", "keys": ["a", "b"]},
    ]
    run = read_run(write_run(tmp_path / "run", lines), "run")
    assert run.bad_steps == (2,)
    assert run.progress.total("images") == 6
    assert run.last_step == 2


def test_an_unfinished_run_says_how_far_it_is_and_takes_the_counts_of_its_checkpoint(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run", records_of(20), config=replace(demo(), steps=50))
    for step in (10, 20):
        state = folder / "checkpoints" / f"step-{step:08d}" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"step": step, "stats": {"images": 10 * step}}))

    run = read_run(folder, "run")

    assert "not finished: step 20 of 50." in run.notes
    assert run.stats == {"images": 200}
    assert run.stats_step == 20


@pytest.mark.parametrize("content", ["", "[]", '{"steps": ', "\x00"])
def test_a_damaged_configuration_is_a_note_and_no_error(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run", records_of(10))
    (folder / "config.json").write_text(content)
    run = read_run(folder, "run")
    assert run.config == {}
    assert run.parameters is None
    assert any(note.startswith("config.json") for note in run.notes)


def test_a_folder_with_nothing_but_a_configuration_is_a_run_that_has_not_begun(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder, "run")
    assert run.last_step == 0
    assert any("metrics.jsonl is missing" in note for note in run.notes)


def small() -> TrainConfig:
    return replace(demo(), model=replace(demo().model, embed_dim=32))


def test_parameters_are_those_of_the_model_that_training_builds() -> None:
    config = small()
    model = CLIP(config.model)
    assert count_parameters(to_plain(config)) == sum(w.numel() for w in model.parameters())

    labelled = replace(classify(), num_classes=7, model=small().model)
    tower = Classifier(ClassifierConfig(labelled.model.vision, 7))
    assert count_parameters(to_plain(labelled)) == sum(w.numel() for w in tower.parameters())


@pytest.mark.parametrize("config", [{}, {"model": 3}, {"model": {"depth": 2}}, {"model": None}])
def test_a_configuration_of_another_version_has_no_parameters(config: dict[str, object]) -> None:
    assert count_parameters(config) is None


@given(paths=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1))
def test_short_names_tell_different_folders_apart(paths: list[list[str]]) -> None:
    folders = list(dict.fromkeys(Path("/", *parts) for parts in paths))
    names = short_names(folders)
    assert len(set(names)) == len(folders)
    for folder, name in zip(folders, names, strict=True):
        assert Path(*folder.parts[-len(Path(name).parts) :]) == Path(name)


@pytest.mark.parametrize(
    ("folders", "labels", "message"),
    [
        ([], [], "at least one run folder must be given"),
        (["a", "a"], [], "must be named once"),
        (["a", "b"], ["x"], "labels must be one a run"),
        (["a", "b"], ["x", "x"], "labels must be one a run"),
    ],
)
def test_wrong_arguments_say_what_must_hold(
    tmp_path: Path, folders: list[str], labels: list[str], message: str
) -> None:
    for name in set(folders):
        write_run(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path / name for name in folders], labels)


def test_a_folder_that_is_no_run_is_refused_and_the_runs_in_it_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo-001")
    with pytest.raises(FileNotFoundError, match=r"demo-001 \.\.\."):
        read_runs([tmp_path / "runs"])
    with pytest.raises(FileNotFoundError, match="Check the name"):
        read_runs([tmp_path / "nowhere"])
