"""NaViT as a module: shapes, empty batches, errors, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.model import block
from navit.model.attention import AttentionPlan
from navit.model.block import Branch
from tests.helpers.batches import RandomImage, pack_images, random_images


def tiny(**changes: object) -> NaViT:
    torch.manual_seed(0)
    return NaViT(NaViTConfig.named("tiny", patch_size=4, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "map"},
        {"pool": "mean"},
        {"pool": "cls", "num_registers": 2},
        {"pos_embed": "grid", "layer_scale": 0.1, "drop_path": 0.5, "checkpointing": True},
    ],
)
def test_an_empty_batch_gives_no_vector_and_zero_gradients(changes: dict[str, object]) -> None:
    """A rank without images still enters every collective, so every gradient must exist."""
    model = tiny(**changes)
    output = model(pack_images([], patch_size=4, seq_len=8))
    assert output.pooled.shape == (0, 64)
    assert output.tokens.shape == (0, 8, 64)
    output.pooled.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_another_patch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size must be the model's \(4\); got 8"):
        tiny()(pack_images(random_images(2, seed=0, patch_size=8), patch_size=8))


def test_xformers_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        tiny(attention="xformers")(pack_images(random_images(2, seed=0), patch_size=4))


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    batch = pack_images(random_images(5, seed=0), patch_size=4, seq_len=40)
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.packed_tokens.dtype == torch.float32
    output.pooled.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_attention_logits_start_with_a_deviation_near_one() -> None:
    """A peer's start at 5.7, which saturates the softmax."""
    torch.manual_seed(0)
    layer = NaViT(NaViTConfig.named("s", depth=1)).blocks[0].attn
    q, k, _ = layer.qkv(torch.randn(200, 384)).unflatten(-1, (3, 6, 64)).unbind(1)
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = torch.einsum("qhd,khd->hqk", q, k) / 8
    assert 0.7 < logits.std() < 1.3


def test_hidden_matrices_are_under_blocks_and_two_dimensional() -> None:
    """Optimizer groups (Muon on the blocks' matrices) read the parameters' names."""
    names = [n for n, p in tiny().named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    assert len(names) == 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny(pos_embed="learned").to(dtype)
    model.save_pretrained(tmp_path / "run" / "model")
    again = NaViT.from_pretrained(tmp_path / "run" / "model")
    assert again.config == model.config
    batch = pack_images(random_images(5, seed=0), patch_size=4)
    assert torch.equal(again(batch).pooled, model(batch).pooled)
    again(batch).pooled.sum().backward()


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    towers = {"vision": NaViTConfig.named("tiny"), "text": TextConfig.named("tiny")}
    CLIP(CLIPConfig(**towers)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a NaViT; got 'CLIP'"):
        NaViT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        NaViT.from_pretrained(tmp_path / "nowhere")


# Dense features


@pytest.mark.parametrize("changes", [{}, {"pool": "cls", "num_registers": 3}])
def test_per_image_tokens_are_grids_where_nothing_was_dropped(changes: dict[str, object]) -> None:
    model = tiny(**changes).double()
    whole = random_images(4, seed=1, drop=False)
    ragged = [image for image in random_images(30, seed=2) if len(image.patches) < len_of(image)]
    images = [whole[0], *ragged[:3], *whole[1:]]
    batch = pack_images(images, patch_size=4, seq_len=40)

    output = model(batch)

    found = output.per_image()
    assert len(found) == len(images)
    for item, image in zip(found, images, strict=True):
        [alone] = model(pack_images([image], patch_size=4)).per_image()
        complete = len(image.patches) == len_of(image)
        assert item.is_complete == complete
        assert item.grid == image.grid
        assert torch.equal(item.positions, image.positions)
        expected = (*image.grid, 64) if complete else (len(image.patches), 64)
        assert item.tokens.shape == alone.tokens.shape == expected
        torch.testing.assert_close(item.tokens, alone.tokens, rtol=0, atol=1e-10)
    # The same numbers as in their places in the sequences.
    flat = torch.cat([item.tokens.reshape(-1, 64) for item in found])
    assert flat.sum().item() == pytest.approx(output.tokens.sum().item())


def len_of(image: RandomImage) -> int:
    return image.grid[0] * image.grid[1]


def test_an_empty_batch_has_no_image_tokens() -> None:
    assert tiny()(pack_images([], patch_size=4, seq_len=8)).per_image() == []


# Stochastic depth and checkpointing


def test_stochastic_depth_is_drawn_per_image_and_keeps_the_mean() -> None:
    """Every token of an image takes a branch or skips it; what is kept is scaled up."""
    config = NaViTConfig.named("tiny", depth=2, drop_path=0.4)
    branch = Branch(config, 0.4).train()
    lengths = tuple(range(1, 2001))
    plan = AttentionPlan(lengths, torch.device("cpu"))
    torch.manual_seed(0)
    out = branch(torch.ones(sum(lengths), 64), plan)
    factors = torch.stack([part.unique() for part in out.split_with_sizes(list(lengths))])
    assert factors.shape == (2000, 1), "one factor for all tokens and channels of a segment"
    assert sorted(factors.unique().tolist()) == pytest.approx([0.0, 1 / 0.6])
    assert factors.mean().item() == pytest.approx(1.0, abs=0.06)
    assert torch.equal(branch.eval()(out, plan), out)


def test_stochastic_depth_rises_with_the_block() -> None:
    blocks = tiny(depth=5, drop_path=0.4).blocks
    assert [block.branch1.drop_rate for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_checkpointing_changes_no_gradient_and_keeps_fewer_activations() -> None:
    batch = pack_images(random_images(9, seed=0), patch_size=4, seq_len=60)
    saved: list[list[int]] = []
    gradients = []
    for checkpointing in (False, True):
        model = tiny(checkpointing=checkpointing, drop_path=0.3, depth=4).train()
        torch.manual_seed(1)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(batch).pooled.square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        saved.append(sizes)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert sum(saved[1]) < sum(saved[0]) / 2


@pytest.mark.parametrize("changes", [{}, {"pool": "cls", "num_registers": 2}])
def test_inference_in_parts_gives_what_the_whole_batch_gives(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NaViT(NaViTConfig.named("tiny", patch_size=4, **changes)).eval()
    batch = pack_images(random_images(9, seed=1, patch_size=4), patch_size=4, seq_len=60)
    whole = model(batch)  # with gradients: in one
    planned = []
    monkeypatch.setattr(block, "CPU_TOKENS", 6)
    monkeypatch.setattr(
        block, "_run", lambda *args, run=block._run: planned.append(args[2]) or run(*args)
    )
    with torch.no_grad():
        parts = model(batch)
    assert len(planned) > 3
    torch.testing.assert_close(parts.pooled, whole.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.tokens, whole.tokens, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_is_encoded_without_gradients_too() -> None:
    model = NaViT(NaViTConfig.named("tiny", patch_size=4)).eval()
    with torch.no_grad():
        assert model(pack_images([], patch_size=4, seq_len=60)).pooled.shape == (0, 64)
