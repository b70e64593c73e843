"""`navit.embed_images` and `Embedder`: order, equality with each image alone, failures, memory."""

import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import navit
from navit.embed import EmbedConfig, Embedder, embed_images
from navit.embed.parts import check_images
from navit.model import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.sample import Sample
from tests.helpers.samples import BROKEN, cut_png, noise, png

P = 8


def tiny(**changes: Any) -> NaViT:
    torch.manual_seed(0)
    return NaViT(NaViTConfig.named("tiny", patch_size=P, pos_table_size=4, **changes))


def clip() -> CLIP:
    torch.manual_seed(0)
    vision = NaViTConfig.named("tiny", patch_size=P, pos_table_size=4)
    return CLIP(CLIPConfig(vision=vision, text=TextConfig.named("tiny"), embed_dim=24))


MODEL = tiny().eval()


def pictures(count: int, seed: int = 0, largest: int = 60) -> list[np.ndarray]:
    sides = np.random.default_rng(seed).integers(1, largest, (count, 2)).tolist()
    return [noise(height, width, seed * 1000 + i) for i, (height, width) in enumerate(sides)]


def alone(model: NaViT, images: list[Any]) -> torch.Tensor:
    """Embed each image in a batch of its own, through the collator."""
    config = PackerConfig(patch_size=P, seq_len=16, max_tokens=16)
    collate = PackingCollator(config)
    with torch.inference_mode():
        batches = [collate([{"image": image, "key": "k"}]) for image in images]
        return torch.cat([model(batch).pooled for batch in batches])


@settings(max_examples=20)
@given(count=st.integers(0, 25), seed=st.integers(0, 99), batch_tokens=st.integers(16, 4096))
def test_vectors_are_in_input_order_and_those_of_each_image_alone(
    count: int, seed: int, batch_tokens: int
) -> None:
    images = pictures(count, seed)

    vectors = embed_images(MODEL, images, batch_tokens=batch_tokens)

    assert vectors.dtype == torch.float32
    assert vectors.shape == (count, 64)
    if count:
        torch.testing.assert_close(vectors, alone(MODEL, images), rtol=0, atol=1e-5)


def test_an_image_gives_one_vector_whatever_it_comes_as(tmp_path: Path) -> None:
    pixels = noise(20, 30, 5)
    encoded = png(20, 30, 5)
    file = tmp_path / "image.png"
    file.write_bytes(encoded)
    forms: list[Any] = [
        pixels,
        torch.from_numpy(pixels),
        Image.fromarray(pixels),
        encoded,
        file,
        str(file),
        {"bytes": encoded, "path": None},
        {"image": pixels, "caption": "a picture"},
        (pixels, 3),
        Sample("own key", encoded),
    ]

    vectors = embed_images(MODEL, forms)

    torch.testing.assert_close(vectors, vectors[:1].expand(len(forms), -1), rtol=0, atol=1e-5)


def test_worker_processes_give_the_vectors_this_process_gives() -> None:
    images = pictures(600, largest=20)

    vectors = embed_images(MODEL, images, workers=2, batch_tokens=512)

    torch.testing.assert_close(vectors, embed_images(MODEL, images), rtol=0, atol=1e-5)
    broken = [*images[:299], cut_png(), *images[300:]]
    found = Embedder(MODEL, EmbedConfig(workers=2)).embed(broken, on_error="nan")
    assert [failure.index for failure in found.failures] == [299]
    assert found.vectors.isnan().all(1).nonzero().flatten().tolist() == [299]


def test_a_generator_with_workers_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"sequence, such as a list.*generator.*workers=0"):
        embed_images(MODEL, (image for image in pictures(2)), workers=1)


def test_a_generator_is_read_no_further_than_a_window_and_a_batch_ahead() -> None:
    """Five thousand images need not fit in memory: none is kept that has its vector."""
    model, read, embedded, furthest = tiny(), 0, 0, 0
    one = np.zeros((P, P, 3), np.uint8)

    def images() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(5000):
            read += 1
            yield one

    embedder = Embedder(model, EmbedConfig(max_tokens=4, batch_tokens=1024))
    original = model.forward

    def forward(batch: Any) -> Any:
        nonlocal embedded, furthest
        furthest = max(furthest, read - embedded)
        embedded += batch.num_images
        return original(batch)

    model.forward = forward  # type: ignore[method-assign]
    found = embedder.embed(images())

    assert len(found.vectors) == read == embedded == 5000
    window = PackerConfig().placement.window
    # An exact window may hold images of twice a sequence's tokens, here one token each.
    assert furthest <= max(window, 2 * 1024) + 1024


def test_the_pixels_of_what_is_embedded_are_let_go() -> None:
    model, batches, most = tiny(), list[weakref.ref[torch.Tensor]](), 0
    original = model.forward

    def forward(batch: Any) -> Any:
        nonlocal most
        batches.append(weakref.ref(batch.patches))
        most = max(most, sum(pixels() is not None for pixels in batches))
        return original(batch)

    embedder = Embedder(model, EmbedConfig(max_tokens=4, batch_tokens=1024))
    model.forward = forward  # type: ignore[method-assign]
    image = noise(2 * P, 2 * P)
    embedder.embed(image for _ in range(2000))

    assert len(batches) == 8
    assert most <= 2


# What goes wrong


def test_an_image_that_cannot_be_read_raises_and_names_its_place() -> None:
    for broken in (BROKEN, cut_png(), Path("nowhere.jpg"), None):
        images = [*pictures(3), broken, *pictures(2)]
        with pytest.raises(ValueError, match=r"image 3: .*on_error='nan'"):
            embed_images(MODEL, images)


@settings(max_examples=20)
@given(broken=st.sets(st.integers(0, 19), max_size=20), seed=st.integers(0, 9))
def test_rows_of_nan_stand_for_failures_and_the_others_are_as_without_them(
    broken: set[int], seed: int
) -> None:
    images: list[Any] = list(pictures(20, seed, largest=30))
    whole = [image for i, image in enumerate(images) if i not in broken]
    for i in broken:
        images[i] = BROKEN if i % 2 else cut_png()

    found = Embedder(MODEL).embed(images, on_error="nan")

    assert [failure.index for failure in found.failures] == sorted(broken)
    assert {failure.cause for failure in found.failures} <= {"decode_error"}
    assert found.stats.samples_read == 20
    assert found.stats.images == len(whole)
    assert sum(found.stats.skipped.values()) == len(broken)
    assert found.vectors.isnan().all(1).nonzero().flatten().tolist() == sorted(broken)
    kept = found.vectors[[i for i in range(20) if i not in broken]]
    torch.testing.assert_close(kept, embed_images(MODEL, whole), rtol=0, atol=1e-5)


def test_failures_are_logged_where_they_do_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    embed_images(MODEL, [BROKEN, *pictures(1)], on_error="nan")

    assert [record.getMessage().startswith("no vector for image 0") for record in caplog.records]


def test_a_vector_that_is_not_finite_is_a_failure_and_not_a_row() -> None:
    model = tiny()

    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = model

    forward = model.forward

    def spoil(batch: Any) -> Any:
        output = forward(batch)
        if batch.num_images > 1:
            output.pooled[batch.keys.index("2")] = torch.inf
        return output

    model.forward = spoil  # type: ignore[method-assign]
    embedder = Embedder(Spoiled())
    images = pictures(5)

    found = embedder.embed(images, on_error="nan")

    assert [(f.index, f.cause) for f in found.failures] == [(2, "not_finite")]
    assert found.vectors.isnan().all(1).tolist() == [False, False, True, False, False]
    assert found.stats.skipped == {"not_finite": 1}
    with pytest.raises(ValueError, match="image 2: not_finite"):
        embedder.embed(images)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (b"\xff\xd8", "bytes"),
        ("picture.jpg", "str"),
        (noise(8, 8), r"ndarray \(8, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"Tensor \(8, 8, 3\)"),
        ({"image": noise(8, 8)}, "dict"),
    ],
)
def test_a_single_image_is_refused_rather_than_taken_apart(images: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"must be several.*got {found}"):
        embed_images(MODEL, images)


@pytest.mark.parametrize("image", [Path("picture.jpg"), Image.new("RGB", (8, 8)), 3])
def test_what_cannot_be_gone_through_is_refused_too(image: Any) -> None:
    with pytest.raises(ValueError, match=f"must be several.*got {type(image).__name__}"):
        check_images(image, "raise")


def test_an_array_of_several_images_is_several_images() -> None:
    array = np.stack([noise(16, 24, i) for i in range(3)])
    torch.testing.assert_close(
        embed_images(MODEL, array), embed_images(MODEL, list(array)), rtol=0, atol=1e-6
    )


def test_what_is_no_image_is_an_error_also_where_failures_are_not() -> None:
    with pytest.raises(ValueError, match="image must be"):
        embed_images(MODEL, [3.5], on_error="nan")


# Models and settings


def test_a_clip_gives_its_image_vectors_and_of_length_1_where_asked() -> None:
    model, images = clip(), pictures(7)
    collate = PackingCollator(PackerConfig(patch_size=P, seq_len=128, max_tokens=16))
    batch = collate([{"image": image, "key": str(i)} for i, image in enumerate(images)])
    with torch.inference_mode():
        expected = model.eval().encode_image(batch)

    vectors = embed_images(model, images)
    unit = embed_images(model, images, normalize=True)

    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True))


def test_a_model_is_left_as_it_was() -> None:
    model = tiny(drop_path=0.5).train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    first = embed_images(model, pictures(4))

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(first, embed_images(model, pictures(4))), "nothing is dropped at random"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_path_gives_what_the_model_saved_there_gives(tmp_path: Path) -> None:
    model, images = clip(), pictures(5)
    model.save_pretrained(tmp_path / "weights")

    for path in (tmp_path / "weights", str(tmp_path / "weights")):
        assert torch.equal(embed_images(path, images), embed_images(model, images))
    with pytest.raises(FileNotFoundError, match="run folder, or a folder of weights"):
        Embedder(tmp_path)
    with pytest.raises(FileNotFoundError):
        Embedder(tmp_path / "nothing")


def test_a_loaded_model_is_float32_whatever_it_was_saved_in(tmp_path: Path) -> None:
    clip().half().save_pretrained(tmp_path / "half")

    assert {p.dtype for p in Embedder(tmp_path / "half").model.parameters()} == {torch.float32}


def test_bf16_is_asked_for_and_close() -> None:
    images = pictures(20)
    exact, rounded = (embed_images(MODEL, images, precision=p) for p in ("fp32", "bf16"))

    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded).min() > 0.99


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (16, "shrink_only", "reduced")),
        ({"pos_embed": "grid"}, (16, "fill_budget", "full")),
        ({"pos_embed": "grid", "pos_interpolation": "bicubic"}, (16, "allow_enlarge", "reduced")),
        # FlexiViT: 30 x 30 patches of 8 pixels, whatever its table's size.
        (
            {"pos_embed": "grid", "pool": "cls", "patch_buffer": 16},
            (900, "allow_enlarge", "reduced"),
        ),
    ],
)
def test_grids_and_budget_are_those_the_model_was_trained_on(
    changes: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    packing = Embedder(tiny(**changes)).packing

    assert (packing.max_tokens, packing.resize, packing.decode) == expected
    asked = Embedder(
        tiny(**changes), EmbedConfig(max_tokens=9, resize="allow_enlarge", decode="reduced")
    ).packing
    assert (asked.max_tokens, asked.resize, asked.decode) == (9, "allow_enlarge", "reduced")


def test_a_run_s_packing_is_kept_but_for_what_is_drawn_at_random() -> None:
    from packer.plan.drop import BetaDrop
    from packer.plan.patch_size import RandomPatchSize
    from packer.plan.resize import RandomCrop, UniformSide

    trained = PackerConfig(
        patch_size=4,
        seq_len=512,
        max_tokens=100,
        max_images_per_seq=3,
        max_aspect_ratio=2.0,
        resolution=UniformSide(),
        crop=RandomCrop(),
        token_drop=BetaDrop(),
        patch_sizes=RandomPatchSize(),
        resize="allow_enlarge",
        decode="full",
    )

    packing = EmbedConfig().packing(MODEL.config, trained=trained)

    assert packing == PackerConfig(
        patch_size=P, seq_len=1024, max_tokens=100, resize="allow_enlarge", decode="full"
    )
    assert EmbedConfig(max_tokens=2000).packing(MODEL.config, trained=trained).seq_len == 2000
    assert EmbedConfig().packing(MODEL.config, stated_tokens=77).max_tokens == 77


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a positive integer"),
        ({"batch_tokens": -1}, "batch_tokens must be a positive integer"),
        ({"max_tokens": 500, "batch_tokens": 400}, "batch_tokens must be at least max_tokens"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"precision": "fp16"}, "precision must be"),
        ({"device": "cuda"}, "must be on the device named"),
        ({"resize": "stretch"}, "resize must be one of"),
        ({"sequences": 3}, r"has the settings \[.*got \['sequences'\]"),
    ],
)
def test_wrong_settings_are_refused_before_an_image_is_read(
    wrong: dict[str, Any], message: str
) -> None:
    def images() -> Iterator[Any]:
        raise AssertionError("an image was read")
        yield

    with pytest.raises(ValueError, match=message):
        embed_images(MODEL, images(), **wrong)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a NaViT, a CLIP.*got Linear"):
        Embedder(nn.Linear(2, 2))


def test_a_large_jpeg_is_decoded_as_the_setting_says() -> None:
    buffer = io.BytesIO()
    smooth = np.kron(noise(9, 9), np.ones((60, 60, 1), np.uint8))
    Image.fromarray(smooth).save(buffer, "JPEG", quality=90)
    reduced, full = (
        embed_images(MODEL, [buffer.getvalue()], decode=d) for d in ("reduced", "full")
    )

    assert not torch.equal(reduced, full)
    assert torch.cosine_similarity(reduced, full).item() > 0.95


@pytest.mark.gpu
def test_on_a_gpu_vectors_are_those_of_the_cpu() -> None:
    images = pictures(300, largest=30)
    expected = embed_images(MODEL, images)
    model = tiny().to("cuda")

    for workers in (0, 1):
        settings_ = {"batch_tokens": 1024, "workers": workers}
        exact = embed_images(model, images, precision="fp32", **settings_)
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)
        half = embed_images(model, images, **settings_)
        assert torch.cosine_similarity(half, expected).min() > 0.99


def test_the_public_name_is_this_function() -> None:
    assert navit.embed_images is embed_images
    assert navit.Embedder is Embedder
