"""Check conversion from and to timm against timm itself: ``python -m benchmarks.check_timm``.

For an environment that has timm. Every model is small and has random weights; images of several
sizes go through timm one at a time and through ours packed in one sequence. Where torchvision's
wheel does not fit torch's, as beside the CPU build, the operators it lacks are declared first.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from navit.pretrained import load_timm_vit, save_timm_vit
from tests.helpers.batches import RandomImage, pack_images, random_image

PATCH = 4
GRIDS = [(3, 3), (1, 1), (2, 5), (7, 2), (1, 9), (6, 6), (3, 4)]
TOLERANCE = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token and registers": {"reg_tokens": 3},
    "class token without a position": {"no_embed_class": True, "reg_tokens": 2},
    "average pooling with fc_norm": {"global_pool": "avg", "class_token": False},
    "average pooling beside a class token": {"global_pool": "avg"},
    "average pooling without fc_norm": {"global_pool": "avg", "fc_norm": False},
    "attention pooling": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "attention pooling with registers": {
        "global_pool": "map",
        "class_token": False,
        "reg_tokens": 2,
    },
    "layer scale": {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4},
    "query-key norm, no query biases": {"qk_norm": True, "qkv_bias": False},
}
CLIP_CASE = {"act_layer": "quick_gelu", "pre_norm": True}


def import_timm() -> Any:
    """Import timm, declaring the operators of a torchvision that does not fit torch."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every parameter; fresh norms and biases hide mistakes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1 or "embed" in name or "token" in name or "latent" in name:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def as_image(image: RandomImage, mean: Tensor, std: Tensor) -> Tensor:
    """Put the normalised patches of an image together: (1, 3, H, W)."""
    rows, cols = image.grid
    pixels = (image.patches.view(rows, cols, PATCH, PATCH, 3) / 255.0 - mean) / std
    return pixels.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * PATCH, cols * PATCH)


@torch.no_grad()
def errors(vit: Any, ours: Any) -> tuple[float, float]:
    """Return the largest differences of vectors and of tokens."""
    generator = torch.Generator().manual_seed(0)
    images = [random_image(r, c, patch_size=PATCH, generator=generator) for r, c in GRIDS]
    tokens = sum(len(image.patches) for image in images)
    output = ours(pack_images(images, patch_size=PATCH, seq_len=tokens))
    mean, std = torch.tensor(ours.config.pixel_mean), torch.tensor(ours.config.pixel_std)
    worst = [0.0, 0.0]
    for image, vector, found in zip(images, output.pooled, output.per_image(), strict=True):
        features = vit.forward_features(as_image(image, mean, std))
        expected = vit.forward_head(features, pre_logits=True)[0]
        patches = features[0, vit.num_prefix_tokens :]
        worst[0] = max(worst[0], float((vector - expected).abs().max()))
        worst[1] = max(worst[1], float((found.tokens.flatten(0, 1) - patches).abs().max()))
    return worst[0], worst[1]


def check(timm: Any, name: str, architecture: str, arguments: dict[str, Any]) -> float:
    """Convert a model, write it, let timm read it; print and return the largest difference."""
    sizes = {"img_size": 12, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model(architecture, **sizes, **arguments, dynamic_img_size=True).eval()
    randomize(vit)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    ours = load_timm_vit(vit).eval()
    there = errors(vit, ours)
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    with tempfile.TemporaryDirectory() as folder:
        save_timm_vit(ours, Path(folder) / "ours")
        again = timm.create_model(
            f"local-dir:{folder}/ours", pretrained=True, dynamic_img_size=True
        ).eval()
        back = errors(again, ours)
        timm.models.save_for_hf(vit, f"{folder}/theirs", safe_serialization=True)
        read = load_timm_vit(f"{folder}/theirs")
        reread = errors(vit, read.eval())
    worst = max(*there, *back, *reread)
    print(f"{name:40s} " + "  ".join(f"{x:.1e}" for x in (*there, *back, *reread)))
    return worst


def main() -> int:
    """Check all cases; 1 if any difference is above the tolerance."""
    timm = import_timm()
    torch.manual_seed(0)
    print(f"timm {timm.__version__}, torch {torch.__version__}; largest differences of vectors and")
    print("tokens: timm's model converted; ours saved and read by timm; timm's folder read by ours")
    worst = [check(timm, name, "vit_base_patch16_224", case) for name, case in CASES.items()]
    worst.append(check(timm, "CLIP's image tower", "vit_base_patch32_clip_224", CLIP_CASE))
    print(f"largest {max(worst):.1e}, tolerance {TOLERANCE:.0e}")
    return int(max(worst) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
