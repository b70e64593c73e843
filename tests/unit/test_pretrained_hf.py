"""SigLIP 2, SigLIP and CLIP of transformers: the same numbers here, packed, and back again."""

from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit import CLIP, NaViT, pretrained
from packer.batch import PackedBatch, PackedText
from tests.helpers.batches import RandomImage, pack_images, random_image, random_text
from tests.helpers.public_models import (
    END_ID,
    FAMILIES,
    MAX_TOKENS,
    PATCH,
    SIDE,
    VOCABULARY,
    encode_alone,
    image_arguments,
    make_model,
)

PAD_ID = {"siglip2": 0, "siglip": 1}
GRIDS = [(SIDE, SIDE), (1, 1), (2, 5), (7, 2), (1, 9), (6, 6), (SIDE, SIDE + 1), (4, 4)]
SIDES = st.tuples(st.integers(1, 7), st.integers(2, 7))  # one column: see below
every_family = pytest.mark.parametrize("name", list(FAMILIES))

model_of = cache(make_model)


@cache
def ours_of(name: str) -> CLIP:
    return FAMILIES[name].load_clip(model_of(name)).eval()


def draw(grids: list[tuple[int, int]], seed: int = 0) -> list[RandomImage]:
    generator = torch.Generator().manual_seed(seed)
    return [random_image(rows, cols, patch_size=PATCH, generator=generator) for rows, cols in grids]


def pack_in_one(images: list[RandomImage], captions: PackedText | None = None) -> PackedBatch:
    """All images in one sequence, with some padding behind."""
    tokens = sum(len(image.patches) for image in images)
    return pack_images(images, patch_size=PATCH, seq_len=tokens + 3, captions=captions)


def captions_of(lengths: list[int], seed: int = 0) -> PackedText:
    """Draw captions that hold their end token at the end alone."""
    text = random_text(lengths, vocab_size=END_ID, seed=seed)
    text.ids[text.cu_seqlens[1:].long() - 1] = END_ID
    return text


def ids_of(text: PackedText, name: str) -> Tensor:
    """The captions as transformers takes them: rows, filled up."""
    bounds = text.cu_seqlens.tolist()
    longest = max(text.segment_lengths) if name == "clip" else MAX_TOKENS
    ids = torch.full((len(bounds) - 1, longest), PAD_ID.get(name, 1))
    for row, (a, b) in zip(ids, pairwise(bounds), strict=True):
        row[: b - a] = text.ids[a:b]
    return ids


# Their numbers, packed


@every_family
@settings(max_examples=6, deadline=None)
@given(grids=st.lists(SIDES, min_size=1, max_size=6), seed=st.integers(0, 999))
@torch.no_grad()
def test_vectors_and_tokens_in_one_sequence_are_those_of_each_image_alone(
    name: str, grids: list[tuple[int, int]], seed: int
) -> None:
    images = draw([(SIDE, SIDE), *grids], seed)
    theirs, ours = model_of(name).vision_model, ours_of(name).vision

    output = ours(pack_in_one(images))

    for i, (image, found) in enumerate(zip(images, output.per_image(), strict=True)):
        vector, tokens = encode_alone(theirs, image, name)
        torch.testing.assert_close(output.pooled[i], vector, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.tokens.flatten(0, 1), tokens, rtol=0, atol=1e-5)


@every_family
@torch.no_grad()
def test_images_one_patch_wide_are_theirs_with_the_table_resized_axis_by_axis(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call torch's CPU kernel with antialias gives all rows the first row's weights."""
    resize = torch.nn.functional.interpolate

    def by_axis(x: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        return resize(resize(x, (size[0], x.shape[3]), **options), size, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", by_axis)
    images = draw([(2, 1), (5, 1), (3, 1), (9, 1)])
    output = ours_of(name).vision(pack_in_one(images))
    for found, image in zip(output.pooled, images, strict=True):
        vector, _ = encode_alone(model_of(name).vision_model, image, name)
        torch.testing.assert_close(found, vector, rtol=0, atol=1e-5)


@every_family
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6), seed=st.integers(0, 999)
)
@torch.no_grad()
def test_text_vectors_are_those_of_the_padded_captions(
    name: str, lengths: list[int], seed: int
) -> None:
    """SigLIP pads to 64 tokens and reads the last; CLIP reads the end token, causally."""
    text = captions_of(lengths, seed)
    ids = ids_of(text, name)

    found = ours_of(name).encode_text(text)

    features = model_of(name).get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(found, features, rtol=0, atol=1e-5)
    if name != "clip":  # padded by the tokenizer: the same
        padded = random_text([MAX_TOKENS] * len(lengths), vocab_size=VOCABULARY, seed=0)
        padded.ids.copy_(ids.flatten())
        assert torch.equal(ours_of(name).encode_text(padded), found)


@every_family
@torch.no_grad()
def test_both_towers_give_the_logits(name: str) -> None:
    images, text = draw(GRIDS), captions_of([3, 64, 1, 17, 8, 30, 2, 9])

    output = ours_of(name)(pack_in_one(images, text))

    bias = 0.0 if output.logit_bias is None else output.logit_bias
    logits = output.logit_scale * output.image @ output.text.T + bias
    ids = ids_of(text, name)
    theirs = torch.cat(
        [
            model_of(name)(input_ids=ids, **image_arguments(image, name)).logits_per_image
            for image in images
        ]
    )
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5 * float(output.logit_scale))


@pytest.mark.parametrize("name", ["siglip2", "siglip"])
def test_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    """What is a copy in the weights is a copy in the gradients."""
    images, family = draw(GRIDS), FAMILIES[name]
    theirs, ours = make_model(name).vision_model, family.load(model_of(name))
    weights = torch.randn(len(images), 32)

    (ours(pack_in_one(images)).pooled * weights).sum().backward()
    plain = torch.stack([encode_alone(theirs, image, name)[0] for image in images])
    (plain * weights).sum().backward()

    holder = NaViT(ours.config)
    holder.load_state_dict({n: p.grad for n, p in ours.named_parameters()})
    family.save(holder, tmp_path)
    found = family.vision_model.from_pretrained(tmp_path).state_dict()
    for key, parameter in theirs.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[key], parameter.grad, rtol=0, atol=1e-5 * max(1.0, scale), msg=key
        )


# The source is only read


@every_family
def test_the_source_stays_as_it_was_bit_for_bit(name: str) -> None:
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = FAMILIES[name].load_clip(model)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)  # no memory is shared
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_family
def test_loading_draws_nothing_at_random(name: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    FAMILIES[name].load(model_of(name))
    assert torch.equal(torch.rand(3), expected)


# Forms of the source


@every_family
@torch.no_grad()
def test_every_form_of_a_source_gives_the_same_model(name: str, tmp_path: Path) -> None:
    family, model, batch = FAMILIES[name], model_of(name), pack_in_one(draw(GRIDS))
    expected = family.load(model)(batch).pooled
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    model.vision_model.save_pretrained(tmp_path / "tower")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state, config = model.state_dict(), model.config.to_dict()
    tower = model.vision_model
    hub_tower = {f"vision_model.{k}": v for k, v in tower.state_dict().items()}
    old = {**state, "vision_model.embeddings.position_ids": torch.arange(9)[None]}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "old")

    forms: list[tuple[Any, dict[str, Any]]] = [
        (str(tmp_path / "whole"), {}),
        (tmp_path / "shards", {}),
        (tmp_path / "tower", {}),
        (tmp_path / "old", {}),
        (tower, {}),
        (state, {"config": config}),
        (old, {"config": config}),
        (tower.state_dict(), {"config": tower.config.to_dict()}),
        (hub_tower, {"config": tower.config.to_dict()}),
    ]
    for source, arguments in forms:
        assert torch.equal(family.load(source, **arguments)(batch).pooled, expected)


@every_family
@torch.no_grad()
def test_load_recognises_what_a_folder_holds(name: str, tmp_path: Path) -> None:
    model, batch = model_of(name), pack_in_one(draw(GRIDS))
    tower = FAMILIES[name].load(model)
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "tower")
    ours_of(name).save_pretrained(tmp_path / "ours")
    tower.save_pretrained(tmp_path / "our-tower")

    for source in (tmp_path / "whole", str(tmp_path / "ours"), model):
        found = pretrained.load(source)
        assert isinstance(found, CLIP)
        assert torch.equal(found.encode_image(batch), ours_of(name).encode_image(batch))
    for source in (tmp_path / "tower", tmp_path / "our-tower", model.vision_model):
        found = pretrained.load(source)
        assert isinstance(found, NaViT)
        assert torch.equal(found(batch).pooled, tower(batch).pooled)


# And back


@every_family
@torch.no_grad()
def test_transformers_reads_both_towers_back_with_the_same_outputs(
    name: str, tmp_path: Path
) -> None:
    family, model = FAMILIES[name], model_of(name)

    family.save_clip(family.load_clip(model), tmp_path)
    again, report = family.model.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )

    assert not any(report.values())
    folded = ("class_embedding", "vision_model.embeddings.position_embedding.weight")
    for key, value in model.state_dict().items():
        if name == "clip" and key.endswith(folded):
            continue  # a row of the positions is now in the class token
        assert torch.equal(again.state_dict()[key], value), key
    ids = ids_of(captions_of([3, 20, 7]), name)
    for image in draw(GRIDS):
        arguments = {"input_ids": ids, **image_arguments(image, name)}
        found, expected = (x(**arguments).logits_per_image for x in (again.eval(), model))
        # Not bit for bit: memory read from a file is aligned otherwise, so takes other kernels.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert family.load_clip(tmp_path).config == family.load_clip(model).config


@every_family
@torch.no_grad()
def test_transformers_reads_an_image_tower_back(name: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], model_of(name)
    family.save(family.load(model), tmp_path)
    again, report = family.vision_model.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    for image in draw(GRIDS):
        for found, expected in zip(
            encode_alone(again.eval(), image, name),
            encode_alone(model.vision_model, image, name),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, model = FAMILIES[name], make_model(name).to(dtype)
    ours = family.load_clip(model)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    family.save_clip(ours, tmp_path)
    again = family.model.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    weight = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(again.state_dict()[weight], model.state_dict()[weight])


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_the_error_is_about_theirs(name: str, dtype: torch.dtype) -> None:
    """Both round, so each is held to the same weights in float64."""
    images, model = draw([(3, 3), (2, 5), (6, 6), (4, 7), (5, 5)]), make_model(name).to(dtype)
    ours = FAMILIES[name].load(model)(pack_in_one(images)).pooled
    exact = deepcopy(model).double()

    def encode(tower: Any, image: RandomImage, to: torch.dtype) -> Tensor:
        arguments = image_arguments(image, name)
        arguments["pixel_values"] = arguments["pixel_values"].to(to)
        vector: Tensor = tower(**arguments).pooler_output[0]
        return vector.double()

    theirs = torch.stack([encode(model.vision_model, image, dtype) for image in images])
    expected = torch.stack([encode(exact.vision_model, image, torch.float64) for image in images])
    assert (ours.double() - expected).std() <= 2 * (theirs - expected).std()
