"""On a CUDA device: backends give what the segments backend gives, corruption is the CPU's."""

import pytest
import torch

from navit import NaViT, NaViTConfig
from navit.model.masked import MaskedConfig, MaskedPredictor
from tests.helpers.batches import pack_images, random_image, random_images

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


def test_masked_prediction_corrupts_the_same_patches_on_every_device() -> None:
    images = random_images(9, seed=0, patch_size=8)
    batch = pack_images(images, patch_size=8, seq_len=40)
    torch.manual_seed(0)
    config = MaskedConfig(NaViTConfig.named("tiny", patch_size=8, attention="segments"))
    model = MaskedPredictor(config).double()
    torch.nn.init.normal_(model.head.weight)
    model.after_step()
    seed = model.step_seed()
    here = model.predict(batch, seed)
    there = model.cuda().predict(batch.to("cuda"), seed)
    for name in ("colours", "image", "places"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
    torch.testing.assert_close(there.logits.cpu(), here.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(batch.to("cuda")).cpu(), here.losses(), rtol=1e-9, atol=1e-9)
