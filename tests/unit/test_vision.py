"""NaViT as a module: shapes, empty batches, errors, saving."""

from pathlib import Path

import pytest
import torch

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from tests.helpers.batches import pack_images, random_images


def tiny(**changes: object) -> NaViT:
    torch.manual_seed(0)
    return NaViT(NaViTConfig.named("tiny", patch_size=4, **changes))


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_an_empty_batch_gives_no_vector_and_zero_gradients(pool: str) -> None:
    """A rank without images still enters every collective, so every gradient must exist."""
    model = tiny(pool=pool)
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
