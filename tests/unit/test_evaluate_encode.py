import io
import json
import logging
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from navit.evaluate.encode import EncodedImages, encode_images, read_metadata, text_encoder
from navit.evaluate.prompts import evaluate_prompts
from packer.batch import BatchStats, PackedBatch, PackedText
from packer.captions import CaptionTokenizer, pack_text


class FakeModel(nn.Module):
    """Each image's vector is that of the colour of its one patch; a text's that of its first id."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(1.0)
        self.frozen = nn.Dropout(1.0).eval()
        self.modes: list[bool] = []

    def encode_image(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        vectors = torch.zeros(batch.num_images, 8)
        filled = batch.image_index >= 0
        vectors[batch.image_index[filled], batch.patches[..., 0][filled].long()] = 1.0
        return self._finish(vectors, normalize)

    def encode_text(self, captions: PackedText, *, normalize: bool = True) -> Tensor:
        first = captions.ids[captions.cu_seqlens[:-1].long()]
        return self._finish(nn.functional.one_hot(first % 8, 8).float(), normalize)

    def _finish(self, vectors: Tensor, normalize: bool) -> Tensor:
        self.modes.append(self.training)
        assert normalize
        assert torch.is_inference_mode_enabled()
        return self.dropout(vectors) * self.scale


def make_batch(numbers: Sequence[int], start: int = 0) -> PackedBatch:
    """One sequence; image i is one patch of colour `numbers[i]` with the caption that says so."""
    n = len(numbers)
    patches = torch.zeros(1, n, 3, dtype=torch.uint8)
    patches[0] = torch.tensor(numbers, dtype=torch.uint8).reshape(n, 1)
    batch = PackedBatch(
        patches=patches,
        patch_size=1,
        segment_ids=torch.arange(1, n + 1, dtype=torch.int32)[None],
        position_ids=torch.zeros(1, n, 2, dtype=torch.int32),
        grid_sizes=torch.ones(1, n, 2, dtype=torch.int32),
        image_index=torch.arange(n)[None],
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32),
        segment_lengths=(1,) * n,
        keys=tuple(f"s.tar/{start + i}" for i in range(n)),
        texts=tuple(f"number {number}" for number in numbers),
        captions=pack_text([[number, 0] for number in numbers]),
    )
    batch.check()
    return batch


def encode_all(model: FakeModel, batches: Iterable[PackedBatch], **options: Any) -> EncodedImages:
    def encode(batch: PackedBatch) -> dict[str, Tensor]:
        return {"embedding": model.encode_image(batch, normalize=True)}

    options = {"device": "cpu", "progress": False, **options}
    return EncodedImages.join(list(encode_images(model, encode, batches, **options)))


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_images_come_out_in_order_and_empty_batches_are_passed_over(chunk_size: int) -> None:
    batches = [make_batch([3, 1]), make_batch([]), make_batch([2], start=2)]

    found = encode_all(FakeModel(), batches, chunk_size=chunk_size)

    torch.testing.assert_close(found.vectors["embedding"], torch.eye(8)[[3, 1, 2]], rtol=0, atol=0)
    assert found.keys == ("s.tar/0", "s.tar/1", "s.tar/2")
    assert found.texts == ("number 3", "number 1", "number 2")
    assert found.labels.tolist() == [-1, -1, -1]
    assert not found.vectors["embedding"].is_inference()


def test_parts_are_given_as_they_fill_and_their_counts_add_up() -> None:
    counted = [
        replace(make_batch([1] * n), stats=BatchStats(images=n, samples_read=n)) for n in (2, 3, 1)
    ]
    model = FakeModel()
    parts = list(
        encode_images(
            model,
            lambda batch: {"v": model.encode_image(batch)},
            counted,
            "cpu",
            chunk_size=4,
            progress=False,
        )
    )

    assert [len(part.keys) for part in parts] == [5, 1]
    assert sum((part.stats for part in parts), BatchStats()).images == 6
    assert all(part.seconds >= part.model_seconds > 0 for part in parts)


def test_labels_come_along() -> None:
    batch = replace(make_batch([1, 2]), labels=torch.tensor([7, 0]))

    assert encode_all(FakeModel(), [batch, make_batch([3])]).labels.tolist() == [7, 0, -1]
    several = replace(make_batch([1]), labels=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="class indices, one an image; got 3 targets"):
        encode_all(FakeModel(), [several])


def test_no_images_give_no_vectors() -> None:
    found = encode_all(FakeModel(), iter([make_batch([])]))

    assert dict(found.vectors) == {}
    assert found.keys == found.texts == ()
    assert found.labels.shape == (0,)


def test_every_module_returns_to_the_mode_it_was_in() -> None:
    model = FakeModel()

    encode_all(model, [make_batch([1]), make_batch([2])])

    assert model.modes == [False, False]
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_the_mode_returns_after_an_error() -> None:
    model = FakeModel()
    batch = make_batch([9])  # the fake knows eight colours

    with pytest.raises(IndexError):
        encode_all(model, [batch])

    assert model.training


def test_vectors_are_float32_under_autocast() -> None:
    found = encode_all(FakeModel(), [make_batch([1])], autocast_dtype=torch.bfloat16)

    assert found.vectors["embedding"].dtype == torch.float32


def test_a_progress_bar_is_shown_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    encode_all(FakeModel(), [make_batch([1])])
    assert capsys.readouterr().err == ""
    encode_all(FakeModel(), [make_batch([1])], progress=True, title="validation")
    assert "validation" in capsys.readouterr().err


def test_prompts_pass_through_tokenizer_and_model_in_chunks() -> None:
    tokenizer = CaptionTokenizer.train(["cat dog"] * 3, vocab_size=300)
    model = FakeModel()
    encode = text_encoder(model, tokenizer, 8, "cpu", batch_size=2)

    vectors = encode(["cat", "dog", "cat", "dog", "cat"])

    first = [tokenizer.encode([text], 8)[0][0] % 8 for text in ("cat", "dog")]
    torch.testing.assert_close(vectors, torch.eye(8)[[first[i] for i in (0, 1, 0, 1, 0)]])
    assert len(model.modes) == 3
    assert model.training
    result = evaluate_prompts(
        torch.eye(8)[[first[1]]],
        ["k"],
        {"k": {"set": "s", "class_name": "dog"}, "other": {"set": "s", "class_name": "cat"}},
        encode,
        templates=["{}"],
    )
    assert result["s/prompt_accuracy@1"] == float(first[0] != first[1])


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_metadata_has_the_keys_of_the_stream(tmp_path: Path) -> None:
    one = write_tar(
        tmp_path / "a-0.tar",
        {
            "000000.jpg": b"x",
            "000000.json": json.dumps({"set": "s", "orig_width": 3}).encode(),
            "000001.jpg": b"x",
            "sub/a.b.json": b'{"n": 1}',
        },
    )
    two = write_tar(
        tmp_path / "a-1.tar", {"./000000.JSON": '{"name": "Café"}'.encode(), "._0.json": b"{}"}
    )

    assert read_metadata([one, str(two)]) == {
        "a-0.tar/000000": {"set": "s", "orig_width": 3},
        "a-0.tar/sub/a.b": {"n": 1},
        "a-1.tar/000000": {"name": "Café"},
    }
    assert read_metadata([one], keep=("set", "n")) == {
        "a-0.tar/000000": {"set": "s"},
        "a-0.tar/sub/a.b": {"n": 1},
    }


def test_broken_json_costs_its_own_sample_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {"0.json": b"{", "1.json": b"[1]", "2.json": b"\xff\xfe\xff", "3.json": b'{"n": 3}'},
    )

    with caplog.at_level(logging.WARNING):
        assert read_metadata([shard]) == {"a.tar/3": {"n": 3}}
    assert "a.tar/0" in caplog.text


@pytest.mark.parametrize("cut", [0, 100, 512 * 2 + 100, 512 * 3])
def test_a_cut_shard_gives_what_lies_before_the_cut(tmp_path: Path, cut: int) -> None:
    shard = write_tar(tmp_path / "a.tar", {"0.json": b'{"n": 0}', "1.json": b'{"n": 1}'})
    shard.write_bytes(shard.read_bytes()[:cut])

    assert read_metadata([shard]) == ({"a.tar/0": {"n": 0}} if cut >= 1024 else {})


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metadata([tmp_path / "none.tar"])
