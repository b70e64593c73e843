"""Mixed images through a vision tower: ours packed, against the dense limit and other programs.

ViT-S with random weights, 64 images of 8 to 256 tokens, two threads. The dense limit is our own
modules on equal images (`benchmarks.dense`). The others: vit-pytorch's two NaViTs (dense mask,
nested tensors), timm's NaFlexViT and Hugging Face's Siglip2 (padded rows). Images and the blocks'
shape are held equal; heads and norms differ a little between the programs. Useful tokens are
counted, never padding. Each side gets its pixels in the form it takes, made beforehand; vit-pytorch
packs into sequences of 256, 512 or 1,024 tokens, whichever is fastest.

All sides run in turn, ours twice, a few rounds: a ratio is the median over the rounds, and ours
against itself is the A/A control.
"""

import multiprocessing
import resource
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from benchmarks import peers
from benchmarks.dense import dense_forward, equal_images, equal_plan
from benchmarks.harness import Paired, spread, wait
from navit.model import NaViT, NaViTConfig
from tests.helpers.batches import RandomImage, pack_images, random_image

PATCH_SIZE, MAX_TOKENS, SEQ_LEN = 16, 256, 1024
DENSE = "dense limit"
PEERS = {
    "vit-pytorch": "vit-pytorch",
    "vit-pytorch nested": "vit-pytorch",
    "timm NaFlexViT": "timm",
    "HF Siglip2": "transformers",
}
"""Towers of other programs, and the package each is from."""
Forward = Callable[[], Tensor]
Side = tuple[nn.Module, Forward]
Device = torch.device | str


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure forward, and forward + backward, in float32 and bfloat16, and peak memory."""
    images = mixed_images(6 if quick else 64, seed=0)
    shape = {"width": 64, "depth": 1, "num_heads": 1, "mlp_dim": 256} if quick else {}
    config = NaViTConfig.named("s", patch_size=PATCH_SIZE, **shape)
    names = peers_there()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sides: dict[str, Side] = {"ours": packed_tower(config, images)}
        sides[DENSE] = _dense(sides["ours"][0], images)
        sides |= {name: TOWERS[name](config, images, "cpu") for name in names}
        print(_header(images, sides))
        rows = []
        for backward in (False, True):
            memory = _memory(sides, backward=backward)
            for dtype in (torch.float32, torch.bfloat16):
                rounds = _rounds(sides, dtype, backward=backward, count=2 if quick else 4)
                rows += _rows(rounds, images, dtype, backward, memory)
        return rows
    finally:
        torch.set_num_threads(threads)


def peers_there() -> list[str]:
    """Name the towers of other programs that are installed."""
    names = [name for name, package in PEERS.items() if peers.is_there(package)]
    return [name for name in names if name != "HF Siglip2" or peers.is_there("torchvision")]


def _header(images: list[RandomImage], sides: dict[str, Side]) -> str:
    tokens = sum(len(image.patches) for image in images)
    dense = equal_images([len(image.patches) for image in images], PATCH_SIZE)[0]
    found = f"{len(images)} images, {tokens} tokens; dense: {len(dense)} of {dense.shape[1]}"
    missing = peers.missing({name: p for name, p in PEERS.items() if name not in sides})
    lines = [found + (f"; {missing}" if missing else "")]
    lines.append(f"{'':20} {'what':28} {'our speed / theirs':44} {'our tokens/s':>12}  memory")
    return "\n".join(lines)


def _rounds(
    sides: dict[str, Side], dtype: torch.dtype, *, backward: bool, count: int
) -> dict[str, list[float]]:
    """Time every side once a round, ours at both ends."""
    steps = {name: training_step(*side, dtype, backward=backward) for name, side in sides.items()}
    if "vit-pytorch" in steps:
        steps["vit-pytorch"] = fastest(sides["vit-pytorch"], dtype, backward=backward)
    order = [*steps, "ours"]
    seconds: dict[str, list[float]] = {name: [] for name in [*steps, "ours again"]}
    label = f"{what(dtype, backward)}"
    for number in tqdm(range(count + 1), desc=label, unit="round", leave=False):
        for place, name in enumerate(order):
            start = perf_counter()
            steps[name]()
            took = perf_counter() - start
            if number:  # the first round warms up
                again = name == "ours" and place > 0
                seconds["ours again" if again else name].append(took)
    return seconds


def _rows(
    seconds: dict[str, list[float]],
    images: list[RandomImage],
    dtype: torch.dtype,
    backward: bool,
    memory: dict[str, float],
) -> list[dict[str, Any]]:
    rows = []
    tokens = sum(len(image.patches) for image in images)
    ours = [sum(pair) / 2 for pair in zip(seconds["ours"], seconds["ours again"], strict=True)]
    control = spread(divide(seconds["ours again"], seconds["ours"]))
    for name in seconds:
        if name.startswith("ours"):
            continue
        theirs = seconds[name]
        if name == DENSE:  # its tokens are nearly, not exactly, as many
            dense = equal_images([len(image.patches) for image in images], PATCH_SIZE)[0]
            theirs = [x * tokens / dense[..., 0].numel() for x in theirs]
        ratio = spread(divide(theirs, ours))
        middle = sorted(ours)[len(ours) // 2]
        timed = Paired(*ratio, *control, sorted(theirs)[len(ours) // 2], middle, len(ours))
        row: dict[str, Any] = {
            "against": name,
            "what": what(dtype, backward),
            "times_their_speed": timed,
            "our_tokens_per_s": tokens / middle,
        }
        if name in memory:
            row["memory_of_theirs"] = memory["ours"] / max(memory[name], 1e-3)
        rows.append(row)
        share = f"{row['memory_of_theirs']:.2f}" if name in memory else ""
        print(f"{name:20} {row['what']:28} {timed!s:44} {tokens / middle:12,.0f}  {share}")
    return rows


def divide(a: Iterable[float], b: Iterable[float]) -> list[float]:
    """Divide one by one."""
    return [x / y for x, y in zip(a, b, strict=True)]


def what(dtype: torch.dtype, backward: bool) -> str:
    """Name a measurement as in a table."""
    kind = "forward + backward" if backward else "forward"
    return f"{kind}, {str(dtype).removeprefix('torch.')}"


def training_step(
    model: nn.Module, forward: Forward, dtype: torch.dtype, *, backward: bool
) -> Callable[[], None]:
    """Make what is timed: an inference pass or, with ``backward``, one with its gradients."""

    def step() -> None:
        model.train(backward)
        device = next(model.parameters()).device.type
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)
        with torch.set_grad_enabled(backward), autocast:
            loss = forward().float().square().sum()
        if backward:
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    return step


def fastest(side: Side, dtype: torch.dtype, *, backward: bool) -> Callable[[], None]:
    """Return vit-pytorch's step with the sequence length it is fastest with."""
    model, forward = side
    steps = {
        length: training_step(model, lambda n=length: forward(n), dtype, backward=backward)  # type: ignore[call-arg, misc]
        for length in (256, 512, 1024)
    }
    seconds = {}
    for length, step in steps.items():
        step()
        wait()
        start = perf_counter()
        step()
        wait()
        seconds[length] = perf_counter() - start
    best = min(seconds, key=lambda length: seconds[length])
    tqdm.write(f"vit-pytorch packs into sequences of {best} tokens")
    return steps[best]


def _memory(sides: dict[str, Side], *, backward: bool) -> dict[str, float]:
    """Return by how many MiB one float32 pass of each side raises the peak of resident memory."""
    measured = [name for name in sides if name != DENSE]
    steps = [training_step(*sides[name], torch.float32, backward=backward) for name in measured]
    return dict(zip(measured, map(_peak_mib, steps), strict=True))


def _peak_mib(step: Callable[[], None]) -> float:
    """Measure in a process of its own."""
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


# Sides: (configuration, images, device) -> model and a forward pass that gives one vector an image


def packed_tower(config: NaViTConfig, images: list[RandomImage], device: Device = "cpu") -> Side:
    """Ours, packed."""
    torch.manual_seed(0)
    model = NaViT(config).to(device)
    batch = pack_images(images, patch_size=PATCH_SIZE, seq_len=SEQ_LEN).to(device)
    return model, lambda: model(batch).pooled


def _dense(model: nn.Module, images: list[RandomImage]) -> Side:
    """Ours, on equal images without packing."""
    assert isinstance(model, NaViT)
    inputs = equal_images([len(image.patches) for image in images], PATCH_SIZE)
    plan = equal_plan(inputs[0])
    return model, lambda: dense_forward(model, *inputs, plan)


def _vit_pytorch(
    config: NaViTConfig, images: list[RandomImage], device: Device, *, nested: bool
) -> Side:
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
    ).to(device)
    pixels = [_pixels(image).to(device) for image in images]
    if nested:
        return model, lambda: model(pixels)

    def grouped(length: int = SEQ_LEN) -> Tensor:
        vectors: Tensor = model(pixels, group_images=True, group_max_seq_len=length)
        return vectors

    return model, grouped


def _timm(config: NaViTConfig, images: list[RandomImage], device: Device) -> Side:
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
    ).to(device)
    patches, valid = (x.to(device) for x in _padded(images))
    coords = pad_sequence([image.positions.long() for image in images], batch_first=True).to(device)
    return model, lambda: model({"patches": patches, "patch_coord": coords, "patch_valid": valid})


def _siglip2(config: NaViTConfig, images: list[RandomImage], device: Device) -> Side:
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
    ).to(device)
    patches, valid = (x.to(device) for x in _padded(images))
    shapes = torch.tensor([image.grid for image in images])
    return (
        model,
        lambda: (
            model(
                pixel_values=patches, pixel_attention_mask=valid.int(), spatial_shapes=shapes
            ).pooler_output
        ),
    )


TOWERS: dict[str, Callable[[NaViTConfig, list[RandomImage], Device], Side]] = {
    "vit-pytorch": lambda *args: _vit_pytorch(*args, nested=False),
    "vit-pytorch nested": lambda *args: _vit_pytorch(*args, nested=True),
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
