"""The convolutional stem: whole images by grid, each as if it were alone."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.stem import ConvStem, group_grids, join_patches, stem_flops
from navit.model.vision import plan_tokens
from navit.pretrained import save_flexivit, save_timm_vit
from packer import ConstantDrop, NoDrop, PackerConfig, PackingCollator
from packer.batch import PackedBatch
from tests.helpers.batches import (
    RandomImage,
    pack_images,
    random_images,
    with_garbage_in_padding,
)
from tests.helpers.samples import image_samples
from tests.reference import conv_stem

SHAPE: dict[str, Any] = {"width": 16, "num_heads": 2, "depth": 1, "mlp_dim": 24}
# Of widths like 9 a norm's group has 9 channels: groups of 2, of an image's one place, would be
# normalised to nearly +1 and -1, and float32 rounds the difference of two close channels.
STEMS: dict[str, dict[str, Any]] = {
    "hybrid": {"stem": "resnet", "stem_width": 9, "stem_stages": (1, 2), "patch_size": 8},
    "hybrid, larger patches": {
        "stem": "resnet",
        "stem_width": 6,
        "stem_stages": (2,),
        "patch_size": 8,
        "biases": True,
        "pool": "cls",
        "pos_embed": "grid",
        "pos_table_size": 3,
        "pixel_mean": (0.48, 0.46, 0.41),
        "pixel_std": (0.27, 0.26, 0.28),
    },
    "convolutions": {
        "stem": "convs",
        "stem_width": 5,
        "stem_stages": (1, 2),
        "patch_size": 4,
        "pool": "mean",
        "pos_embed": "learned",
        "num_registers": 1,
        "checkpointing": True,
    },
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Convolutions as small as these spend their time on waking threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> NaViT:
    torch.manual_seed(0)
    model = NaViT(NaViTConfig.from_dict({**SHAPE, **STEMS[name], **changes})).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def draw(count: int, seed: int, name: str) -> list[RandomImage]:
    patch_size = STEMS[name]["patch_size"]
    return random_images(count, seed=seed, patch_size=patch_size, max_side=3, drop=False)


def gradients(model: NaViT, vectors: Tensor, weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((vectors * weights).sum(), list(model.parameters())))


def stem_tokens(model: NaViT, batch: PackedBatch) -> Tensor:
    assert isinstance(model.patch_embed, ConvStem)
    plan = plan_tokens(batch, model.config, dtype=torch.float64)
    return model.patch_embed(batch, plan.token_index, plan.patches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STEMS)
@settings(max_examples=3, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 9999), extra=st.integers(0, 20))
def test_every_vector_and_gradient_is_that_of_the_images_alone(
    name: str, dtype: torch.dtype, count: int, seed: int, extra: int
) -> None:
    """Some images share a grid and run through the convolutions together."""
    model, images = make_model(name, dtype), draw(count, seed, name)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    batch = pack_images(images, seq_len=9 + extra, order=order)
    weights = torch.randn(count, SHAPE["width"], dtype=dtype)

    packed = model(with_garbage_in_padding(batch)).pooled

    alone = torch.cat([model(pack_images([image])).pooled for image in images])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(model, packed, weights), gradients(model, alone, weights), strict=True)
    for found, expected in pairs:
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", STEMS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 9999))
def test_tokens_are_those_of_the_plain_stem(name: str, seed: int) -> None:
    """The reference takes one whole image: zeros stand around it, and its norms are its own."""
    model, images = make_model(name), draw(3, seed, name)
    config = model.config
    batch = pack_images(images, seq_len=20)
    weights = torch.randn(sum(len(image.patches) for image in images), config.width).double()

    found = stem_tokens(model, batch)

    state = dict(model.patch_embed.named_parameters())
    plain = [
        conv_stem.tokens(
            state,
            whole(image),
            kind=str(config.stem),
            stages=config.stem_stages,
            mean=config.pixel_mean,
            std=config.pixel_std,
        ).flatten(0, 1)
        for image in images
    ]
    by_length = sorted(range(len(images)), key=lambda i: len(plain[i]))  # the plan's order
    expected = torch.cat([plain[i] for i in by_length])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    pairs = [
        torch.autograd.grad((x * weights).sum(), list(state.values())) for x in (found, expected)
    ]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


def whole(image: RandomImage) -> Tensor:
    """Put an image together patch by patch: (H, W, 3)."""
    rows, cols = image.grid
    p = image.patch_size
    pixels = torch.zeros(rows * p, cols * p, 3, dtype=torch.uint8)
    for (row, col), patch in zip(image.positions.tolist(), image.patches, strict=True):
        pixels[row * p : (row + 1) * p, col * p : (col + 1) * p] = patch.view(p, p, 3)
    return pixels


def test_an_image_is_put_together_from_its_patches() -> None:
    images = [
        image
        for seed in range(30)
        for image in random_images(1, seed=seed, patch_size=3, max_side=3, drop=False)
        if image.grid == (2, 3)
    ]
    patches = torch.cat([image.patches for image in images])
    expected = torch.stack([whole(image) for image in images]).permute(0, 3, 1, 2)
    assert torch.equal(join_patches(patches, (2, 3), 3), expected)


@given(grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=9))
def test_groups_hold_each_token_once_and_lead_back(grids: list[tuple[int, int]]) -> None:
    groups = group_grids(grids, torch.device("cpu"))
    names = [(i, token) for i, (rows, cols) in enumerate(grids) for token in range(rows * cols)]
    grouped = [names[i] for i in groups.members.tolist()]
    assert [grouped[i] for i in groups.place.tolist()] == names
    assert len(set(groups.grids)) == len(groups.grids)
    met = [grid for grid, n in zip(groups.grids, groups.counts, strict=True) for _ in range(n)]
    start = 0
    for rows, cols in met:  # images of a grid one after another, each whole and in order
        image = grouped[start][0]
        assert grids[image] == (rows, cols)
        assert grouped[start : start + rows * cols] == [(image, t) for t in range(rows * cols)]
        start += rows * cols


def test_a_neighbour_beyond_the_edge_is_not_seen() -> None:
    """Change one image of a grid: the tokens of the others stay, bit by bit."""
    model = make_model("hybrid", torch.float32)
    images = random_images(6, seed=1, patch_size=8, max_side=1, drop=False)
    before = model(pack_images(images)).pooled
    changed = [*images[:-1], random_images(1, seed=2, patch_size=8, max_side=1, drop=False)[0]]
    after = model(pack_images(changed)).pooled
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


@pytest.mark.parametrize("name", STEMS)
def test_operations_are_those_torch_counts(name: str) -> None:
    model, images = make_model(name).requires_grad_(False), draw(5, 3, name)
    batch = pack_images(images, seq_len=30)
    with FlopCounterMode(display=False) as counter:
        stem_tokens(model, batch)
    num_tokens = sum(len(image.patches) for image in images)
    assert stem_flops(model.config, num_tokens) == counter.get_total_flops()


def test_dropped_tokens_are_refused_by_name_and_whole_images_of_a_packer_taken() -> None:
    samples = image_samples(5, unit=8, seed=2)
    model = make_model("hybrid")

    def collate(drop: Any) -> PackedBatch:
        return PackingCollator(PackerConfig(patch_size=8, seq_len=64, token_drop=drop))(samples)

    assert model(collate(NoDrop())).pooled.shape == (5, SHAPE["width"])
    with pytest.raises(ValueError, match=r"needs every image whole.*tokens. Set .*NoDrop\(\)"):
        model(collate(ConstantDrop(0.5)))


def test_other_patch_sizes_are_refused() -> None:
    model = make_model("hybrid")
    mixed = pack_images(random_images(6, seed=1, patch_size=(4, 8), drop=False), seq_len=40)
    for batch, found in ((pack_images(draw(2, 0, "convolutions")), "[4]"), (mixed, "[4, 8]")):
        with pytest.raises(ValueError, match="the stem was made for") as error:
            model(batch)
        assert found in str(error.value)
    for make in (model.flexible, lambda: model.at_patch_size(4)):
        with pytest.raises(ValueError, match="whose convolutions have one stride"):
            make()


def test_a_batch_without_images_gives_every_parameter_a_gradient_of_zero() -> None:
    model = make_model("hybrid")
    empty = model(pack_images([], patch_size=8, seq_len=4))
    assert empty.pooled.shape == (0, SHAPE["width"])
    found = gradients(model, empty.pooled, torch.zeros(0, SHAPE["width"]).double())
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("name", ["hybrid", "convolutions"])
def test_bfloat16_is_as_close_to_float64_packed_as_alone(name: str) -> None:
    images = draw(8, 5, name)
    model = make_model(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        packed = model(pack_images(images, seq_len=20)).pooled
        alone = torch.cat([model(pack_images([image])).pooled for image in images])
    exact = model.double()(pack_images(images, seq_len=20)).pooled
    error, alone_error = ((x.double() - exact).abs().max() for x in (packed, alone))
    assert error <= 2 * alone_error
    assert alone_error < 0.1


def test_a_tower_with_a_stem_is_saved_and_read_back(tmp_path: Path) -> None:
    model = Classifier(ClassifierConfig(make_model("hybrid").config, 3)).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert stored["vision"]["stem_stages"] == [1, 2]
    batch = pack_images(draw(3, 1, "hybrid"))
    assert torch.equal(model(batch), again(batch))


def test_a_clip_learns_through_a_stem() -> None:
    vision = make_model("convolutions").config
    text = TextConfig.from_dict({**SHAPE, "vocab_size": 9})
    clip = CLIP(CLIPConfig(vision, text, embed_dim=8))
    clip.encode_image(pack_images(draw(3, 1, "convolutions")))[:, 0].sum().backward()
    grads = [parameter.grad for parameter in clip.vision.patch_embed.parameters()]
    assert all(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stem": "vgg"}, ["stem", "'resnet', 'convs'", "'vgg'"]),
        ({"stem_width": 32}, ["for a stem", "32"]),
        ({"stem": "resnet", "patch_size": 12}, ["multiple of the stem's stride, 16", "got 12"]),
        ({"stem": "convs", "stem_stages": ()}, ["at least one stage"]),
        ({"stem": "convs", "stem_stages": (1, 0)}, ["at least one unit", "(1, 0)"]),
        ({"stem": "convs", "stem_width": 1}, ["at least 2 channels"]),
        ({"stem": "resnet", "patch_buffer": 32}, ["patch_buffer must be None", "32"]),
    ],
)
def test_errors_say_what_must_hold(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must|for a stem") as error:
        NaViTConfig.from_dict({**SHAPE, **changes})
    for word in words:
        assert word in str(error.value)


def test_the_stems_of_the_papers_can_be_written() -> None:
    """R50+ViT-B/16 and B/32, and the stem of 18 GF: kernels of the last projection are 1 x 1."""
    r50 = NaViTConfig.named("b", stem="resnet")
    assert r50.stem_stride == 16
    r50_32 = replace(r50, stem_stages=(3, 4, 6, 3), patch_size=32)
    early = NaViTConfig.named("b", stem="convs", stem_width=64, stem_stages=(1, 2, 2, 1))
    for config, channels in ((r50, 1024), (r50_32, 2048), (early, 512)):
        with torch.device("meta"):
            stem = ConvStem(config)
        assert stem.proj.weight.shape == (768, channels, 1, 1)


def test_grids_of_segments_follow_from_the_tensors_and_are_checked() -> None:
    batch = pack_images(random_images(5, seed=3, patch_size=4), seq_len=40, order=[4, 0, 2, 1, 3])
    images = {image: tuple(grid) for image, grid in zip(*slots(batch), strict=True) if image >= 0}
    expected = tuple(images.get(image, (0, 0)) for image in batch.segment_images)
    assert batch.segment_grids == expected
    assert (0, 0) in expected, "a padded tail"
    assert replace(batch, segment_grids=()).segment_grids == expected
    assert pickle.loads(pickle.dumps(batch)).segment_grids == expected
    with pytest.raises(AssertionError, match="segment_grids disagrees"):
        replace(batch, segment_grids=expected[::-1]).check()


def slots(batch: PackedBatch) -> tuple[list[int], list[list[int]]]:
    return batch.image_index.flatten().tolist(), batch.grid_sizes.flatten(0, 1).tolist()


def test_other_libraries_have_no_such_tower(tmp_path: Path) -> None:
    for save, path in ((save_timm_vit, tmp_path), (save_flexivit, tmp_path / "weights.npz")):
        with pytest.raises(ValueError, match=r"'stem': 'resnet'"):
            save(make_model("hybrid"), path)
