"""`navit.model.masked` and its evaluation: colours of patches that are not seen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.evaluate.masked import class_colour, evaluate_masked, show_image
from navit.model import NaViTConfig
from navit.model.corrupt import Corruption, colour_classes
from navit.model.masked import MaskedConfig, MaskedPredictor
from packer.batch import BatchStats, PackedBatch
from tests.helpers.batches import RandomImage, pack_images, random_images, with_garbage_in_padding
from tests.reference import dense_vit
from tests.reference import masked as reference

CONFIGS: list[dict[str, Any]] = [
    {"pool": "map", "pos_embed": "fourier"},
    {"pool": "cls", "num_registers": 1, "pos_embed": "learned", "pos_table_size": 5},
    {"pool": "mean", "norm_after_pool": True, "pixel_std": (0.1, 0.2, 0.3)},
]
MIXED: dict[str, Any] = {"patch_buffer": 6, "pos_embed": "grid", "pos_table_size": 3}
SEED = 11


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> MaskedPredictor:
    corruption = changes.pop("corruption", Corruption())
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", patch_size=4, width=32, mlp_dim=48, **changes)
    model = MaskedPredictor(MaskedConfig(config, corruption)).to(dtype)
    # It starts at 0, where the tower gets no gradient.
    torch.nn.init.normal_(model.head.weight, std=0.1)
    torch.nn.init.normal_(model.head.bias, std=0.1)
    return model


def keyed(images: list[RandomImage], keys: list[int], **options: Any) -> PackedBatch:
    batch = pack_images(images, **options)
    return replace(batch, keys=tuple(f"image-{i}" for i in keys))


def losses_and_gradients(
    model: MaskedPredictor, losses: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((losses * weights).sum(), list(named.values()))
    return {"losses": losses.detach(), **dict(zip(named, grads, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("changes", [*CONFIGS, MIXED])
@settings(max_examples=4)
@given(count=st.integers(1, 7), seed=st.integers(0, 9999))
def test_an_image_has_the_loss_and_gradients_it_has_alone(
    changes: dict[str, Any], dtype: torch.dtype, tolerance: float, count: int, seed: int
) -> None:
    """Random images, dropped patches, several sequences in any order, garbage in the padding."""
    model = make_model(dtype, **changes)
    sizes = (3, 4, 7) if changes is MIXED else 4
    images = random_images(count, seed=seed, patch_size=sizes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    weights = torch.randn(count, dtype=dtype)
    batch = keyed(images, list(range(count)), seq_len=40, order=order)
    packed = model.predict(with_garbage_in_padding(batch), SEED).losses()
    alone = torch.cat([model.predict(keyed([x], [i]), SEED).losses() for i, x in enumerate(images)])
    assert_close(
        losses_and_gradients(model, packed, weights),
        losses_and_gradients(model, alone, weights),
        tolerance,
    )


@pytest.mark.parametrize("changes", CONFIGS)
@settings(max_examples=3)
@given(count=st.integers(1, 5), seed=st.integers(0, 9999))
def test_losses_and_gradients_are_those_of_the_plain_formula(
    changes: dict[str, Any], count: int, seed: int
) -> None:
    model = make_model(**changes, corruption=Corruption(0.6, 0.5, 0.3))
    images = random_images(count, seed=seed)
    weights = torch.randn(count, dtype=torch.float64)
    batch = keyed(images, list(range(count)), seq_len=30)
    packed = model.predict(batch, SEED).losses()
    plain = [plain_loss(model, image, f"image-{i}") for i, image in enumerate(images)]
    found = losses_and_gradients(model, packed, weights)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = (torch.stack(plain) * weights).sum()
    grads = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    wanted = {"losses": torch.stack(plain).detach(), **dict(zip(named, grads, strict=True))}
    assert_close(found, wanted, 1e-10)


def plain_loss(model: MaskedPredictor, image: RandomImage, key: str) -> Tensor:
    corruption, vision = model.config.corruption, model.config.vision
    shares = (corruption.share, corruption.mask, corruption.swap)
    return reference.image_loss(
        dict(model.named_parameters()),
        image.patches,
        image.positions,
        image.grid,
        reference.fates(SEED, key, image.positions.tolist(), shares),
        num_heads=vision.num_heads,
        embedding=dense_vit.Positions(table_size=vision.pos_table_size),
        style=dense_vit.Style(pixel_std=vision.pixel_std, norm_after_pool=vision.norm_after_pool),
    )


def test_no_gradient_comes_from_patches_that_are_not_corrupted() -> None:
    model = make_model(pool="mean")
    images = random_images(9, seed=4)
    batch = keyed(images, list(range(9)), seq_len=60)
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.vision.norm.register_forward_hook(keep)
    found = model.predict(batch, SEED)
    found.losses().sum().backward()
    [tokens] = kept
    assert tokens.grad is not None
    told = tokens.grad.abs().sum(1) > 0
    assert int(told.sum()) == len(found.colours) < len(told)
    for token, loss in zip(told.tolist(), asked_in_order(batch), strict=True):
        assert token == loss


def asked_in_order(batch: PackedBatch) -> list[bool]:
    """Whether each token is asked for by the plain formula, images sorted by their length."""
    by_image = {}
    for image in range(batch.num_images):
        b, slot = (batch.image_index == image).nonzero()[0].tolist()
        places = batch.position_ids[b][batch.segment_ids[b] == slot + 1].tolist()
        fates = reference.fates(SEED, batch.keys[image], places, (0.5, 0.8, 0.1))
        by_image[image] = [fate.asked for fate in fates]
    lengths = list(zip(batch.segment_lengths, batch.segment_images, strict=True))
    order = [image for _, image in sorted(lengths, key=lambda pair: pair[0]) if image >= 0]
    return [asked for image in order for asked in by_image[image]]


def test_a_masked_patch_is_not_seen() -> None:
    """Other pixels in masked patches change what is asked for, but no prediction."""
    model = make_model(corruption=Corruption(share=0.5, mask=1.0, swap=0.0))
    batch = keyed(random_images(5, seed=2), list(range(5)), seq_len=40)
    found = model.predict(batch, SEED)
    patches = batch.patches.flatten(0, 1).clone()
    patches[found.places] = 255 - patches[found.places]
    hidden = model.predict(replace(batch, patches=patches.view_as(batch.patches)), SEED)
    torch.testing.assert_close(found.logits, hidden.logits, rtol=0, atol=0)
    assert not torch.equal(found.colours, hidden.colours)
    every = model.predict(replace(batch, patches=255 - batch.patches), SEED)
    assert not torch.allclose(found.logits, every.logits)


def test_each_step_has_a_corruption_of_its_own_and_evaluation_always_the_same() -> None:
    model = make_model()
    batch = keyed(random_images(6, seed=1), list(range(6)), seq_len=40)
    first = model(batch)
    assert torch.equal(model(batch), first)
    model.after_step()
    second = model(batch)
    assert not torch.equal(second, first)
    again = make_model()
    again.load_state_dict(model.state_dict())  # a run that goes on
    assert torch.equal(again(batch), second)
    other = MaskedPredictor(replace(model.config, seed=1)).double()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(batch), second)
    for each in (model, other):
        each.eval()
        assert torch.equal(each(batch), each.predict(batch, 0).losses())
        assert not torch.equal(each(batch), first)


def test_an_empty_batch_gives_no_loss_and_gradients_of_zero() -> None:
    model = make_model()
    losses = model(pack_images([], patch_size=4, seq_len=8))
    assert losses.shape == (0,)
    losses.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_a_model_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    model = make_model(torch.float32, corruption=Corruption(0.3, 0.5, 0.5)).eval()
    model.save_pretrained(tmp_path)
    again = MaskedPredictor.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    batch = keyed(random_images(4, seed=1), list(range(4)))
    assert torch.equal(again(batch), model(batch))


def test_a_convolutional_stem_is_refused() -> None:
    config = NaViTConfig.named("tiny", patch_size=16, stem="resnet")
    with pytest.raises(ValueError, match="convolutional stem has seen"):
        MaskedConfig(config)


def test_a_head_that_knows_the_one_colour_is_always_right() -> None:
    model = make_model(torch.float32, corruption=Corruption(share=1.0))
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    batch = keyed(random_images(6, seed=0), list(range(6)), seq_len=40)
    white = replace(batch, patches=torch.full_like(batch.patches, 255))
    batches = [replace(white, stats=BatchStats(images=6)), pack_images([], seq_len=8, patch_size=4)]

    def metrics() -> dict[str, float]:
        found = evaluate_masked(model, batches, device=torch.device("cpu"), progress=False)
        return found.metrics

    assert metrics()["masked_loss"] == pytest.approx(torch.tensor(512.0).log().item(), rel=1e-6)
    assert metrics()["chance/masked_accuracy@1"] == 1.0
    assert metrics()["masked_accuracy@5"] == 0.0, "a tie is no hit"
    with torch.no_grad():
        model.head.bias[511] = 5.0
    assert metrics()["masked_accuracy@1"] == 1.0
    with torch.no_grad():
        model.head.bias[3] = 6.0
    assert metrics()["masked_accuracy@1"] == 0.0
    assert metrics()["masked_accuracy@5"] == 1.0


def test_half_precision_changes_the_losses_by_rounding_alone() -> None:
    model = make_model(torch.float32)
    batch = keyed(random_images(6, seed=1), list(range(6)), seq_len=40)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(batch), rtol=0.02, atol=0.02)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [CONFIGS[2], MIXED])
def test_examples_are_the_images_with_predicted_colours_in_their_hidden_places(
    changes: dict[str, Any],
) -> None:
    model = make_model(torch.float32, **changes, corruption=Corruption(0.5, 1.0, 0.0))
    images = random_images(5, seed=3, patch_size=(3, 4, 7) if changes is MIXED else 4)
    batch = keyed(images, list(range(5)), seq_len=40, order=[3, 0, 4, 1, 2])
    found = model.predict(batch, 0)
    for i, image in enumerate(images):
        side, example = image.patch_size, show_image(batch, found, i)
        assert example.image.shape == (image.grid[0] * side, image.grid[1] * side, 3)
        fates = reference.fates(0, f"image-{i}", image.positions.tolist(), (0.5, 1.0, 0.0))
        best = iter(found.logits.argmax(1)[found.image == i].tolist())
        for patch, (row, col), fate in zip(
            image.patches, image.positions.tolist(), fates, strict=True
        ):
            at = np.s_[row * side : (row + 1) * side, col * side : (col + 1) * side]
            pixels = patch.view(side, side, 3).numpy()
            assert (example.image[at] == pixels).all()
            wanted = class_colour(next(best)) if fate.asked else pixels
            assert (example.predicted[at] == wanted).all()
            assert (example.corrupted[at] == (127 if fate.asked else pixels)).all()


def test_the_middle_of_a_class_is_of_that_class() -> None:
    for number in range(512):
        patch = torch.tensor([class_colour(number)], dtype=torch.uint8)
        assert colour_classes(patch, 1).item() == number


def test_a_pass_without_images_is_no_evaluation() -> None:
    empty = [pack_images([], seq_len=8, patch_size=4)]
    with pytest.raises(ValueError, match="must hold images with corrupted patches"):
        evaluate_masked(make_model(), empty, device=torch.device("cpu"), progress=False)
