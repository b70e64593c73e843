"""A model and a data set laid out by CLIP_benchmark to every metric, against plain references."""

import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.__main__ import main as navit_main
from navit.evaluate.encode import read_metadata
from navit.evaluate.run import evaluate_clip
from packer import PackerConfig, PackingCollator
from packer.captions import CaptionTokenizer, pack_text
from packer.shards import write_shards
from tests.helpers.samples import encode_png

NAMES = ("red ant", "green bee", "blue crab")
TEMPLATES = ("a photo of a {c}.", "the {c}")
BUDGETS = (4, 9)


def coloured(count: int, seed: int) -> list[dict[str, Any]]:
    """Images in which one of three colours is the class, with one to three captions each."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        label = i % 3
        height, width = rng.integers(2, 6, 2) * 8
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        pixels[..., label] += 120
        # The third image says what the first does: identical captions are hits of one another.
        lines = [f"{NAMES[label]} number {i if i != 3 else 0} seen {j}" for j in range(i % 3 + 1)]
        samples.append(
            {"key": f"s{i:07d}", "image": encode_png(pixels), "label": label, "lines": lines}
        )
    return samples


class World(NamedTuple):
    """What the tests share."""

    model: Path
    classes: Path
    retrieval: Path
    val: list[dict[str, Any]]
    train: list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("evaluate")
    val, train = coloured(15, 0), coloured(36, 1)
    for name, retrieval in (("classes", False), ("retrieval", True)):
        for split, samples in (("test", val), ("train", train)):
            members = [
                {**s, "label": None, "caption": "\n".join(s["lines"])} if retrieval else s
                for s in samples
            ]
            paths = write_shards(members, root / name / split / "%d.tar", samples_per_shard=10)
            (root / name / split / "nshards.txt").write_text(str(len(paths)))
    (root / "classes" / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    templates = root / "classes" / "zeroshot_classification_templates.txt"
    templates.write_text("\n".join(TEMPLATES) + "\n")
    (root / "retrieval" / "dataset_type.txt").write_text("retrieval")

    tokenizer = CaptionTokenizer.train((line for s in train for line in s["lines"]), 300)
    torch.manual_seed(0)
    config = CLIPConfig(
        NaViTConfig.named("tiny", patch_size=8),
        TextConfig.named("tiny", vocab_size=tokenizer.vocab_size, max_tokens=40),
        embed_dim=16,
    )
    CLIP(config).save_pretrained(root / "model")
    tokenizer.save(root / "model" / "tokenizer.json")
    return World(root / "model", root / "classes", root / "retrieval", val, train)


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def navit(*arguments: str | Path) -> Done:
    """Run a command in this process: starting one takes longer than these evaluations."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["navit", *map(str, arguments)])
        try:
            status = navit_main()
        except SystemExit as end:  # a setting that its own check refuses
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def alone(
    world: World,
    samples: list[dict[str, Any]],
    budget: int,
    patch_size: int = 8,
    model: CLIP | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode images one by one: the tower's vectors and the normalised embeddings."""
    model = (model or CLIP.from_pretrained(world.model)).eval()
    packing = PackerConfig(patch_size=patch_size, seq_len=max(64, budget), max_tokens=budget)
    collate = PackingCollator(packing)
    with torch.no_grad():
        batches = [collate([{"image": s["image"], "key": s["key"]}]) for s in samples]
        pooled = torch.cat([model.vision(batch).pooled for batch in batches])
        image = torch.cat([model.encode_image(batch, normalize=True) for batch in batches])
    return pooled, image


def texts_alone(world: World, texts: list[str]) -> Tensor:
    model = CLIP.from_pretrained(world.model).eval()
    tokenizer = CaptionTokenizer.from_file(world.model / "tokenizer.json")
    with torch.no_grad():
        return torch.cat(
            [model.encode_text(pack_text(tokenizer.encode([t], 40)), normalize=True) for t in texts]
        )


def share_above(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of rows with fewer than k wrong entries at least as good as the best right one."""
    found = [
        sum(bool(s >= row[hits].max()) for s in row[~hits]) < k
        for row, hits in zip(scores, right, strict=True)
    ]
    return sum(found) / len(found)


def test_zero_shot_and_probes_are_what_they_are_defined_as(world: World, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = navit(
        *("evaluate", world.model, "--shards", world.classes, "--train-shards", world.classes),
        *("--max-tokens", *map(str, BUDGETS), "--json", out, "--progress", "off"),
        *("--shots", "2", "--neighbours", "5"),
    )
    assert done.returncode == 0, done.stderr
    for text in ("cls, 3 classes", "caption prompts", "2-shot", "linear probe", "token budget"):
        assert text in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(out.read_text())
    assert found["data"]["templates"] == list(TEMPLATES)
    assert found["settings"]["max_tokens"] == list(BUDGETS)
    assert [result["max_tokens"] for result in found["results"]] == list(BUDGETS)

    own = torch.tensor([s["label"] for s in world.val])
    right = own[:, None] == torch.arange(3)
    train_classes = torch.tensor([s["label"] for s in world.train])
    for result in found["results"]:
        metrics, budget = result["metrics"], result["max_tokens"]
        pooled, image = alone(world, world.val, budget)
        prompts = [t.replace("{c}", name) for name in NAMES for t in TEMPLATES]
        per_class = texts_alone(world, prompts).view(3, 2, -1).mean(1)
        scores = image @ (per_class / per_class.norm(dim=1, keepdim=True)).T
        assert metrics["cls/prompt_accuracy@1"] == pytest.approx(share_above(scores, right, 1))
        recalls = [share_above(scores[own == c], right[own == c], 1) for c in range(3)]
        assert metrics["cls/prompt_class_recall"] == pytest.approx(sum(recalls) / 3)

        train = alone(world, world.train, budget)[0]
        unit = [x / x.norm(dim=1, keepdim=True) for x in (pooled, train)]
        near = (unit[0] @ unit[1].T).topk(5, dim=1)
        votes = torch.zeros(len(own), 3)
        for row, (values, places) in enumerate(zip(near.values, near.indices, strict=True)):
            for value, place in zip(values, places, strict=True):
                votes[row, train_classes[place]] += math.exp(value / 0.07 - 14)
        assert metrics["cls/knn_accuracy@1"] == pytest.approx(share_above(votes, right, 1))
        assert metrics["cls/linear_accuracy@1"] > 0.9  # a random tower keeps the colour
        assert metrics["cls/2_shot_accuracy@1"] > 0.6
        assert result["mean_tokens"] <= budget
        assert result["classes"] == {"cls": {"classes": 3, "images": 15, "train_images": 36}}
        assert result["stats"]["images"] == result["images"] == 15
        assert result["images_per_second"] > 0


def prompts_top_1(world: World, image: Tensor) -> float:
    prompts = [t.replace("{c}", name) for name in NAMES for t in TEMPLATES]
    per_class = texts_alone(world, prompts).view(3, 2, -1).mean(1)
    own = torch.tensor([s["label"] for s in world.val])
    scores = image @ (per_class / per_class.norm(dim=1, keepdim=True)).T
    return share_above(scores, own[:, None] == torch.arange(3), 1)


@pytest.mark.parametrize("is_flexible", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_patch_sizes_are_evaluated_as_images_alone_of_each_size_are(
    world: World, tmp_path: Path, is_flexible: bool
) -> None:
    model = CLIP.from_pretrained(world.model)
    folder = world.model
    if is_flexible:
        model, folder = model.flexible(16), tmp_path / "flexible"
        model.save_pretrained(folder)
        shutil.copy(world.model / "tokenizer.json", folder)
    out = tmp_path / "found.json"

    done = navit(
        *("evaluate", folder, "--shards", world.classes, "--json", out, "--progress", "off"),
        *("--patch-sizes", "16", "4", "8", "--metrics", "prompts"),
    )

    assert done.returncode == 0, done.stderr
    assert "patch size in pixels" in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(out.read_text())
    noted = [note for note in found["notes"] if "patches of 8 pixels alone" in note]
    assert len(noted) == (0 if is_flexible else 1)
    budget = PackerConfig(patch_size=8).patch_size ** 2 * 256  # pixels
    for result, size in zip(found["results"], (4, 8, 16), strict=True):
        assert (result["patch_size"], result["max_tokens"]) == (size, budget // size**2)
        at = model if is_flexible else model.at_patch_size(size)
        image = alone(world, world.val, result["max_tokens"], size, at)[1]
        assert result["metrics"]["cls/prompt_accuracy@1"] == prompts_top_1(world, image)
        sides = [Image.open(BytesIO(s["image"])).size for s in world.val]
        tokens = sum(max(w // size, 1) * max(h // size, 1) for w, h in sides)
        assert result["mean_tokens"] == pytest.approx(tokens / 15, abs=1e-3)


def test_budgets_and_patch_sizes_together_are_every_pair(world: World, tmp_path: Path) -> None:
    out = tmp_path / "found.json"

    done = navit(
        *("evaluate", world.model, "--shards", world.classes, "--json", out, "--progress", "off"),
        *("--patch-sizes", "4", "8", "--max-tokens", "9", "4", "--metrics", "prompts"),
    )

    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [(r["max_tokens"], r["patch_size"]) for r in results] == [(4, 4), (4, 8), (9, 4), (9, 8)]
    assert all(result["mean_tokens"] <= result["max_tokens"] for result in results)
    image = alone(world, world.val, 9)[1]
    assert results[3]["metrics"]["cls/prompt_accuracy@1"] == prompts_top_1(world, image)


def test_retrieval_with_a_caption_a_line_is_what_it_is_defined_as(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    done = navit(
        *("evaluate", world.model, "--shards", world.retrieval, "--json", out),
        *("--max-tokens", "9", "--progress", "off"),
    )
    assert done.returncode == 0, done.stderr
    assert "retrieval over 15 images, 30 captions" in done.stdout
    (result,) = json.loads(out.read_text())["results"]
    assert result["captions"] == 30

    texts = [line for s in world.val for line in s["lines"]]
    assert len(set(texts)) == 29
    right = torch.tensor([[text in s["lines"] for text in texts] for s in world.val])
    scores = alone(world, world.val, 9)[1] @ texts_alone(world, texts).T
    for k in (1, 5, 10):
        for direction, table, hits in (
            ("image_to_text", scores, right),
            ("text_to_image", scores.T, right.T),
        ):
            value = result["metrics"][f"{direction}/recall@{k}"]
            assert value == pytest.approx(share_above(table, hits, k))


def test_classes_in_the_json_are_prompted_and_probed_as_training_evaluates_them(
    world: World, tmp_path: Path
) -> None:
    """Both parts have a shard of the same name, and so samples of the same keys."""
    shards = {}
    for part, samples in (("val", world.val), ("train", world.train)):
        members = [
            {
                **{k: sample[k] for k in ("key", "image")},
                "caption": sample["lines"][0],
                "json": {"set": "zoo", "class_name": NAMES[sample["label"]], "width": 8 + i % 3},
            }
            for i, sample in enumerate(samples)
        ]
        for member, size in zip(members, (8, 16) * 99, strict=False):
            member["json"]["height"] = size
        shards[part] = write_shards(members, tmp_path / part / "%d.tar", samples_per_shard=99)
    out = tmp_path / "found.json"

    done = navit(
        *("evaluate", world.model, "--shards", *shards["val"], "--max-tokens", "9"),
        *("--train-shards", *shards["train"], "--json", out, "--progress", "off"),
    )

    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert result["classes"]["zoo"] == {"classes": 3, "images": 15, "train_images": 36}
    assert result["metrics"]["zoo/linear_accuracy@1"] > 0.9
    trained = evaluate_clip(
        CLIP.from_pretrained(world.model),
        CaptionTokenizer.from_file(world.model / "tokenizer.json"),
        shards["val"],
        PackerConfig(patch_size=8, seq_len=64, max_tokens=9, max_text_tokens=40),
        sequences_per_batch=4,
        device=torch.device("cpu"),
        train_metadata={f"t/{k}": v for k, v in read_metadata(shards["train"]).items()},
        progress=False,
    )
    assert "zoo/shape_accuracy@1" in trained.metrics
    common = {name: result["metrics"][name] for name in trained.metrics}
    assert common == pytest.approx(trained.metrics)


def test_a_model_without_text_is_probed_alone(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    NaViT(NaViTConfig.named("tiny", patch_size=8)).save_pretrained(tmp_path / "tower")

    alone = navit("evaluate", tmp_path / "tower", "--shards", world.classes)
    assert alone.returncode == 2
    assert "something must be measurable" in alone.stderr

    done = navit(
        *("evaluate", tmp_path / "tower", "--shards", world.classes, "--progress", "off"),
        *("--train-shards", world.classes, "--metrics", "knn", "--max-tokens", "9"),
    )
    assert done.returncode == 0, done.stderr
    assert "nearest neighbours" in done.stdout
    assert "caption prompts" not in done.stdout
    assert "note: no text tower: image metrics alone" in done.stdout


def test_names_and_templates_come_from_files_and_are_missed_where_there_are_none(
    world: World, tmp_path: Path
) -> None:
    shards = [str(path) for path in sorted((world.classes / "test").glob("*.tar"))]
    arguments = ("evaluate", world.model, "--shards", *shards, "--progress", "off")
    assert "note: labels without names" in navit(*arguments).stdout

    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "templates.txt").write_text("one {c}\n")
    out = tmp_path / "found.json"
    done = navit(
        *arguments,
        *("--classes", tmp_path / "names.txt", "--templates", tmp_path / "templates.txt"),
        *("--json", out),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["data"]["templates"] == ["one {c}"]
    assert "cls/prompt_accuracy@1" in found["results"][0]["metrics"]

    (tmp_path / "names.txt").write_text("\n".join(NAMES[:2]))
    short = navit(*arguments, "--classes", tmp_path / "names.txt")
    assert short.returncode == 2
    assert "got label 2 and 2 names" in short.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "0"), "token budgets must be positive"),
        (("--patch-sizes", "0"), "patch sizes must be positive"),
        (("--sequences-per-batch", "0"), "sequences_per_batch must be at least 1"),
        (("--tokenizer", "none.json"), "none.json"),
        (("--train-shards", "SELF", "--train-split", "test"), "must be others"),
    ],
)
def test_a_wrong_setting_ends_with_a_message(
    world: World, arguments: tuple[str, ...], message: str
) -> None:
    given = [world.classes if argument == "SELF" else argument for argument in arguments]

    done = navit("evaluate", world.model, "--shards", world.classes, *given)

    assert done.returncode == 2
    assert message in done.stderr


def test_another_models_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    CaptionTokenizer.train(["abc abd " * 9 + "xyz xyw " * 9], 400).save(tmp_path / "t.json")
    small = tmp_path / "small"
    config = CLIPConfig(
        NaViTConfig.named("tiny", patch_size=8), TextConfig.named("tiny", vocab_size=10)
    )
    CLIP(config).save_pretrained(small)

    done = navit("evaluate", small, "--shards", world.classes, "--tokenizer", tmp_path / "t.json")

    assert done.returncode == 2
    assert "the tokenizer must be the model's, with at most 10 tokens" in done.stderr
