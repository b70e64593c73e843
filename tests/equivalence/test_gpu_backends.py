"""On a CUDA device: xformers gives what the segments backend gives, to twice its own error."""

import pytest
import torch

from navit import NaViT, NaViTConfig
from tests.helpers.batches import pack_images, random_image

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_xformers_equals_segments(dtype: torch.dtype) -> None:
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
    for backend in ("segments", "xformers"):
        model = NaViT(NaViTConfig.named("tiny", attention=backend)).cuda()
        model.load_state_dict(reference.state_dict())
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found[backend] = model(batch).pooled
        found[backend].float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    error = {name: (value.double() - expected).abs().max().item() for name, value in found.items()}
    assert error["xformers"] <= 2 * error["segments"] + 1e-5
