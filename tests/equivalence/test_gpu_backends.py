"""On a CUDA device: every backend gives what the segments backend gives, to twice its own error."""

import pytest
import torch

from navit import NaViT, NaViTConfig
from tests.helpers.batches import pack_images, random_image

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("xformers", torch.float32),
        ("xformers", torch.bfloat16),
        ("xformers", torch.float16),
        ("varlen", torch.bfloat16),
        ("varlen", torch.float16),
    ],
)
def test_a_backend_equals_segments(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [
        random_image(rows, cols, patch_size=16, generator=generator)
        for rows, cols in [(1, 1), (3, 5), (16, 16), (7, 2), (1, 40)]
    ]
    batch = pack_images(images, patch_size=16, seq_len=512).to("cuda")
    torch.manual_seed(0)
    reference = NaViT(NaViTConfig.named("tiny", attention="segments")).double().cuda()
    expected = reference(batch).pooled
    found = {}
    for name in ("segments", backend):
        model = NaViT(NaViTConfig.named("tiny", attention=name)).cuda()
        model.load_state_dict(reference.state_dict())
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found[name] = model(batch).pooled
        found[name].float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    error = {name: (value.double() - expected).abs().max().item() for name, value in found.items()}
    assert error[backend] <= 2 * error["segments"] + 1e-5
