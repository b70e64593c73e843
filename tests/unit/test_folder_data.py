"""A folder's epochs, continued on other numbers of ranks: each image once an epoch."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from navit.train import data as module
from navit.train.config import TrainConfig
from navit.train.data import FolderData
from navit.train.ranks import World
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.folder import ImageFolder

CONFIG = TrainConfig(
    task="classify",
    packer=PackerConfig(patch_size=4, seq_len=16),
    sequences_per_batch=1,
    workers=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """23 images of 2 classes."""
    root = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for i in range(23):
        path = root / f"class-{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        rows, cols = generator.integers(1, 5, 2) * 4
        Image.fromarray(generator.integers(0, 256, (rows, cols, 3), dtype=np.uint8)).save(path)
    return ImageFolder.read(root)


def of_all_ranks(
    folder: ImageFolder, ranks: int, stored: dict[str, Any] | None
) -> list[FolderData]:
    """Make the data of each rank; without processes rank 0 cannot give its sizes to the others."""
    with pytest.MonkeyPatch.context() as patch:
        made: Callable[[World, Any], Any] = lambda world, make: make()  # noqa: E731
        patch.setattr(module, "from_main", made)
        worlds = [World(rank, ranks, rank, torch.device("cpu"), None) for rank in range(ranks)]
        return [
            FolderData(CONFIG, folder, world, stored=stored, progress=False) for world in worlds
        ]


def take(data: FolderData, steps: int) -> list[PackedBatch]:
    """Train on some batches; the loader has read one more when it stops."""
    batches = list(islice(iter(data), steps + 1))[:steps]
    for batch in batches:
        data.update(batch)
    return batches


@settings(max_examples=6)
@given(parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
def test_each_image_comes_once_an_epoch_whatever_ranks_go_on(
    folder: ImageFolder, parts: list[tuple[int, int]]
) -> None:
    counted: dict[int, Counter[str]] = {}
    stored = None
    for ranks, steps in [*parts, (2, 24)]:
        everyone = of_all_ranks(folder, ranks, stored)
        for data in everyone:
            epoch = data.epoch
            for batch in take(data, steps):
                counted.setdefault(epoch, Counter()).update(batch.keys)
                assert batch.state is not None
                epoch = batch.state["epoch"]
        positions = [data.to_dict() for data in everyone]
        stored = everyone[0].merged(positions)
        assert stored == positions[-1], "all ranks are at the same place"

    last = stored["epoch"]  # type: ignore[index]
    assert last >= 2, "there must be whole epochs to count"
    for epoch in range(last):
        assert counted[epoch] == Counter(folder.keys)


def test_a_position_is_of_what_was_trained_on_and_not_of_what_was_read(folder: ImageFolder) -> None:
    (data,) = of_all_ranks(folder, 1, None)
    batches = list(islice(iter(data), 3))
    data.update(batches[0])

    (resumed,) = of_all_ranks(folder, 1, data.to_dict())

    assert next(iter(resumed)).keys == batches[1].keys


def test_a_folder_that_has_changed_is_refused(folder: ImageFolder) -> None:
    (data,) = of_all_ranks(folder, 1, None)
    with pytest.raises(ValueError, match="must hold the 99 usable images the run began with"):
        of_all_ranks(folder, 1, {**data.to_dict(), "images": 99})


def test_files_left_out_are_counted_once_on_one_rank(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "class" / f"{name}.png")
    (tmp_path / "class" / "broken.png").write_bytes(b"no image")

    counts = [
        sum(sum(batch.stats.skipped.values()) for batch in take(data, 6))
        for data in of_all_ranks(ImageFolder.read(tmp_path), 2, None)
    ]

    assert counts == [1, 0]
