"""The examples run as a reader would run them; order and count are asserted."""

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from examples import collate, dataset, huggingface_rows, open_clip_loss, plan_and_show
from navit import NaViT, NaViTConfig
from navit.model.classifier import Classifier, ClassifierConfig
from packer import PackerConfig, PackingCollator, write_shards
from tests.helpers.public_models import make_model

# Python 3.12 and later warn where a process that runs threads (torch) forks DataLoader workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def encoded_pairs(count: int, *, broken: int) -> list[tuple[bytes, str]]:
    """Make a map-style dataset of encoded images of different sizes, one of them cut short."""
    pairs = []
    for index in range(count):
        buffer = BytesIO()
        colour = (10 * index, 255 - 10 * index, 128)
        Image.new("RGB", (32 + 8 * index, 64), colour).save(buffer, "PNG")
        data = buffer.getvalue()
        pairs.append((data[: len(data) // 2] if index == broken else data, f"caption {index}"))
    return pairs


def test_collate_returns_captions_and_vectors_in_the_datasets_order() -> None:
    captions, vectors = collate.encode(encoded_pairs(19, broken=-1))
    assert captions == [f"caption {index}" for index in range(19)]
    assert vectors.shape == (19, 64)
    assert bool(vectors.isfinite().all())


def test_collate_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, collate.__file__], capture_output=True, text=True, check=False, timeout=90
    )
    assert done.stdout == "24 captions, vectors (24, 64)\n", done.stderr


def test_collate_leaves_out_a_broken_image_with_its_caption_and_nothing_else() -> None:
    torch.manual_seed(0)
    captions, vectors = collate.encode(encoded_pairs(19, broken=9))
    assert captions == [f"caption {index}" for index in range(19) if index != 9]
    assert len(vectors) == 18

    torch.manual_seed(0)
    whole_captions, whole = collate.encode(encoded_pairs(19, broken=-1))
    assert len(whole_captions) == len(whole) == 19
    others = torch.tensor([index for index in range(19) if index != 9])
    torch.testing.assert_close(vectors, whole[others], rtol=0, atol=1e-5)


def test_a_collators_batches_give_each_image_the_vector_it_gets_alone() -> None:
    pairs = encoded_pairs(6, broken=-1)
    collator = PackingCollator(PackerConfig(patch_size=16, seq_len=64))
    torch.manual_seed(0)
    model = NaViT(NaViTConfig.named("tiny", patch_size=16)).eval()
    with torch.inference_mode():
        loader = DataLoader(pairs, batch_size=6, num_workers=2, collate_fn=collator)
        packed = torch.cat([model(batch).pooled for batch in loader])
        alone = torch.cat([model(collator([pair])).pooled for pair in pairs])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_a_planned_epoch_holds_every_image_once_on_ranks_of_equal_length() -> None:
    sizes = [(64 + 8 * i, 160 - 4 * i) for i in range(30)]
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    epochs = dataset.run([(image, f"caption {i}") for i, image in enumerate(images)], sizes)
    assert len(epochs) == 2
    for ranks in epochs:
        assert [len(batches) for batches in ranks] == [len(ranks[0])] * dataset.RANKS
        texts = [text for batches in ranks for batch in batches for text in batch.texts or ()]
        assert sorted(texts) == sorted(f"caption {i}" for i in range(30))
    first, second = ([batch.keys for batch in ranks[0]] for ranks in epochs)
    assert first != second


def test_the_dataset_example_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, dataset.__file__], capture_output=True, text=True, check=False, timeout=90
    )
    assert re.fullmatch(
        r"(epoch \d: 500 images in \d+ steps of 2 ranks, padding .*%, imbalance .*%\n){2}",
        done.stdout,
    ), done.stderr


def test_undecoded_rows_keep_their_order_and_lose_only_the_broken_ones() -> None:
    rows = huggingface_rows.undecoded_rows(19)
    rows[9]["image"]["bytes"] = rows[9]["image"]["bytes"][:300]
    rows[12]["image"] = {"bytes": None, "path": "no/such/file.jpg"}
    batches = huggingface_rows.batches(rows)
    texts = [text for batch in batches for text in batch.texts or ()]
    assert texts == [f"picture {i}" for i in range(19) if i not in (9, 12)]
    assert [batch.stats.skipped for batch in batches] == [
        {},
        {"missing_image": 1, "decode_error": 1},
        {},
    ]


def test_decoded_rows_pack_into_the_same_patches_as_undecoded_ones() -> None:
    rows = huggingface_rows.undecoded_rows(6)
    decoded = [
        {"image": Image.open(BytesIO(row["image"]["bytes"])), "text": row["text"]} for row in rows
    ]
    (undecoded,) = huggingface_rows.batches(rows)
    (batch,) = huggingface_rows.batches(decoded)
    assert batch.texts == undecoded.texts
    assert torch.equal(batch.patches, undecoded.patches)


def test_the_rows_example_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, huggingface_rows.__file__],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert re.findall(r"picture \d+ to picture (\d+): \d+ sequences", done.stdout) == [
        "7",
        "15",
        "23",
    ], done.stderr


def test_a_plan_places_every_image_once_and_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = PackerConfig(patch_size=16, seq_len=300, max_tokens=200, max_images_per_seq=3)
    sequences = plan_and_show.plan(config)
    placed = [image.key for sequence in sequences for image in sequence]
    assert sorted(placed) == sorted(plan_and_show.SIZES)
    assert all(len(sequence) <= 3 for sequence in sequences)
    assert all(sum(image.num_kept for image in sequence) <= 300 for sequence in sequences)

    plan_and_show.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in plan_and_show.SIZES)
    bars = [line for line in shown.splitlines() if " of 512: " in line]
    assert bars
    assert all(len(re.findall("[█▒·]", line)) == 64 for line in bars)


def test_the_readmes_snippets_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    snippets = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(snippets) == 7
    pairs = encoded_pairs(10, broken=-1)
    samples = [{"image": image, "caption": caption} for image, caption in pairs]
    write_shards(samples, tmp_path / "shards" / "pairs-%05d.tar", samples_per_shard=5)
    monkeypatch.chdir(tmp_path)
    make_model("siglip2").save_pretrained(tmp_path / "checkpoints" / "siglip2")
    names: dict[str, Any] = {
        "dataset": pairs,
        "sizes": [(64, 32 + 8 * index) for index in range(10)],
        "images": [image for image, _ in pairs],
        "trained": NaViT(NaViTConfig.named("tiny", patch_size=16)),
        "classifier": Classifier(ClassifierConfig(NaViTConfig.named("tiny", patch_size=16), 3)),
    }
    for snippet in snippets:
        exec(snippet, names)
    assert names["output"].pooled.shape == (10, 384)
    assert names["packed"].epoch == 1
    assert sum(batch.num_images for batch in names["packed"]) == 10
    assert names["vectors"].shape == (10, names["encoder"].config.width)
    assert names["flexible"].config.patch_buffer == 32
    assert names["answers"].logits.shape == (10, 3)
    assert set(names["answers"].stages.tolist()) <= {0, 1, 2}
    assert names["stored"]["batches"] == 2
    assert len(names["stored"]["streams"]) == 2


def test_the_losses_for_open_clip_are_the_dense_ones(capsys: pytest.CaptureFixture[str]) -> None:
    open_clip_loss.main()
    numbers = re.findall(r"\d+\.\d+(?:e-\d+)?", capsys.readouterr().out)
    assert len(numbers) == 6
    for loss, dense, difference in (map(float, numbers[:3]), map(float, numbers[3:])):
        assert loss == pytest.approx(dense, rel=2e-6)
        assert difference < 1e-8
    image, text, scale = torch.eye(4), torch.eye(4), torch.tensor(3.0)
    bias = torch.tensor(-2.0, requires_grad=True)
    # As open_clip's trainer calls them: what the model returned by name, and output_dict.
    given = {"image_features": image, "text_features": text, "logit_scale": scale}
    given |= {"logit_bias": bias, "output_dict": True}
    told = open_clip_loss.TiledClipLoss()(**given)["contrastive_loss"]
    assert told.item() == pytest.approx(0.1392, abs=1e-4)  # ln(1 + 3 e^-3)
    assert torch.autograd.grad(told, bias)[0] == 0
    told = open_clip_loss.TiledSigLipLoss()(**given)["contrastive_loss"]
    # ln(1 + e^-1) for the pair, ln(1 + e^-2) for each of the three others
    assert told.item() == pytest.approx(0.3133 + 3 * 0.1269, abs=1e-4)
