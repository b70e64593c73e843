"""Configurations of the towers, validated when they are made, and the table of named sizes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

AttentionBackend = Literal["auto", "segments", "xformers", "varlen"]
PositionEmbedding = Literal["fourier", "learned", "sinusoidal", "grid"]
PositionCoordinates = Literal["fractional", "absolute"]
PositionCombination = Literal["sum", "product", "stack"]
GridInterpolation = Literal["antialias", "corners", "bicubic", "bicubic_antialias"]
Pooling = Literal["map", "mean", "cls", "last"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Stem = Literal["resnet", "convs"]
PerChannel = tuple[float, float, float]

T = TypeVar("T", bound="ModelConfig")
N = TypeVar("N", bound="TransformerConfig")

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "depth": 2, "num_heads": 2, "mlp_dim": 256},
    "ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "s": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "b": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "l": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
}
"""Named sizes: "ti" and "s" of DeiT (arXiv:2012.12877, table 1), "b" and "l" of ViT
(arXiv:2010.11929, table 1); "tiny" is ours, for tests."""


@dataclass(frozen=True)
class ModelConfig:
    """What all configurations share: the way to and from JSON."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives.

        Raises:
            ValueError: If a key is not a field; the message lists the fields.
        """
        return _from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready mapping."""
        return asdict(self)


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Shape of a stack of blocks; what the image and the text tower share."""

    width: int = 384
    """D: size of a token's vector."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """H: attention heads; the head size is ``width / num_heads``."""
    mlp_dim: int = 1536
    """Hidden size of a block's MLP."""
    pool: Pooling = "map"
    """How a segment's tokens become one vector: attention pooling ("map"), their mean, a class
    token added to each segment ("cls", image tower only), or the caption's last token ("last", text
    tower only)."""
    pool_mlp: bool = True
    """Whether attention pooling ends with its residual MLP."""
    qk_norm: bool = True
    """Whether queries and keys are layer-normalised per head (NaViT section 3, ViT-22B)."""
    biases: bool = False
    """Whether linear and norm layers have a bias; NaViT has none."""
    norm_eps: float = 1e-6
    """Added to the variance in every layer norm; 1e-5 in CLIP."""
    activation: Activation = "gelu"
    """Nonlinearity of the MLPs. The tanh form (SigLIP, big_vision) differs from the exact one by
    at most 0.0005, and takes 5 times its time on a CPU in bfloat16, as much as an MLP product.
    "quick_gelu" is CLIP's x sigmoid(1.702 x)."""
    layer_scale: float | None = None
    """Start of a learned factor per channel on what a block adds (CaiT, arXiv:2103.17239); None:
    no factor."""
    drop_path: float = 0.0
    """Stochastic depth: share of segments that skip the last block's branches in training, rising
    linearly from 0 at the first block; drawn per image, not per token."""
    checkpointing: bool = False
    """Whether blocks are run again in the backward pass instead of keeping their activations."""
    attention: AttentionBackend = "auto"
    """Backend of block-diagonal attention; "auto" picks by device, dtype and head size."""

    def __post_init__(self) -> None:
        _check_positive(self, "width", "depth", "num_heads", "mlp_dim")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be between 0 and 1; got {self.norm_eps}.")
        if self.layer_scale is not None and not self.layer_scale > 0:
            raise ValueError(f"layer_scale must be positive, or None; got {self.layer_scale}.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1); got {self.drop_path}.")
        if not self.pool_mlp and self.pool != "map":
            raise ValueError(
                f"pool_mlp=False needs pool 'map', whose MLP it leaves out; got {self.pool!r}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads; got {self.width} and {self.num_heads}."
            )
        _check_choice("pool", self.pool, get_args(Pooling))
        _check_choice("activation", self.activation, get_args(Activation))
        _check_choice("attention", self.attention, get_args(AttentionBackend))

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.num_heads

    @classmethod
    def named(cls: type[N], name: str, **changes: Any) -> N:
        """Return a named size ("tiny", "ti", "s", "b", "l") with some fields changed.

        Raises:
            ValueError: If the name or a changed field is unknown; the message lists the choices.
        """
        if name not in SIZES:
            raise ValueError(f"The size must be one of {_listed(SIZES)}; got {name!r}.")
        return cls.from_dict({**SIZES[name], **changes})


@dataclass(frozen=True)
class NaViTConfig(TransformerConfig):
    """The image tower.

    Positions are factorized, phi_y(row) and phi_x(col), and by default fractional and summed:
    phi_y(row / rows) + phi_x(col / cols), which NaViT found best (arXiv:2307.06304, section 2.1
    "Factorized & fractional positional embeddings", section 3.4). Of the paper's phi (appendix C.1)
    the default is the learned Fourier one: it has no table whose length would bound the
    resolution, and is smooth between the fractions seen in training. "grid" is the one learned
    table over both axes of ViT and SigLIP, interpolated to each image's grid.
    """

    patch_size: int = 16
    """Side of a square patch in pixels; with `patch_buffer` the size that is meant where none is
    named."""
    patch_buffer: int | None = None
    """Side in pixels the patch embedding's weights are kept at (FlexiViT: 32), to be resized to
    each batch's patch sizes (`navit.model.pi_resize`): one tower then takes patches of any size,
    mixed in one batch too. None: weights for patches of `patch_size` alone."""
    pixel_mean: PerChannel = (0.5, 0.5, 0.5)
    """Subtracted from red, green and blue pixels in [0, 1]; the default and that of `pixel_std`
    scale to [-1, 1]."""
    pixel_std: PerChannel = (0.5, 0.5, 0.5)
    """What the differences are divided by."""
    stem: Stem | None = None
    """What turns pixels into the tokens of `patch_size` pixels a side: "resnet", the first stages
    of a ResNet (ViT's hybrid, arXiv:2010.11929, section 3.1); "convs", a few 3 x 3 convolutions
    (arXiv:2106.14881); None, one projection of each patch. A stem sees whole images: none of a
    batch may have dropped tokens."""
    stem_width: int = 64
    """Channels of a stem's first convolution; each further stage doubles them."""
    stem_stages: tuple[int, ...] = (3, 4, 9)
    """Bottleneck units ("resnet"), or convolutions ("convs"), of each stage. Together they must
    lead to patches: `patch_size` must be a multiple of `stem_stride`. "resnet" of (3, 4, 9) is that
    of R50+ViT-B/16; "convs" of (1, 1, 1, 1) and width 24 that of the smallest in its paper."""
    patch_bias: bool | None = None
    """Whether the patch embedding has a bias (CLIP has none there); None: as `biases` says."""
    pos_embed: PositionEmbedding = "fourier"
    """phi: learned Fourier features, a learned table read with linear interpolation, fixed
    sinusoids; or "grid", a learned table over rows and columns together."""
    pos_coordinates: PositionCoordinates = "fractional"
    """What phi reads: position / side, or the position itself, in units of `pos_table_size`."""
    pos_combine: PositionCombination = "sum"
    """How a row's and a column's embedding become one: sum, product, or stacked halves."""
    pos_table_size: int = 16
    """Entries per axis of a learned table or grid, and the side in patches at which fractional and
    absolute coordinates agree."""
    pos_interpolation: GridInterpolation = "antialias"
    """How a "grid" is read at another size: "antialias" (bilinear with antialias: SigLIP 2),
    "corners" (bilinear, corners aligned: ViT), "bicubic" (SigLIP and CLIP in Hugging Face),
    "bicubic_antialias" (timm)."""
    num_registers: int = 0
    """Learned tokens added to each image's own, dropped from the output (arXiv:2309.16588)."""
    pre_norm: bool = False
    """Whether a layer norm stands between the embedded tokens and the first block (CLIP)."""
    norm_after_pool: bool = False
    """Whether the last norm is applied to the pooled vector and not to each token, so that tokens
    leave the model without it (timm's ``fc_norm``, CLIP in Hugging Face)."""

    @property
    def stem_stride(self) -> int:
        """Pixels between the places of a stem's last feature map; 1 without a stem.

        Every stage of "convs" halves the map. The root of "resnet" quarters it, and every stage but
        the first halves it.
        """
        if self.stem is None:
            return 1
        return 1 << (len(self.stem_stages) + (self.stem == "resnet"))

    @property
    def num_prefix(self) -> int:
        """R: tokens added before each image's own, the class token and the registers."""
        return self.num_registers + (self.pool == "cls")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "patch_size", "pos_table_size")
        if self.patch_buffer is not None:
            _check_positive(self, "patch_buffer")
        if self.num_registers < 0:
            raise ValueError(f"num_registers must not be negative; got {self.num_registers}.")
        if self.pool == "last":
            raise ValueError("The image tower pools by 'map', 'mean' or 'cls'; got 'last'.")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or not min(self.pixel_std) > 0:
            raise ValueError(
                "pixel_mean and pixel_std must hold three numbers, for pixels in [0, 1], and "
                f"pixel_std positive ones; got {self.pixel_mean} and {self.pixel_std}."
            )
        _check_choice("pos_embed", self.pos_embed, get_args(PositionEmbedding))
        _check_choice("pos_coordinates", self.pos_coordinates, get_args(PositionCoordinates))
        _check_choice("pos_combine", self.pos_combine, get_args(PositionCombination))
        _check_choice("pos_interpolation", self.pos_interpolation, get_args(GridInterpolation))
        self._check_positions()
        self._check_stem()

    def _check_stem(self) -> None:
        if self.stem is None:
            if (self.stem_width, self.stem_stages) != (64, (3, 4, 9)):
                raise ValueError(
                    "stem_width and stem_stages are for a stem, 'resnet' or 'convs'; got "
                    f"{self.stem_width} and {self.stem_stages} with stem None."
                )
            return
        _check_choice("stem", self.stem, get_args(Stem))
        _check_positive(self, "stem_width")
        if self.stem_width < 2:
            raise ValueError(f"stem_width must be at least 2 channels; got {self.stem_width}.")
        if not self.stem_stages or min(self.stem_stages) < 1:
            raise ValueError(
                "stem_stages must hold at least one stage, each of at least one unit; got "
                f"{self.stem_stages}."
            )
        if self.patch_size % self.stem_stride:
            raise ValueError(
                f"patch_size must be a multiple of the stem's stride, {self.stem_stride} pixels "
                f"with {len(self.stem_stages)} stages; got {self.patch_size}. Leave out stages, or "
                "take larger patches."
            )
        if self.patch_buffer is not None:
            raise ValueError(
                "patch_buffer must be None with a stem, whose convolutions are made for one patch "
                f"size; got {self.patch_buffer}. A tower of several patch sizes has no stem."
            )

    def _check_positions(self) -> None:
        if self.pos_embed == "grid":
            if (self.pos_coordinates, self.pos_combine) != ("fractional", "sum"):
                raise ValueError(
                    "pos_embed 'grid' is one table over both axes, read at each image's own grid: "
                    "pos_coordinates must be 'fractional' and pos_combine 'sum' (their defaults); "
                    f"got {self.pos_coordinates!r} and {self.pos_combine!r}."
                )
            return
        if self.pos_interpolation != "antialias":
            raise ValueError(
                "pos_interpolation is for pos_embed 'grid'; got "
                f"{self.pos_interpolation!r} with {self.pos_embed!r}."
            )
        halves = 2 if self.pos_combine == "stack" else 1
        parts = halves if self.pos_embed == "learned" else 2 * halves
        if self.width % parts:
            raise ValueError(
                f"pos_embed {self.pos_embed!r} with pos_combine {self.pos_combine!r} needs an even "
                f"width, a multiple of {parts} (sines and cosines, stacked halves); got "
                f"{self.width}."
            )


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """The text tower: token and absolute position tables, the image tower's blocks and pooling."""

    vocab_size: int = 8192
    """Number of token ids."""
    max_tokens: int = 24
    """Longest caption in tokens, the end token included (NaViT section 3, 24 text tokens)."""
    causal: bool = False
    """Whether a token sees only those before it, as in CLIP; SigLIP and we let all see all."""
    pad_id: int | None = None
    """Token that fills every caption up to `max_tokens` and is attended like any other, as SigLIP
    was trained; None: captions keep their length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "vocab_size", "max_tokens")
        if self.pool == "cls":
            raise ValueError("The text tower pools by 'map', 'mean' or 'last'; got 'cls'.")
        if self.pad_id is None:
            return
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(
                f"pad_id must be a token id below vocab_size ({self.vocab_size}), or None; got "
                f"{self.pad_id}."
            )
        if self.causal:
            raise ValueError(
                "pad_id must be None with causal=True, where a caption's end token comes last and "
                f"no padding before it is needed; got {self.pad_id}."
            )


@dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    """Two towers and the space their vectors meet in."""

    vision: NaViTConfig = field(default_factory=NaViTConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    embed_dim: int = 512
    """E: size of the common space."""
    image_projection: bool = True
    """Whether image vectors are projected to the common space; SigLIP's are in it, its attention
    pooling being their projection."""
    text_projection_bias: bool = False
    """Whether the projection of the text vectors has a bias, as SigLIP's."""
    init_logit_scale: float = 1 / 0.07
    """Multiplier of the similarities at the start; SigLIP starts at 10."""
    max_logit_scale: float | None = 100.0
    """Upper bound of the multiplier, as in CLIP (arXiv:2103.00020, section 2.5); None: no bound, as
    in SigLIP, whose weights are above 100."""
    init_logit_bias: float | None = None
    """Bias of the similarities at the start, for the sigmoid loss (SigLIP: -10); None: no bias."""

    def __post_init__(self) -> None:
        _check_positive(self, "embed_dim")
        bound = math.inf if self.max_logit_scale is None else self.max_logit_scale
        if not 0 < self.init_logit_scale <= bound:
            raise ValueError(
                f"init_logit_scale must be above 0 and at most max_logit_scale ({bound}); got "
                f"{self.init_logit_scale}."
            )
        if not self.image_projection and self.embed_dim != self.vision.width:
            raise ValueError(
                "Without image_projection the common space is that of the image vectors: embed_dim "
                f"must be the image tower's width ({self.vision.width}); got {self.embed_dim}."
            )

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping such as `to_dict` gives; the towers may be mappings too."""
        towers = {"vision": NaViTConfig.from_dict, "text": TextConfig.from_dict}
        made = {
            name: make(values[name])
            for name, make in towers.items()
            if isinstance(values.get(name), Mapping)
        }
        return _from_dict(cls, {**values, **made})


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {_listed(choices)}; got {value!r}.")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    known = [item.name for item in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {_listed(unknown)}; choose from {_listed(known)}."
        )
    # JSON has no tuples.
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
