from pathlib import Path

import pytest
import torch

from navit.train import checkpoint as module
from navit.train.checkpoint import (
    Checkpoint,
    check_same_run,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)


def make(value: float) -> Checkpoint:
    tensors = {"model": {"a.weight": torch.full((2, 3), value), "b": torch.tensor(7)}}
    return Checkpoint(tensors, {"step": int(value)}, {"note.txt": "text"})


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, make(3.0))

    loaded = load_checkpoint(path)

    assert loaded.state == {"step": 3}
    torch.testing.assert_close(loaded.tensors, make(3.0).tensors, rtol=0, atol=0)
    assert (path / "note.txt").read_text() == "text"
    assert load_checkpoint(path, groups=()).tensors == {}


def test_tensors_that_share_storage_are_stored_whole(tmp_path: Path) -> None:
    shared = torch.arange(6.0)

    path = save_checkpoint(tmp_path, 1, Checkpoint({"model": {"a": shared, "b": shared[2:]}}, {}))

    assert load_checkpoint(path).tensors["model"]["b"].tolist() == [2, 3, 4, 5]


def test_only_the_newest_are_kept_and_found_from_run_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 10):
        newest = save_checkpoint(folder, step, make(step), keep=2)

    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000010"]
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == find_checkpoint(newest) == newest


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, make(1.0))

    path = save_checkpoint(tmp_path, 1, make(2.0))

    assert load_checkpoint(path).state == {"step": 2}


def test_debris_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".partial-00000001-999").mkdir()

    save_checkpoint(tmp_path, 2, make(2.0))

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_run_continues_with_its_own_settings() -> None:
    stored = {"steps": 10, "optim": {"learning_rate": 1.0}, "packer": {"crop": {"type": "NoCrop"}}}

    check_same_run(stored, {**stored, "steps": 20}, Path("step-1"))
    with pytest.raises(
        ValueError, match=r"step-1 has others: optim.learning_rate was 1.0 and is 2"
    ):
        check_same_run(stored, {**stored, "optim": {"learning_rate": 2.0}}, Path("step-1"))


def test_a_full_disk_leaves_the_older_checkpoint_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_checkpoint(tmp_path, 1, make(1.0))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, make(2.0))

    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    assert load_checkpoint(find_checkpoint(tmp_path)).state == {"step": 1}


def test_a_folder_cut_off_before_its_state_is_no_checkpoint(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 1, make(1.0))
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / ".partial-00000003-1").mkdir()

    assert find_checkpoint(tmp_path) == whole


def test_a_place_without_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint found in .*expected state\.json"):
        find_checkpoint(tmp_path)


def test_random_numbers_go_on_where_they_were() -> None:
    state = rng_state()
    first = torch.rand(5)
    set_rng_state(state)

    assert torch.equal(torch.rand(5), first)
