"""`navit embed`, from files to vectors: mixed inputs, kills, refusals, and the example."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples import embed_images as example
from navit.__main__ import main
from navit.embed import Embedder
from navit.embed.store import VectorStore
from navit.model import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.serialize import to_plain
from navit.train.checkpoint import Checkpoint, save_checkpoint
from navit.train.config import TrainConfig
from navit.train.ema import Ema
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop
from packer.shards import write_shards
from tests.helpers.samples import BROKEN, cut_png, noise, png

P = 8
SIDES = np.random.default_rng(3).integers(1, 50, (60, 2)).tolist()


def clip() -> CLIP:
    torch.manual_seed(1)
    vision = NaViTConfig.named("tiny", patch_size=P, pos_table_size=4)
    return CLIP(CLIPConfig(vision=vision, text=TextConfig.named("tiny"), embed_dim=24))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty files in a folder, ten in a list, thirty in two shards; one of each broken."""
    folder = tmp_path_factory.mktemp("data")
    clip().save_pretrained(folder / "model")
    for i, (height, width) in enumerate(SIDES[:30]):
        path = folder / ("photos" if i < 20 else "others") / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({7: BROKEN, 25: cut_png()}.get(i, png(height, width, i)))
    listed = sorted((folder / "others").rglob("*.png"), reverse=True)
    (folder / "list.txt").write_text("\n".join(map(str, [*listed, folder / "gone.png"])))
    samples = [
        {"key": f"{i}", "image": png(*SIDES[i], i) if i != 40 else cut_png(), "caption": "x"}
        for i in range(30, 60)
    ]
    write_shards(samples, folder / "s-%05d.tar", samples_per_shard=15)
    return folder


def inputs(data: Path) -> list[str]:
    return [f"{data}/photos", f"{data}/list.txt", f"{data}/s-{{00000..00001}}.tar"]


def embed(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    """Run the command in this process."""
    monkeypatch.setattr("sys.argv", ["navit", "embed", *map(str, args)])
    return main()


def options(out: Path, **changes: Any) -> list[str]:
    values = {"out": out, "chunk_size": 8, "workers": 0, "progress": "off"} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def contents(folder: Path) -> dict[str, Any]:
    """Return every file; of the manifest, what does not tell the time a call took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = "v.manifest.json"
    found[name] = {**json.loads(found[name]), "summary": None}
    return found


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        assert embed(patch, data / "model", *inputs(data), *options(folder / "v.npy")) == 1
    return folder


def test_every_image_has_the_vector_it_has_alone_beside_its_key(
    data: Path, undisturbed: Path
) -> None:
    vectors = np.load(undisturbed / "v.npy")
    keys = (undisturbed / "v.keys.txt").read_text().splitlines()
    files = sorted((data / "photos").rglob("*.png"))
    files += sorted((data / "others").rglob("*.png"), reverse=True)
    broken = {"07.png", "25.png"}
    expected_keys = [str(file) for file in files if file.name not in broken]
    images: list[Any] = [Path(key) for key in expected_keys]
    for i in range(30, 60):
        if i != 40:
            expected_keys.append(f"s-{(i - 30) // 15:05d}.tar/{i}")
            images.append(noise(*SIDES[i], i))

    assert keys == expected_keys
    assert vectors.dtype == np.float32
    embedder = Embedder(data / "model")
    alone = torch.cat([embedder.embed([image]).vectors for image in images])
    torch.testing.assert_close(torch.from_numpy(vectors), alone, rtol=0, atol=1e-5)


def test_failures_are_listed_with_their_cause(data: Path, undisturbed: Path) -> None:
    lines = (undisturbed / "v.failures.tsv").read_text().splitlines()
    found = [tuple(line.split("\t")[:2]) for line in lines]

    assert found == [
        ("key", "cause"),
        (f"{data}/photos/1/07.png", "decode_error"),
        (f"{data}/others/1/25.png", "decode_error"),
        (f"{data}/gone.png", "missing_image"),
        ("s-00000.tar/40", "decode_error"),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_processes_gives_the_same_bytes(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    arguments = options(tmp_path / "v.npy", workers=workers)
    assert embed(monkeypatch, data / "model", *inputs(data), *arguments) == 1

    assert contents(tmp_path) == contents(undisturbed)


def test_a_run_stopped_at_every_chunk_ends_with_the_bytes_of_one_that_was_not(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    original = VectorStore.append

    def append(self: VectorStore, *args: Any) -> None:
        original(self, *args)
        raise Stopped

    arguments = [data / "model", *inputs(data), *options(tmp_path / "v.npy")]
    monkeypatch.setattr(VectorStore, "append", append)
    chunks = json.loads((undisturbed / "v.manifest.json").read_text())["done"]["chunks"]
    for done in range(1, chunks + 1):
        with pytest.raises(Stopped):
            embed(monkeypatch, *arguments)
        assert json.loads((tmp_path / "v.manifest.json").read_text())["done"]["chunks"] == done
    monkeypatch.setattr(VectorStore, "append", original)
    assert embed(monkeypatch, *arguments) == 1

    assert chunks == 8
    assert contents(tmp_path) == contents(undisturbed)


def test_a_killed_process_is_continued_where_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shard behind the command does not come before the process is killed."""
    shard, flag = data / "s-00000.tar", tmp_path / "flag"
    waiting = f"pipe:while [ ! -e {flag} ]; do sleep 0.05; done; cat {shard}"
    arguments = [str(data / "model"), f"{data}/photos", waiting]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # A process that reads outlives the one that is killed, by seconds; it must not be in the way.
    out = options(killed / "v.npy", workers=1)
    command = [sys.executable, "-m", "navit", "embed", *arguments, *out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while _chunks_done(killed) != 3 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert _chunks_done(killed) == 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        flag.touch()
    assert not (killed / "v.npy").exists()

    assert embed(monkeypatch, *arguments, *options(killed / "v.npy")) == 1
    assert "going on after chunk 3 of 4: 20 images are done" in capsys.readouterr().err
    assert embed(monkeypatch, *arguments, *options(whole / "v.npy")) == 1
    assert contents(killed) == contents(whole)
    assert len(np.load(killed / "v.npy")) == 19 + 14


def _chunks_done(folder: Path) -> int:
    manifest = folder / "v.manifest.json"
    return json.loads(manifest.read_text())["done"]["chunks"] if manifest.exists() else 0


def test_a_finished_output_is_left_alone_and_says_so(
    data: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(undisturbed)
    arguments = [data / "model", *inputs(data), *options(undisturbed / "v.npy")]

    assert embed(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert "is finished already; --overwrite makes it anew" in captured.err
    assert "57 of 61 embedded, 4 failed" in captured.out
    assert contents(undisturbed) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-tokens", "9"], "packing.max_tokens was 16 and is 9"),
        (["--normalize"], "normalize was False and is True"),
        (["--precision", "bf16"], "precision was 'fp32' and is 'bf16'"),
        (["--dtype", "float16"], "dtype was"),
        (["--batch-tokens", "2048"], "batch_tokens was 16384 and is 2048"),
    ],
)
def test_other_settings_than_the_output_s_are_refused(
    data: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    before = contents(undisturbed)
    arguments = [data / "model", *inputs(data), *options(undisturbed / "v.npy"), *more]

    assert embed(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_other_weights_and_other_inputs_are_refused_too(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(9)
    CLIP(clip().config).save_pretrained(tmp_path / "model")
    arguments = options(undisturbed / "v.npy")

    assert embed(monkeypatch, tmp_path / "model", *inputs(data), *arguments) == 2
    assert "model was '" in capsys.readouterr().err
    assert embed(monkeypatch, data / "model", *inputs(data)[::-1], *arguments) == 2
    assert "inputs.sha256 was '" in capsys.readouterr().err


def test_overwrite_makes_the_output_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = f"{data}/others/2"  # three images, none broken
    for more in ([], ["--overwrite", "--normalize", "--dtype", "float16"]):
        assert embed(monkeypatch, data / "model", photos, *options(tmp_path / "o"), *more) == 0

    vectors = np.load(tmp_path / "o" / "vectors.npy")
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=2e-3)
    assert not (tmp_path / "o" / "failures.tsv").exists()
    assert "images/s" in capsys.readouterr().out


def test_nothing_is_written_where_no_image_of_the_first_chunk_can_be_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million paths relative to another folder end at once, and not with a million failures."""
    (tmp_path / "list.txt").write_text("".join(f"missing-{i}.jpg\n" for i in range(30)))

    arguments = [data / "model", tmp_path / "list.txt", *options(tmp_path / "o" / "v.npy")]
    assert embed(monkeypatch, *arguments) == 2
    assert "none is. The first: missing-0.jpg: missing_image" in capsys.readouterr().err
    assert list((tmp_path / "o").iterdir()) == []


def test_a_shard_without_samples_or_one_that_is_no_tar_does_not_stop_the_rest(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    (tmp_path / "text.tar").write_text("no shard")
    shards = [tmp_path / "empty.tar", tmp_path / "text.tar", data / "s-00001.tar"]

    assert embed(monkeypatch, data / "model", *shards, *options(tmp_path / "o")) == 1
    assert len(np.load(tmp_path / "o" / "vectors.npy")) == 15
    assert "text.tar\ttruncated_shard" in (tmp_path / "o" / "failures.tsv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "."], "folder"),
        (["{data}/model"], "at least one input"),
        (["{data}/model", "{data}/nowhere"], "does not exist"),
        (["{data}/model", "{data}/photos", "--chunk-size=0"], "chunk_size must be at least 1"),
        (["{data}/model", "{data}/photos", "--device=cuda"], "device"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_a_reason(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    filled = [argument.format(data=data) for argument in arguments]
    monkeypatch.chdir(data)

    assert embed(monkeypatch, *filled, "--out", tmp_path / "v.npy", "--progress=off") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Checkpoints


def test_a_run_is_embedded_with_its_own_packing_and_averaged_weights(tmp_path: Path) -> None:
    vision = NaViTConfig.named("tiny", patch_size=P)
    packing = PackerConfig(
        patch_size=P, seq_len=64, max_tokens=9, resize="allow_enlarge", token_drop=BetaDrop()
    )
    config = TrainConfig(
        task="classify", num_classes=3, packer=packing, model=CLIPConfig(vision=vision)
    )
    torch.manual_seed(0)
    models = [Classifier(ClassifierConfig(vision, 3)) for _ in range(2)]
    tensors = {"model": models[0].state_dict(), "ema": Ema(models[1]).tensors()}
    checkpoint = Checkpoint(tensors, {"config": to_plain(config), "step": 1})
    save_checkpoint(tmp_path / "checkpoints", 1, checkpoint)
    images = [noise(20, 30, i) for i in range(3)]

    for averaged, model in zip((False, True), models, strict=True):
        embedder = Embedder(tmp_path, averaged=averaged)
        assert embedder.packing == PackerConfig(
            patch_size=P, seq_len=1024, max_tokens=9, resize="allow_enlarge"
        )
        given = Embedder(model.vision)
        given.packing = embedder.packing
        assert torch.equal(embedder.embed(images).vectors, given.embed(images).vectors)


def test_a_siglip2_folder_is_embedded_on_its_processor_s_grids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.Siglip2VisionConfig(
        **sizes, num_attention_heads=2, patch_size=P, num_patches=16
    )
    theirs = transformers.Siglip2VisionModel(config).eval()
    theirs.save_pretrained(tmp_path)
    image = noise(4 * P, 2 * P, 5)  # a grid of the budget, so that neither side resamples
    stated = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 8}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | {"patch_size": P}))

    embedder = Embedder(tmp_path)

    assert (embedder.packing.max_tokens, embedder.packing.resize) == (8, "fill_budget")
    assert embedder.packing.decode == "full"
    patches = image.reshape(4, P, 2, P, 3).transpose(0, 2, 1, 3, 4).reshape(1, 8, -1)
    pixels = torch.from_numpy(patches.astype(np.float32)) / 127.5 - 1
    with torch.no_grad():
        expected = theirs(
            pixel_values=pixels,
            pixel_attention_mask=torch.ones(1, 8, dtype=torch.int64),
            spatial_shapes=torch.tensor([[4, 2]]),
        ).pooler_output
    torch.testing.assert_close(embedder.embed([image]).vectors, expected, rtol=0, atol=1e-5)


def test_the_example_finds_the_image_itself_and_its_likes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    NaViT(NaViTConfig.named("tiny", patch_size=P)).save_pretrained(tmp_path / "model")

    found = example.most_alike(str(tmp_path / "model"), str(data / "photos"), count=4)

    assert len(found) == 4
    assert found[0][0] == str(sorted((data / "photos").rglob("*.png"))[0])
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert [cosine for _, cosine in found] == sorted((c for _, c in found), reverse=True)
    script = [sys.executable, example.__file__, str(tmp_path / "model"), str(data / "photos")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120)
    assert len(done.stdout.splitlines()) == 5, done.stderr
