"""A packed image tower beside the padded and nested ones of other programs, on a CPU.

The same images of mixed sizes, as patches, go through towers of one shape (ViT-S) with random
weights: ours packed, vit-pytorch's two NaViTs (dense mask, nested tensors), timm's NaFlexViT and
Hugging Face's Siglip2 (padded rows). Images and the blocks' shape are held equal; heads and norms
differ a little between the programs. Useful tokens are counted, never padding. Each side gets its
pixels in the form it takes, made beforehand.
"""

import multiprocessing
import resource
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks import peers
from benchmarks.bench_model import dtype_name, training_step
from benchmarks.harness import paired_ratio
from navit.model import NaViT, NaViTConfig
from tests.helpers.batches import RandomImage, pack_images, random_image

PATCH_SIZE, MAX_TOKENS = 16, 256
PEERS = {
    "vit-pytorch": "vit-pytorch",
    "vit-pytorch nested": "vit-pytorch",
    "timm NaFlexViT": "timm",
    "HF Siglip2": "transformers",
}
"""Towers of other programs, and the package each is from."""
Forward = Callable[[], Tensor]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure forward, and forward + backward, in float32 and bfloat16, and peak memory."""
    images = mixed_images(6 if quick else 64, seed=0)
    shape = {"width": 64, "depth": 1, "num_heads": 1, "mlp_dim": 256} if quick else {}
    config = NaViTConfig.named("s", patch_size=PATCH_SIZE, **shape)
    tokens = sum(len(image.patches) for image in images)
    print(f"{len(images)} images, {tokens} tokens, {peers.missing(PEERS)}")
    names = [name for name, package in PEERS.items() if peers.is_there(package)]
    names = [name for name in names if name != "HF Siglip2" or peers.is_there("torchvision")]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = []
        for name in names:
            rows += [
                _measure(name, config, images, dtype, backward=backward, quick=quick)
                for dtype in (torch.float32, torch.bfloat16)
                for backward in (False, True)
            ]
        return rows or [_alone(config, images, quick=quick)]
    finally:
        torch.set_num_threads(threads)


def _measure(
    name: str,
    config: NaViTConfig,
    images: list[RandomImage],
    dtype: torch.dtype,
    *,
    backward: bool,
    quick: bool,
) -> dict[str, Any]:
    ours = training_step(*packed_tower(config, images), dtype, backward=backward)
    theirs = training_step(*TOWERS[name](config, images), dtype, backward=backward)
    timed = paired_ratio(theirs, ours, pairs=2 if quick else 4)
    row: dict[str, Any] = {
        "peer": name,
        "what": ("forward + backward" if backward else "forward") + f", {dtype_name(dtype)}",
        "times_their_speed": timed,
        "our_tokens_per_s": sum(len(image.patches) for image in images) / timed.seconds_b,
    }
    if backward:
        row["memory_of_theirs"] = _peak_mib(ours) / _peak_mib(theirs)
    print(f"{name:20} {row['what']:30} {timed} memory {row.get('memory_of_theirs', 0):.2f}")
    return row


def _alone(config: NaViTConfig, images: list[RandomImage], *, quick: bool) -> dict[str, Any]:
    """Time ours against itself, where no peer is installed."""
    step = training_step(*packed_tower(config, images), torch.float32, backward=True)
    timed = paired_ratio(step, step, pairs=2 if quick else 4)
    speed = sum(len(image.patches) for image in images) / timed.seconds_b
    print(f"ours alone           forward + backward, float32      {speed:,.0f} tokens/s")
    return {"peer": "none installed", "our_tokens_per_s": speed, "time": timed}


def _peak_mib(step: Callable[[], None]) -> float:
    """Return by how much a step raises the peak of resident memory, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)  # threads of the parent do not survive a fork
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = context.Process(target=child)
    process.start()
    peak = float(receiver.recv())
    process.join()
    return peak


def mixed_images(count: int, *, seed: int) -> list[RandomImage]:
    """Draw images of lognormal token counts: median 128, sigma 0.6, at most 256."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        size, shape = torch.randn(2, generator=generator).tolist()
        tokens = min(MAX_TOKENS, 128 * 2.718281828 ** (0.6 * size))
        rows = max(1, min(16, round((tokens * 2.718281828 ** (0.3 * shape)) ** 0.5)))
        cols = max(1, min(16, int(tokens / rows)))
        images.append(random_image(rows, cols, patch_size=PATCH_SIZE, generator=generator))
    return images


# Towers: (configuration, images) -> model and a forward pass that gives one vector an image


def packed_tower(config: NaViTConfig, images: list[RandomImage]) -> tuple[nn.Module, Forward]:
    """Ours, packed."""
    torch.manual_seed(0)
    model = NaViT(config)
    batch = pack_images(images, patch_size=PATCH_SIZE, seq_len=1024)
    return model, lambda: model(batch).pooled


def _vit_pytorch(
    config: NaViTConfig, images: list[RandomImage], *, nested: bool
) -> tuple[nn.Module, Forward]:
    peers.import_torchvision()
    module = import_module("vit_pytorch.na_vit_nested_tensor" if nested else "vit_pytorch.na_vit")
    model = module.NaViT(
        image_size=256,
        patch_size=PATCH_SIZE,
        num_classes=1,
        dim=config.width,
        depth=config.depth,
        heads=config.num_heads,
        dim_head=config.head_dim,
        mlp_dim=config.mlp_dim,
        **({"token_dropout_prob": 0.0} if nested else {}),
    )
    pixels = [_pixels(image) for image in images]
    if nested:
        return model, lambda: model(pixels)
    return model, lambda: model(pixels, group_images=True, group_max_seq_len=1024)


def _timm(config: NaViTConfig, images: list[RandomImage]) -> tuple[nn.Module, Forward]:
    peers.import_torchvision()
    naflexvit = import_module("timm.models.naflexvit")
    model = naflexvit.NaFlexVit(
        naflexvit.NaFlexVitCfg(
            patch_size=PATCH_SIZE,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.width,
            global_pool="map",
            class_token=False,
        ),
        num_classes=0,
    )
    patches, valid = _padded(images)
    coords = pad_sequence([image.positions.long() for image in images], batch_first=True)
    return model, lambda: model({"patches": patches, "patch_coord": coords, "patch_valid": valid})


def _siglip2(config: NaViTConfig, images: list[RandomImage]) -> tuple[nn.Module, Forward]:
    peers.import_torchvision()
    transformers = import_module("transformers")
    model = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            patch_size=PATCH_SIZE,
            num_patches=256,
        )
    )
    patches, valid = _padded(images)
    shapes = torch.tensor([image.grid for image in images])
    return (
        model,
        lambda: (
            model(
                pixel_values=patches, pixel_attention_mask=valid.int(), spatial_shapes=shapes
            ).pooler_output
        ),
    )


TOWERS: dict[str, Callable[[NaViTConfig, list[RandomImage]], tuple[nn.Module, Forward]]] = {
    "vit-pytorch": lambda config, images: _vit_pytorch(config, images, nested=False),
    "vit-pytorch nested": lambda config, images: _vit_pytorch(config, images, nested=True),
    "timm NaFlexViT": _timm,
    "HF Siglip2": _siglip2,
}


def _padded(images: list[RandomImage]) -> tuple[Tensor, Tensor]:
    """Return normalised patches, one padded row an image, and which of them are real."""
    patches = [(image.patches.float() - 127.5) / 127.5 for image in images]
    valid = [torch.ones(len(image.patches), dtype=torch.bool) for image in images]
    return pad_sequence(patches, batch_first=True), pad_sequence(valid, batch_first=True)


def _pixels(image: RandomImage) -> Tensor:
    """Return normalised pixels (3, H, W)."""
    rows, cols = image.grid
    side = PATCH_SIZE
    cut = image.patches.view(rows, cols, side, side, 3).permute(4, 0, 2, 1, 3)
    return (cut.reshape(3, rows * side, cols * side).float() - 127.5) / 127.5


if __name__ == "__main__":
    run()
