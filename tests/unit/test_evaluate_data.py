import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from navit.evaluate.data import ImageSet, read_image_set, read_lines
from navit.evaluate.encode import read_metadata
from navit.evaluate.labels import ClassNumbers
from packer import PackerConfig
from packer.shards import write_shards
from tests.helpers.samples import image_samples, png

PACKING = PackerConfig(patch_size=8, seq_len=64)


def write_layout(
    root: Path, splits: Mapping[str, int], *, files: Mapping[str, str] | None = None
) -> Path:
    """Write a data set as CLIP_benchmark's exporter does: three samples a shard."""
    for split, count in splits.items():
        samples = [{**sample, "label": i % 2} for i, sample in enumerate(image_samples(count))]
        paths = write_shards(samples, root / split / "%d.tar", samples_per_shard=3)
        (root / split / "nshards.txt").write_text(f"{len(paths)}\n")
    for name, text in (files or {}).items():
        (root / name).write_text(text)
    return root


def keys_of(images: ImageSet) -> list[str]:
    return sorted(key for batch in images.batches(PACKING, 2) for key in batch.keys)


def test_clip_benchmarks_layout_is_read_as_it_is(tmp_path: Path) -> None:
    root = write_layout(
        tmp_path / "set",
        {"test": 7, "train": 4},
        files={
            "classnames.txt": "cat\nbull dog \n",
            "zeroshot_classification_templates.txt": "a photo of a {c}.\na {c}\n\n",
            "dataset_type.txt": "classification\n",
        },
    )

    found = read_image_set([root])

    assert [Path(path).name for path in found.shards] == ["0.tar", "1.tar", "2.tar"]
    assert found.labelled
    assert found.class_names == ("cat", "bull dog")
    assert found.templates == ("a photo of a {c}.", "a {c}")
    assert len(keys_of(found)) == 7
    train = read_image_set([root], split="train")
    assert train == read_image_set([root / "train"])
    # The shards of two splits have the same names: only the same file is the same shard.
    assert len(train.without(found).shards) == len(train.shards) == 2


def test_ten_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = write_layout(tmp_path, {"test": 31})

    assert [Path(path).stem for path in read_image_set([root]).shards] == list(map(str, range(11)))


def test_a_retrieval_set_has_a_caption_a_line(tmp_path: Path) -> None:
    root = write_layout(tmp_path, {"test": 3}, files={"dataset_type.txt": "Retrieval"})

    assert (read_image_set([root]).caption_lines, read_image_set([root]).labelled) == (True, False)
    assert not read_image_set([root], captions="whole").caption_lines
    assert read_image_set([root], kind="classes").labelled


def test_what_the_first_sample_has_says_what_plain_shards_are(tmp_path: Path) -> None:
    samples = image_samples(4)
    bare = [{k: v for k, v in sample.items() if k != "caption"} for sample in samples]
    pairs = write_shards(samples, tmp_path / "p-%d.tar", samples_per_shard=9)
    classes = write_shards(bare, tmp_path / "c-%d.tar", samples_per_shard=9)

    assert not read_image_set(pairs).labelled
    assert read_image_set(classes).labelled
    assert read_image_set(pairs, kind="classes").labelled
    assert read_image_set(pairs, captions="lines").caption_lines


def test_a_folder_a_class_names_its_labels(tmp_path: Path) -> None:
    for index, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(16, 16, index))

    found = read_image_set([tmp_path])

    assert (found.class_names, found.labelled) == (("ant", "bee"), True)
    assert keys_of(found) == ["ant/x.png", "bee/x.png"]
    with pytest.raises(ValueError, match="must be others than the validation images"):
        found.without(found)


def test_labelled_images_need_no_caption_and_no_image_is_lost_for_one(tmp_path: Path) -> None:
    samples = image_samples(9)
    for sample in samples[::2]:
        del sample["caption"]
    shards = write_shards(samples, tmp_path / "s-%d.tar", samples_per_shard=9)

    batches = list(read_image_set(shards, kind="classes").batches(PACKING, 2))

    assert sum(batch.num_images for batch in batches) == 9
    assert sorted(int(x) for batch in batches for x in batch.labels) == list(range(9))


def test_workers_give_the_same_images(tmp_path: Path) -> None:
    found = read_image_set([write_layout(tmp_path, {"test": 7})])

    keys = sorted(key for batch in found.batches(PACKING, 2, workers=1) for key in batch.keys)
    assert keys == keys_of(found)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "val", r"one that .* holds, \['test'\]; got 'val'"),
        ({"dataset_type.txt": "multilabel"}, "test", "classification or retrieval; got 'multil"),
        ({"test/nshards.txt": "two"}, "test", "number of shards, 1 or more; got 'two'"),
        ({"test/nshards.txt": "3"}, "test", "every shard must exist"),
        ({"classnames.txt": "cat\n\ndog"}, "test", "one class name a line; got line 2 blank"),
        ({"classnames.txt": "\n"}, "test", "one class name a line; got none"),
    ],
)
def test_a_layout_that_is_wrong_is_named(
    files: dict[str, str], split: str, message: str, tmp_path: Path
) -> None:
    root = write_layout(tmp_path, {"test": 4}, files=files)

    with pytest.raises(ValueError, match=message):
        read_image_set([root], split=split)


def test_training_images_that_are_the_validation_images_are_refused(tmp_path: Path) -> None:
    shards = write_shards(image_samples(6), tmp_path / "s-%d.tar", samples_per_shard=2)
    val = read_image_set(shards[:1])

    assert read_image_set(shards).without(val).shards == tuple(shards[1:])
    with pytest.raises(ValueError, match="must be others than the validation images"):
        read_image_set(shards[:1]).without(val)


def test_lines_are_stripped_of_white_space(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(" café \nb\n\n", encoding="utf-8")

    assert read_lines(tmp_path / "x.txt", "name") == ("café", "b")


def test_classes_are_numbered_alike_in_both_parts(tmp_path: Path) -> None:
    val = {"v": {"set": "pets", "class_name": "dog"}, "w": {"class_name": "x"}, "n": {}}
    train = {"t": {"set": "pets", "class_name": "cat"}}
    numbers = ClassNumbers(val, train)

    found = numbers.members(["w", "n", "v", "own"], torch.tensor([-1, -1, -1, 4]), val)

    assert {name: (m.rows.tolist(), m.classes.tolist()) for name, m in found.items()} == {
        "all": ([0], [0]),
        "cls": ([3], [4]),
        "pets": ([2], [1]),
    }
    trained = numbers.members(["t"], torch.tensor([-1]), train)
    assert trained["pets"].classes.tolist() == [0]


def test_only_the_fields_in_use_are_kept_of_the_json(tmp_path: Path) -> None:
    samples = [{**s, "json": {"set": "a", "url": "long"}} for s in image_samples(2)]
    shards = write_shards(samples, tmp_path / "s-%d.tar", samples_per_shard=9)

    assert list(read_image_set(shards).metadata().values()) == [{"set": "a"}] * 2
    assert json.dumps(read_metadata(shards)).count("long") == 2
