"""Check conversion from and to timm against timm itself: ``python -m benchmarks.check_timm``.

For an environment that has timm. Every model has random weights and, but for FlexiViT-S, is small;
images of several sizes go through timm one at a time and through ours packed in one sequence. The
PI-resize is compared with timm's own. Where torchvision's wheel does not fit torch's, as beside the
CPU build, the operators it lacks are declared first.
"""

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import import_torchvision
from navit import NaViT, NaViTConfig
from navit.model.pi_resize import pi_resize
from navit.pretrained import load_timm_vit, save_flexivit, save_timm_vit
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
FLEXI_SIZES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
FLEXI_GRID = 15
"""Of FlexiViT in timm: patches of 16 pixels on an image of 240."""


def import_timm() -> Any:
    """Import timm, which imports torchvision."""
    import_torchvision()
    return import_module("timm")


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
    size, (rows, cols) = image.patch_size, image.grid
    pixels = (image.patches.view(rows, cols, size, size, 3) / 255.0 - mean) / std
    return pixels.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * size, cols * size)


@torch.no_grad()
def errors(vit: Any, ours: Any, grids: list[tuple[int, int]] = GRIDS) -> tuple[float, float]:
    """Return the largest differences of vectors and of tokens."""
    size, generator = ours.config.patch_size, torch.Generator().manual_seed(0)
    images = [random_image(r, c, patch_size=size, generator=generator) for r, c in grids]
    tokens = sum(len(image.patches) for image in images)
    output = ours(pack_images(images, patch_size=size, seq_len=tokens))
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
    print(f"{name:40s} {shown(*there, *back, *reread)}")
    return worst


def check_flexivit(timm: Any) -> float:
    """Compare timm's FlexiViT-S at its own size with ours, and with what it reads of ours."""
    grids = [(FLEXI_GRID, FLEXI_GRID), (7, 20), (3, 2)]
    vit = timm.create_model("flexivit_small", img_size=240, dynamic_img_size=True).eval()
    randomize(vit)
    fixed = load_timm_vit(vit).eval()
    there = errors(vit, fixed, grids)
    flexible = errors(vit, fixed.flexible(), grids)

    settings = {"biases": True, "qk_norm": False, "activation": "gelu_tanh", "pos_table_size": 7}
    config = NaViTConfig.named("s", pool="cls", pos_embed="grid", patch_buffer=32, **settings)
    ours = NaViT(config).eval()
    randomize(ours)
    again = timm.create_model("flexivit_small", img_size=240, act_layer="gelu_tanh").eval()
    with tempfile.TemporaryDirectory() as folder:
        save_flexivit(ours, f"{folder}/ours.npz")
        again.load_pretrained(f"{folder}/ours.npz")
    # timm resizes positions once, to the grid of 240 pixels: other grids are not comparable.
    back = errors(again, ours, grids[:1])
    print(f"{'FlexiViT-S, patches of 16 on 240 pixels':40s} {shown(*there, *flexible, *back)}")
    return max(*there, *flexible, *back)


@torch.no_grad()
def check_pi_resize(timm: Any) -> float:
    """Compare the PI-resize with timm's, at the resize that FlexiViT was trained with."""
    worst = 0.0
    for old in (8, 16, 32):
        weight = torch.randn(64, 3, old, old) * (3 * old**2) ** -0.5
        for new in FLEXI_SIZES:
            theirs = timm.layers.resample_patch_embed(
                weight, [new, new], interpolation="bilinear", antialias=False
            )
            ours = pi_resize(weight.permute(0, 2, 3, 1).flatten(1), new)
            difference = ours - theirs.permute(0, 2, 3, 1).flatten(1)
            worst = max(worst, float(difference.abs().max()))
    print(f"{'PI-resize of 8, 16, 32 to 8...48 pixels':40s} {shown(worst)}")
    return worst


def shown(*differences: float) -> str:
    """Lay out differences, for the terminal."""
    return "  ".join(f"{x:.1e}" for x in differences)


def main() -> int:
    """Check all cases; 1 if any difference is above the tolerance."""
    timm = import_timm()
    torch.manual_seed(0)
    print(f"timm {timm.__version__}, torch {torch.__version__}; largest differences of vectors and")
    print("tokens: timm's model converted; ours saved and read by timm; timm's folder read by ours")
    worst = [check(timm, name, "vit_base_patch16_224", case) for name, case in CASES.items()]
    worst.append(check(timm, "CLIP's image tower", "vit_base_patch32_clip_224", CLIP_CASE))
    print("timm's FlexiViT converted; made flexible; ours saved as big_vision's and read by timm")
    worst.append(check_flexivit(timm))
    print("bilinear, no antialias, float32; weights of variance 1 / (values of a patch)")
    worst.append(check_pi_resize(timm))
    print(f"largest {max(worst):.1e}, tolerance {TOLERANCE:.0e}")
    return int(max(worst) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
