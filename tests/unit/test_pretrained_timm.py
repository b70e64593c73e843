"""timm's vision transformers: the same numbers here, packed, and back again.

The models are state dicts and a plain re-implementation; `benchmarks.check_timm` compares with timm
itself where that is installed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from navit import NaViT, NaViTConfig, pretrained
from tests.helpers.batches import RandomImage, pack_images, random_image
from tests.reference import flexivit, timm_vit

PATCH, SIDE, WIDTH, HIDDEN = 4, 3, 32, 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRIDS = [(SIDE, SIDE), (1, 1), (2, 5), (7, 1), (1, 9), (6, 6), (SIDE, SIDE + 1)]
CASES: dict[str, dict[str, Any]] = {
    "class token": {"global_pool": "token", "cls": 1},
    "registers": {"global_pool": "token", "cls": 1, "reg": 3},
    "no_embed_class": {"global_pool": "token", "cls": 1, "reg": 2, "no_embed_class": True},
    "average": {"global_pool": "avg", "fc_norm": True},
    "average beside a class token": {"global_pool": "avg", "cls": 1, "fc_norm": True},
    "average of normed tokens": {"global_pool": "avg", "act_layer": "gelu_tanh"},
    "map": {"global_pool": "map", "reg": 1},
    "layer scale": {"global_pool": "token", "cls": 1, "scale": True},
    "clip": {
        "global_pool": "token",
        "cls": 1,
        "pre": True,
        "act_layer": "quick_gelu",
        "norm_eps": 1e-5,
    },
    "query-key norm": {"global_pool": "map", "qk_norm": True, "qkv_bias": False},
    "flexivit": {"global_pool": "token", "cls": 1, "no_embed_class": True},
}
every_case = pytest.mark.parametrize("name", list(CASES))


def make_state(case: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Draw every parameter of a model under timm's names."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 0.3, start: float = 0.0) -> None:
        state[name] = start + scale * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, size: int, *, bias: bool = True) -> None:
        draw(f"{name}.weight", out, size, scale=size**-0.5)
        if bias:
            draw(f"{name}.bias", out)

    def norm(name: str, size: int = WIDTH) -> None:
        draw(f"{name}.weight", size, scale=0.2, start=1.0)
        draw(f"{name}.bias", size)

    draw("patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5)
    if case.get("pre"):
        norm("norm_pre")
    else:
        draw("patch_embed.proj.bias", WIDTH)
    rows = 0 if case.get("no_embed_class") else case.get("cls", 0) + case.get("reg", 0)
    draw("pos_embed", 1, SIDE**2 + rows, WIDTH)
    for name in ("cls", "reg"):
        if name in case:
            draw(f"{name}_token", 1, case[name], WIDTH)
    for i in range(2):
        block = f"blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=case.get("qkv_bias", True))
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", HIDDEN, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, HIDDEN)
        if case.get("qk_norm"):
            norm(f"{block}.attn.q_norm", WIDTH // 2)
            norm(f"{block}.attn.k_norm", WIDTH // 2)
        if case.get("scale"):
            draw(f"{block}.ls1.gamma", WIDTH)
            draw(f"{block}.ls2.gamma", WIDTH)
    norm("fc_norm" if case.get("fc_norm") else "norm")
    if case["global_pool"] == "map":
        draw("attn_pool.latent", 1, 1, WIDTH)
        linear("attn_pool.q", WIDTH, WIDTH)
        linear("attn_pool.kv", 2 * WIDTH, WIDTH)
        linear("attn_pool.proj", WIDTH, WIDTH)
        norm("attn_pool.norm")
        linear("attn_pool.mlp.fc1", HIDDEN, WIDTH)
        linear("attn_pool.mlp.fc2", WIDTH, HIDDEN)
    linear("head", 10, WIDTH)
    return state


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    names = ("global_pool", "act_layer", "norm_eps", "no_embed_class")
    return {"num_heads": 2, **{name: case[name] for name in names if name in case}}


def as_image(image: RandomImage) -> Tensor:
    size, (rows, cols) = image.patch_size, image.grid
    pixels = (image.patches.view(rows, cols, size, size, 3) / 255.0 - torch.tensor(MEAN)) / (
        torch.tensor(STD)
    )
    return pixels.permute(4, 0, 2, 1, 3).reshape(3, rows * size, cols * size)


def draw_images(
    grids: list[tuple[int, int]], seed: int = 0, patch_size: int = PATCH
) -> list[RandomImage]:
    generator = torch.Generator().manual_seed(seed)
    return [random_image(r, c, patch_size=patch_size, generator=generator) for r, c in grids]


@every_case
@settings(max_examples=5, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_vectors_and_tokens_in_one_sequence_are_those_of_each_image_alone(
    name: str, grids: list[tuple[int, int]], seed: int
) -> None:
    case = CASES[name]
    state, images = make_state(case, seed), draw_images([(SIDE, SIDE), *grids], seed)
    model = pretrained.load_timm_vit(state, config=settings_of(case))

    output = model(
        pack_images(images, patch_size=PATCH, seq_len=sum(len(i.patches) for i in images) + 3)
    )

    for image, found, vector in zip(images, output.per_image(), output.pooled, strict=True):
        expected, tokens = timm_vit.encode(state, as_image(image), **settings_of(case))
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
        patches = tokens[-len(image.patches) :]
        torch.testing.assert_close(found.tokens.flatten(0, 1), patches, rtol=0, atol=1e-5)


@every_case
@torch.no_grad()
def test_a_saved_model_comes_back_and_is_timms(name: str, tmp_path: Path) -> None:
    """What is written has timm's names and shapes, and everything `create_model` has to know."""
    case = CASES[name]
    state = make_state(case)
    model = pretrained.load_timm_vit(state, config=settings_of(case))

    pretrained.save_timm_vit(model, tmp_path)

    again = pretrained.load(tmp_path)
    assert isinstance(again, NaViT)
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    saved = load_file(tmp_path / "model.safetensors")
    told = json.loads((tmp_path / "config.json").read_text())["model_args"]
    folded = {"pos_embed", "cls_token", "reg_token"}
    same = {key for key in state if key not in folded and not key.startswith("head.")}
    assert all(torch.equal(saved[key], state[key]) for key in same)
    assert saved["pos_embed"].shape == (1, SIDE**2, WIDTH)
    assert told["no_embed_class"]
    for image in draw_images(GRIDS):
        found, _ = timm_vit.encode(
            saved, as_image(image), **settings_of({**case, "no_embed_class": True})
        )
        expected, _ = timm_vit.encode(state, as_image(image), **settings_of(case))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert int(told["embed_dim"] * told["mlp_ratio"]) == HIDDEN
    assert told["global_pool"] == case["global_pool"]


@torch.no_grad()
def test_a_flexivit_made_flexible_is_itself_at_its_size_and_resized_once_at_others(
    tmp_path: Path,
) -> None:
    """A FlexiViT of timm is a ViT of one size, made of weights that were resized to it."""
    case = CASES["flexivit"]
    state = make_state(case)
    fixed = pretrained.load_timm_vit(state, config=settings_of(case))
    flexible, buffered = fixed.flexible(PATCH), fixed.flexible(2 * PATCH)
    kernel = state["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    for size in (PATCH, 3, 6):
        resized = flexivit.resample_patch_embedding(kernel, size).permute(3, 2, 0, 1)
        images = draw_images(GRIDS, patch_size=size)
        found = flexible(pack_images(images, seq_len=50)).pooled
        for image, vector in zip(images, found, strict=True):
            weights = {**state, "patch_embed.proj.weight": resized}
            expected, _ = timm_vit.encode(weights, as_image(image), **settings_of(case))
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)

    batch = pack_images(draw_images(GRIDS), seq_len=50)
    torch.testing.assert_close(buffered(batch).pooled, fixed(batch).pooled, rtol=0, atol=1e-5)

    with pytest.raises(ValueError, match=r"'patch_buffer': 4\} \(at_patch_size"):
        pretrained.save_timm_vit(flexible, tmp_path)
    pretrained.save_timm_vit(flexible.at_patch_size(PATCH), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")["patch_embed.proj.weight"]
    assert torch.equal(saved, state["patch_embed.proj.weight"])


@every_case
def test_the_state_dict_stays_as_it_was(name: str) -> None:
    state = make_state(CASES[name])
    before = {key: value.clone() for key, value in state.items()}
    model = pretrained.load_timm_vit(state, config=settings_of(CASES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_half_precision_stays_what_it_is() -> None:
    state = {key: value.bfloat16() for key, value in make_state(CASES["registers"]).items()}
    model = pretrained.load_timm_vit(state, config=settings_of(CASES["registers"]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_missing_and_unknown_tensors_are_listed() -> None:
    state = make_state(CASES["class token"])
    state["blocks.0.attn.gate.weight"] = state.pop("blocks.1.norm2.bias")
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2\.bias.*blocks\.0\.attn\.gate\.weight"):
        pretrained.load_timm_vit(state, config=settings_of(CASES["class token"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_pool": "avgmax"}, "global_pool in .*'avgmax'"),
        ({"global_pool": "map"}, "must fit its tensors.*'map'"),
        ({"act_layer": "relu"}, "act_layer in .*'relu'"),
        ({"no_embed_class": True}, "square table; got 10"),
    ],
)
def test_what_timm_has_and_we_have_not_is_refused_by_name(
    changes: dict[str, Any], words: str
) -> None:
    case = CASES["class token"]
    with pytest.raises(ValueError, match=words):
        pretrained.load_timm_vit(make_state(case), config={**settings_of(case), **changes})


def test_the_number_of_heads_must_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(CASES["map"])
    with pytest.raises(ValueError, match="must tell num_heads"):
        pretrained.load_timm_vit(state)
    model = pretrained.load_timm_vit(state, config={"num_heads": 2})
    pretrained.save_timm_vit(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    del told["model_args"]["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # as where timm is missing
    with pytest.raises(ImportError, match=r"'vit_base_patch16_224'.*pip install timm"):
        pretrained.load(tmp_path)
    given_heads = pretrained.load_timm_vit(tmp_path, config={"num_heads": 2})
    assert given_heads.config == model.config


def test_a_model_that_timm_cannot_express_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'biases': \[True\].*'pos_embed': 'fourier'"):
        pretrained.save_timm_vit(NaViT(NaViTConfig.named("tiny")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_mlp_of_a_size_that_no_ratio_gives_exactly_is_saved(tmp_path: Path) -> None:
    """Timm takes a ratio and rounds down: 14 * (61 / 14) is below 61."""
    changes = {"biases": True, "pos_embed": "grid", "pos_interpolation": "bicubic_antialias"}
    for width, mlp_dim in ((14, 61), (14, 115), (1152, 4304)):
        config = NaViTConfig(
            width=width, num_heads=2, depth=1, mlp_dim=mlp_dim, pos_table_size=2, **changes
        )
        pretrained.save_timm_vit(NaViT(config), tmp_path)
        told = json.loads((tmp_path / "config.json").read_text())["model_args"]
        assert int(told["embed_dim"] * told["mlp_ratio"]) == mlp_dim
