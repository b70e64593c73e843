"""`PackerConfig`: every decision of the data side, validated when it is made."""

from dataclasses import dataclass, field
from typing import Literal

from packer.plan.drop import NoDrop, TokenDrop
from packer.plan.patch_size import OnePatchSize, PatchSizes
from packer.plan.place import Placement
from packer.plan.resize import Crop, Native, NoCrop, ResizePolicy, Resolution

DecodeMode = Literal["reduced", "full"]
Resample = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class PackerConfig:
    """How images become packed token sequences.

    Lengths and budgets are in tokens, sides in pixels. The same configuration and seed give the
    same plan for the same image on any number of workers and ranks.
    """

    patch_size: int = 16
    """Side of a square patch in pixels, where `patch_sizes` draws none."""
    patch_sizes: PatchSizes = field(default_factory=OnePatchSize)
    """Distribution each image's patch size is drawn from."""
    patch_mixing: Literal["mixed", "uniform"] = "mixed"
    """"mixed": images of different patch sizes share sequences; "uniform": every batch has one
    patch size, and images wait for others of theirs."""
    seq_len: int = 1024
    """L: token places per sequence, shared by several images."""
    max_images_per_seq: int | None = None
    """E, the paper's E_max: image slots per sequence; None sets no limit."""
    max_tokens: int | None = None
    """Token budget of one image before dropping; None means `seq_len`."""
    resolution: Resolution = field(default_factory=Native)
    """Distribution the side of an image is drawn from."""
    resize: ResizePolicy = "shrink_only"
    """Whether an image below its budget may be enlarged: "shrink_only", "allow_enlarge", or
    "fill_budget" for exactly the grids of Hugging Face's and timm's NaFlex."""
    crop: Crop = field(default_factory=NoCrop)
    """A box in native pixels, drawn before the grid is chosen."""
    token_drop: TokenDrop = field(default_factory=NoDrop)
    """Distribution of the share of an image's tokens left out."""
    placement: Placement = field(default_factory=Placement)
    """Strategy that places images into sequences."""
    fill_leftover: bool = False
    """Whether places a sequence has left go to tokens one of its images would have dropped. It
    lowers the drop rates a little, and is counted in `BatchStats.tokens_filled`."""
    decode: DecodeMode = "reduced"
    """"reduced": JPEG scaled decoding while both sides stay at least twice the target; "full"."""
    resample: Resample = "bicubic"
    """Kernel an image is resized with, antialiased; SigLIP 2's own processor takes "bilinear"."""
    max_text_tokens: int = 24
    """Caption tokens kept, the end token included."""
    max_pixels: int = 178_000_000
    """Larger images (checked from the header) are skipped undecoded as `too_many_pixels`."""
    max_aspect_ratio: float | None = None
    """Images whose long side is more than this many short sides are skipped; None: no limit."""
    keep_truncated: bool = False
    """Whether a truncated image is kept with its missing part grey instead of skipped."""
    missing_caption: Literal["skip", "keep"] = "skip"
    """What happens to a streamed image without a caption: skipped and counted, or kept with ""."""
    max_failures_in_row: int = 100
    """K: so many skipped samples without a good one between them stop the run."""
    seed: int = 0
    """Seed of every keyed draw."""

    def __post_init__(self) -> None:
        for name in (
            "patch_size",
            "seq_len",
            "max_text_tokens",
            "max_pixels",
            "max_failures_in_row",
        ):
            _check_positive(name, getattr(self, name))
        for name in ("max_tokens", "max_images_per_seq"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.max_tokens is not None and self.max_tokens > self.seq_len:
            raise ValueError(
                f"max_tokens must be at most seq_len ({self.seq_len}), else an image fits no "
                f"sequence; got {self.max_tokens}. Lower max_tokens or raise seq_len."
            )
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio must be at least 1; got {self.max_aspect_ratio}.")
        _check_choice("resize", self.resize, ("shrink_only", "allow_enlarge", "fill_budget"))
        _check_choice("decode", self.decode, ("reduced", "full"))
        _check_choice("resample", self.resample, ("bicubic", "bilinear"))
        _check_choice("missing_caption", self.missing_caption, ("skip", "keep"))
        _check_choice("patch_mixing", self.patch_mixing, ("mixed", "uniform"))
        for name, kinds in (
            ("patch_sizes", PatchSizes),
            ("resolution", Resolution),
            ("crop", Crop),
            ("token_drop", TokenDrop),
        ):
            if not isinstance(getattr(self, name), kinds):
                names = ", ".join(kind.__name__ for kind in kinds.__args__)
                raise ValueError(f"{name} must be one of {names}; got {getattr(self, name)!r}.")
        if not isinstance(self.placement, Placement):
            raise ValueError(f"placement must be a Placement; got {self.placement!r}.")

    @property
    def image_budget(self) -> int:
        """Token budget of an image before dropping: `max_tokens`, or `seq_len` where it is None."""
        return self.seq_len if self.max_tokens is None else self.max_tokens

    @property
    def largest_patch_size(self) -> int:
        """Largest side of a patch an image may be given, in pixels."""
        sizes = self.patch_sizes
        return self.patch_size if isinstance(sizes, OnePatchSize) else sizes.sizes[-1]

    @property
    def separate_patch_sizes(self) -> tuple[int, ...]:
        """Patch sizes that share no batch; () where all images may, or all have one size."""
        sizes = self.patch_sizes
        if isinstance(sizes, OnePatchSize) or self.patch_mixing == "mixed" or len(sizes.sizes) < 2:
            return ()
        return sizes.sizes


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
