import resource
from pathlib import Path

import pytest
import torch

from navit.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    read_state,
    save_checkpoint,
    stored_tensors,
)


def make(value: float, count: int = 3) -> Checkpoint:
    tensors = {"model": {"a.weight": torch.full((2, count), value), "b": torch.tensor(7)}}
    return Checkpoint(tensors, {"step": int(value)}, {"note.txt": "text"})


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, make(3.0))
    found = {"a.weight": torch.zeros(2, 3), "b": torch.tensor(0)}

    load_tensors(path, {"model": found})

    torch.testing.assert_close(found, dict(make(3.0).tensors["model"]), rtol=0, atol=0)
    assert read_state(path) == {"step": 3}
    assert (path / "note.txt").read_text() == "text"


def test_the_index_tells_names_shapes_and_types_without_a_tensor_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make(1.0))
    for file in (path / "tensors").glob("*.distcp"):
        file.unlink()

    stored = stored_tensors(path)["model"]

    assert {name: (tuple(info.shape), info.dtype) for name, info in stored.items()} == {
        "a.weight": ((2, 3), torch.float32),
        "b": ((), torch.int64),
    }


def test_tensors_that_share_storage_are_stored_whole(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    given = {"a": shared, "b": shared[2:], "c": shared.view(2, 3).T}
    path = save_checkpoint(tmp_path, 1, Checkpoint({"model": given}, {}))
    found = {name: torch.zeros(value.shape) for name, value in given.items()}

    load_tensors(path, {"model": found})

    torch.testing.assert_close(found, given, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "differing"),
    [
        ({"a.weight": torch.ones(2, 3)}, "b"),
        ({"a.weight": torch.ones(3, 2), "b": torch.tensor(1)}, "a.weight"),
        ({"a.weight": torch.ones(2, 3), "b": torch.tensor(1), "c": torch.ones(1)}, "c"),
    ],
)
def test_other_names_or_shapes_are_refused_before_anything_changes(
    tmp_path: Path, given: dict[str, torch.Tensor], differing: str
) -> None:
    path = save_checkpoint(tmp_path, 1, make(5.0))
    before = {name: value.clone() for name, value in given.items()}

    with pytest.raises(ValueError, match=f"model tensors of .* these differ: {differing}\\."):
        load_tensors(path, {"model": given})

    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_a_checkpoint_cut_short_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make(1.0))
    (file,) = (path / "tensors").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(ValueError, match="must be whole; one could not be read"):
        load_tensors(path, {"model": {"a.weight": torch.zeros(2, 3), "b": torch.tensor(0)}})


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(ValueError, match="earlier version"):
        stored_tensors(tmp_path)


def test_only_the_newest_are_kept_and_found_from_run_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 10):
        newest = save_checkpoint(folder, step, make(step), keep=2)

    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000010"]
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == find_checkpoint(newest) == newest


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, make(1.0))

    path = save_checkpoint(tmp_path, 1, make(2.0))

    assert read_state(path) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_debris_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".partial-00000001").mkdir()
    (tmp_path / ".partial-00000002" / "tensors").mkdir(parents=True)
    (tmp_path / ".partial-00000002" / "tensors" / "__0_0.distcp").write_text("cut")

    save_checkpoint(tmp_path, 2, make(2.0))

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("limit", [100, 3000])  # bytes: of the tensors, of what comes after them
def test_a_full_disk_leaves_the_older_checkpoint_and_no_debris(tmp_path: Path, limit: int) -> None:
    whole = save_checkpoint(tmp_path, 1, make(1.0))
    second = Checkpoint(make(2.0).tensors, {"step": 2, "rest": "x" * 5000})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 must be .*File too large.*step-0*1\. "):
            save_checkpoint(tmp_path, 2, second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    assert read_state(find_checkpoint(tmp_path)) == {"step": 1}


def test_a_folder_cut_off_before_its_state_is_no_checkpoint(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 1, make(1.0))
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / ".partial-00000003").mkdir()

    assert find_checkpoint(tmp_path) == whole


def test_a_place_without_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint found in .*expected state\.json"):
        find_checkpoint(tmp_path)
