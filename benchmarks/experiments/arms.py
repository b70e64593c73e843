"""What is compared: experiments, and their arms as training configurations.

Lengths are in patches, so that one definition holds for every data set's patch size. An image of
side s patches (that of the square of equal area) has s * s tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from navit.train.config import TrainConfig, small_clip
from navit.train.optim import OptimConfig
from packer.config import PackerConfig
from packer.plan.drop import (
    BetaDrop,
    ConstantDrop,
    NoDrop,
    ResolutionDrop,
    ScheduledDrop,
    TokenDrop,
)
from packer.plan.patch_size import OnePatchSize, RandomPatchSize
from packer.plan.resize import (
    FixedSide,
    Native,
    NormalArea,
    NormalSide,
    Resolution,
    UniformArea,
    UniformSide,
)

Letter = Literal["a", "b", "c", "d", "e"]
Axis = Literal["tokens", "patch size"]
Sampling = Literal["square", "fixed", "uniform side", "normal side", "uniform area", "normal area"]
Dropping = Literal["none", "constant", "beta", "resolution", "falling", "rising"]

LOW, HIGH = 4, 10
"""Smallest and largest side of training images in patches: 16 to 100 tokens. The paper's are 64 and
256 px, 4 and 16 patches (section 3)."""
SEQ_LEN, SEQUENCES = 500, 20
"""Tokens a sequence, five squares of the largest side, and sequences a step."""
EVALUATIONS = 6
"""Points of a curve."""


@dataclass(frozen=True)
class Arm:
    """One way to train, at the same compute as the others."""

    name: str
    """Short and unique; part of the folder's name."""
    what: str
    """How tables and plots call it."""
    sampling: Sampling = "normal side"
    """Where the side of a training image comes from; "square" squashes every image."""
    dropping: Dropping = "beta"
    """How many tokens are left out; the mean rate is 0.5 everywhere but in "none"."""
    side: float = HIGH
    """Largest side in the arm's own patches; the only one of "square" and "fixed"."""
    vision: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the image tower."""
    budgets: tuple[int, ...] = (36, 64, 100, 144)
    """Token budgets of an image at which the finished model is evaluated; of an experiment over
    patch sizes, those in pixels."""
    patch_sizes: tuple[int, ...] = ()
    """Sides of patches in pixels; of several each image draws one. None: the data set's."""
    start: str | None = None
    """Arm whose weights of the same seed it starts from."""
    taught: bool = False
    """Whether it also learns to agree with the model it starts from."""

    @property
    def train_tokens(self) -> int:
        """Token budget of an image in training, and in the evaluations along the way."""
        return int(self.side**2)

    def patch_size(self, scale: "Scale") -> int:
        """Return the side of a patch in pixels at the evaluations along the way."""
        return self.patch_sizes[0] if self.patch_sizes else scale.patch_size


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared with each other."""

    letter: Letter
    """Its name on the command line."""
    title: str
    """What is asked."""
    arms: tuple[Arm, ...]
    """The first is the baseline of the paired differences."""
    axis: Axis = "tokens"
    """What the finished models are evaluated at several values of."""

    @property
    def starts(self) -> frozenset[str]:
        """Arms that others start from."""
        return frozenset(arm.start for arm in self.arms if arm.start is not None)


@dataclass(frozen=True)
class Scale:
    """What differs between data sets and between a real run and a trial."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    real: bool = False
    """Photographs: flips and colour jitter, and the rates of the preset `pairs`."""
    seq_len: int = SEQ_LEN
    """L."""
    sequences: int = SEQUENCES
    """B."""
    tiny: bool = False
    """Towers of one narrow block, to see that everything runs."""


NAVIT = Arm("navit", "resolution sampling + drop")
SQUARE = Arm("vit", "fixed square, all tokens", "square", "none", budgets=(HIGH**2,))
# 25 tokens: four times the images of the large square, and sequences without padding.
SMALL = Arm("vit-small", "smaller fixed square", "square", "none", side=5, budgets=(25,))
_UNSEEN = (16, 36, 64, 100, 144, 196, 256)


def _positions(name: str, what: str, **vision: Any) -> Arm:
    return Arm(f"pos-{name}", what, side=8, vision=vision, budgets=_UNSEEN)


PIXELS = 160
"""Side of the images of (e), whatever the size of their patches."""
DRAWN_SIZES = (16, 20, 24, 32)
"""Patch sizes of its flexible arms: 100 to 25 tokens an image."""
_EVALUATED_SIZES = (14, 16, 18, 20, 24, 28, 32, 40)


def _patches(
    name: str, what: str, *sizes: int, start: str | None = None, taught: bool = False
) -> Arm:
    return Arm(
        f"patch-{name}",
        what,
        "fixed",
        "none",
        side=PIXELS / sizes[0],
        budgets=_EVALUATED_SIZES,
        patch_sizes=sizes,
        start=start,
        taught=taught,
    )


EXPERIMENTS = {
    found.letter: found
    for found in (
        Experiment("a", "NaViT against a fixed square ViT, equal compute", (SQUARE, SMALL, NAVIT)),
        Experiment(
            "b",
            "token dropping, equal compute",
            (
                Arm("drop-none", "none", dropping="none"),
                Arm("drop-constant", "constant 0.5", dropping="constant"),
                replace(NAVIT, what="Beta, mean 0.5, at most 0.8"),
                Arm("drop-resolution", "by resolution, 0.3 to 0.7", dropping="resolution"),
                Arm("drop-falling", "falling from 0.8 to 0.2", dropping="falling"),
                Arm("drop-rising", "rising from 0.2 to 0.8", dropping="rising"),
            ),
        ),
        Experiment(
            "c",
            "fixed against variable resolution, side against area",
            (
                Arm("fixed", "fixed, largest side", "fixed"),
                Arm("fixed-small", "fixed, smaller side", "fixed", side=6),
                Arm("uniform-side", "side uniform", "uniform side"),
                replace(NAVIT, what="side N(-0.5, 1)"),
                Arm("uniform-area", "area uniform", "uniform area"),
                Arm("normal-area", "area N(-0.5, 1)", "normal area"),
            ),
        ),
        Experiment(
            "d",
            "position embeddings at resolutions not seen in training",
            (
                _positions("fourier", "Fourier, fractional"),
                _positions("learned", "learned, fractional", pos_embed="learned"),
                _positions(
                    "absolute", "learned, absolute", pos_embed="learned", pos_coordinates="absolute"
                ),
                _positions(
                    "sinusoidal",
                    "sinusoidal, absolute",
                    pos_embed="sinusoidal",
                    pos_coordinates="absolute",
                ),
                _positions("grid", "learned grid, interpolated", pos_embed="grid"),
            ),
        ),
        Experiment(
            "e",
            "one flexible model against one model a patch size",
            (
                _patches("16", "16 px alone", 16),
                _patches("24", "24 px alone", 24),
                _patches("32", "32 px alone", 32),
                _patches("flexible", "flexible, from scratch", *DRAWN_SIZES),
                _patches("started", "flexible, from 16 px", *DRAWN_SIZES, start="patch-16"),
                _patches(
                    "taught",
                    "flexible, from and taught by 16 px",
                    *DRAWN_SIZES,
                    start="patch-16",
                    taught=True,
                ),
            ),
            axis="patch size",
        ),
    )
}
"""The experiments in their order."""


def resolution(arm: Arm, patch_size: int) -> Resolution:
    """Return where the sides of an arm's training images come from."""
    low, high = float(LOW * patch_size), float(arm.side * patch_size)
    made: dict[Sampling, Resolution] = {
        "square": Native(),  # the images themselves are squares
        "fixed": FixedSide(high),
        "uniform side": UniformSide(low, high),
        "normal side": NormalSide(low, high),
        "uniform area": UniformArea(low, high),
        "normal area": NormalArea(low, high),
    }
    return made[arm.sampling]


def token_drop(arm: Arm, images: int) -> TokenDrop:
    """Return an arm's distribution of drop rates.

    Args:
        arm: The arm.
        images: Images of the whole run, which the schedules are stretched over: half way at half of
            them, and 99 % of the way between a tenth of a run's images from both ends.
    """
    middle, tau = max(images, 2) / 2, max(images, 2) / 12
    made: dict[Dropping, TokenDrop] = {
        "none": NoDrop(),
        "constant": ConstantDrop(0.5),
        "beta": BetaDrop(0.5, 0.8),
        "resolution": ResolutionDrop(0.3, 0.7, LOW**2, arm.train_tokens),
        "falling": ScheduledDrop(middle, -tau),
        "rising": ScheduledDrop(middle, tau),
    }
    return made[arm.dropping]


def packing(arm: Arm, scale: Scale, *, images: int, seed: int = 0) -> PackerConfig:
    """Return what an arm does to every image of a run over so many images."""
    several = len(arm.patch_sizes) > 1
    return PackerConfig(
        patch_size=arm.patch_size(scale),
        patch_sizes=RandomPatchSize(arm.patch_sizes) if several else OnePatchSize(),
        seq_len=scale.seq_len,
        max_tokens=arm.train_tokens,
        resolution=resolution(arm, arm.patch_size(scale)),
        token_drop=token_drop(arm, images),
        seed=seed,
    )


def arm_config(arm: Arm, scale: Scale, *, images: int, steps: int, seed: int) -> TrainConfig:
    """Return an arm's training run; its shards are still to be named.

    Args:
        arm: The arm.
        scale: The data set's settings.
        images: Images the run is expected to see.
        steps: Optimizer steps; the lengths of the schedules are in proportion to them.
        seed: Of weights, order and draws.
    """
    model = small_clip()
    if scale.tiny:
        shape: dict[str, Any] = {"width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64}
        model = replace(
            model,
            vision=replace(model.vision, **shape),
            text=replace(model.text, **shape),
            embed_dim=32,
        )
    flexible: dict[str, Any] = {"patch_buffer": 32} if len(arm.patch_sizes) > 1 else {}
    vision = replace(model.vision, patch_size=arm.patch_size(scale), **flexible, **arm.vision)
    every = max(steps // EVALUATIONS, 1)
    return TrainConfig(
        packer=packing(arm, scale, images=images, seed=seed),
        model=replace(model, vision=vision),
        optim=OptimConfig(
            learning_rate=2e-3 if scale.real else 3e-3,
            muon_learning_rate=8e-3,
            weight_decay=0.5 if scale.real else 0.05,
            warmup_steps=max(steps // 13, 1),
            cooldown_steps=max(steps // 2, 1),
        ),
        steps=steps,
        sequences_per_batch=scale.sequences,
        ema_decay=0.98,
        eval_every=every,
        checkpoint_every=every,
        keep_checkpoints=1,
        flip=0.5 if scale.real else 0.0,
        color_jitter=0.4 if scale.real else 0.0,
        seed=seed,
    )
