"""From an image's size to its patch grid: resolution sampling, cropping and the token budget."""

import random
from dataclasses import dataclass
from math import ceil, exp, isqrt, log, sqrt
from typing import Literal

from packer.plan.draws import truncated_normal, uniform
from packer.plan.types import Box, Grid, ImageSize

ResizePolicy = Literal["shrink_only", "allow_enlarge", "fill_budget"]


@dataclass(frozen=True)
class Native:
    """Keep the native resolution; only the token budget limits it."""

    def side(self, draw: int) -> float | None:
        """Return None: no limit besides the token budget."""
        return None


@dataclass(frozen=True)
class FixedSide:
    """Resize every image to the area of a square of ``px`` pixels a side, aspect ratio kept."""

    px: float = 224.0
    """Side in pixels of the square of equal area."""

    def __post_init__(self) -> None:
        if not self.px > 0:
            raise ValueError(
                f"FixedSide: px must be positive; got {self.px}. Give a side in pixels, e.g. 224."
            )

    def side(self, draw: int) -> float:
        """Return the side in pixels of the square of equal area."""
        return self.px


@dataclass(frozen=True)
class UniformSide:
    """Draw the side uniformly from [low, high] pixels per image (NaViT section 3, U(64, R_max))."""

    low: float = 64.0
    """Smallest side in pixels."""
    high: float = 256.0
    """Largest side in pixels."""

    def __post_init__(self) -> None:
        _check_range("UniformSide", self.low, self.high)

    def side(self, draw: int) -> float:
        """Return the side in pixels of the square of equal area."""
        return self.low + uniform(draw) * (self.high - self.low)


@dataclass(frozen=True)
class NormalSide:
    """Draw the side from a truncated normal, the paper's best choice at (-0.5, 1).

    A variate u ~ N(mean, std) truncated to [-1, 1] is mapped linearly to [low, high] pixels.

    Source: NaViT (arXiv:2307.06304), section 3.2 "Variable resolution", N_t(-0.5, 1).
    """

    low: float = 64.0
    """Smallest side in pixels."""
    high: float = 256.0
    """Largest side in pixels."""
    mean: float = -0.5
    """Mean of u before truncation; -1 is `low`, 1 is `high`."""
    std: float = 1.0
    """Standard deviation of u before truncation."""

    def __post_init__(self) -> None:
        _check_range("NormalSide", self.low, self.high)
        _check_std("NormalSide", self.std)

    def side(self, draw: int) -> float:
        """Return the side in pixels of the square of equal area."""
        u = truncated_normal(draw, self.mean, self.std, -1.0, 1.0)
        return self.low + (u + 1) / 2 * (self.high - self.low)


@dataclass(frozen=True)
class UniformArea:
    """Draw the area uniformly between the squares of [low, high] pixels per image.

    Larger images are more frequent than with `UniformSide` of the same bounds.

    Source: NaViT (arXiv:2307.06304), section 3.2 "Variable resolution", sampling the area.
    """

    low: float = 64.0
    """Side in pixels of the smallest square."""
    high: float = 256.0
    """Side in pixels of the largest square."""

    def __post_init__(self) -> None:
        _check_range("UniformArea", self.low, self.high)

    def side(self, draw: int) -> float:
        """Return the side in pixels of the square of equal area."""
        return _side_of_area(uniform(draw), self.low, self.high)


@dataclass(frozen=True)
class NormalArea:
    """Draw the area from a truncated normal.

    A variate u ~ N(mean, std) truncated to [-1, 1] is mapped linearly to the areas of the squares
    of [low, high] pixels.

    Source: NaViT (arXiv:2307.06304), section 3.2 "Variable resolution", sampling the area.
    """

    low: float = 64.0
    """Side in pixels of the smallest square."""
    high: float = 256.0
    """Side in pixels of the largest square."""
    mean: float = -0.5
    """Mean of u before truncation; -1 is the smallest area, 1 the largest."""
    std: float = 1.0
    """Standard deviation of u before truncation."""

    def __post_init__(self) -> None:
        _check_range("NormalArea", self.low, self.high)
        _check_std("NormalArea", self.std)

    def side(self, draw: int) -> float:
        """Return the side in pixels of the square of equal area."""
        u = truncated_normal(draw, self.mean, self.std, -1.0, 1.0)
        return _side_of_area((u + 1) / 2, self.low, self.high)


Resolution = Native | FixedSide | UniformSide | NormalSide | UniformArea | NormalArea


@dataclass(frozen=True)
class NoCrop:
    """Use the whole image, as the paper does (appendix: "no preprocessing but resize and drop")."""

    def box(self, size: ImageSize, draw: int) -> Box | None:
        """Return None: the whole image."""
        return None


@dataclass(frozen=True)
class RandomCrop:
    """Crop a random box of the image, its aspect ratio nearly the image's."""

    min_area: float = 0.5
    """Smallest share of the image's area the box may cover, in (0, 1]."""
    max_aspect_change: float = 1.2
    """Largest factor between the box's aspect ratio and the image's, at least 1; log-uniform."""

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ValueError(
                f"RandomCrop: min_area must be in (0, 1]; got {self.min_area}. "
                "NoCrop() crops nothing."
            )
        if not self.max_aspect_change >= 1:
            raise ValueError(
                "RandomCrop: max_aspect_change must be at least 1; got "
                f"{self.max_aspect_change}. "
                "1 keeps the aspect ratio."
            )

    def box(self, size: ImageSize, draw: int) -> Box:
        """Choose the box in native pixels; at least one pixel a side, always inside the image."""
        rng = random.Random(draw)
        area = rng.uniform(self.min_area, 1.0)
        change = log(self.max_aspect_change)
        stretch = exp(rng.uniform(-change, change) / 2)
        share_h, share_w = sqrt(area) * stretch, sqrt(area) / stretch
        # A share above 1 is cut to the image and the other side takes over, which keeps the area.
        if share_h > 1:
            share_h, share_w = 1.0, min(1.0, area)
        elif share_w > 1:
            share_h, share_w = min(1.0, area), 1.0
        height = min(size.height, max(1, round(size.height * share_h)))
        width = min(size.width, max(1, round(size.width * share_w)))
        top = rng.randint(0, size.height - height)
        left = rng.randint(0, size.width - width)
        return Box(top, left, height, width)


Crop = NoCrop | RandomCrop


def plan_resize(
    size: ImageSize, *, patch_size: int, max_tokens: int, policy: ResizePolicy = "shrink_only"
) -> Grid:
    """Choose the patch grid an image is resized to, keeping its aspect ratio.

    Args:
        size: Image size in pixels, after EXIF orientation and cropping.
        patch_size: Side of a patch in pixels.
        max_tokens: Token budget before token dropping.
        policy: ``"shrink_only"`` leaves an image below the budget at its native resolution;
            ``"allow_enlarge"`` enlarges it to meet the budget; ``"fill_budget"`` enlarges it too
            and rounds sides up, to the grids of Hugging Face's and timm's NaFlex.

    Returns:
        Rows and columns of patches, each at least 1, with ``rows * cols <= max_tokens``. Sides
        are rounded down, so the aspect ratio holds to within one patch a side unless a side
        would vanish (a 1 x 400 banner keeps one row). Only ``"fill_budget"`` rounds up.

    Raises:
        ValueError: If a side of ``size``, ``patch_size`` or ``max_tokens`` is not positive.

    Source: NaViT (arXiv:2307.06304), section 2.2 "Resolution sampling". Rounding down is our
    choice; see docs/design.md, "Resize rounding".
    """
    height, width = size
    if height < 1 or width < 1 or patch_size < 1 or max_tokens < 1:
        raise ValueError(
            f"size, patch_size and max_tokens must be positive; got {size}, {patch_size}, "
            f"{max_tokens}."
        )
    if policy == "fill_budget":
        return _fill_budget(height, width, patch_size, max_tokens)
    rows, cols = max(height // patch_size, 1), max(width // patch_size, 1)
    if rows * cols > max_tokens or policy == "allow_enlarge":  # integers: no float rounding
        rows = min(max(isqrt(max_tokens * height // width), 1), max_tokens)
        cols = min(max(isqrt(max_tokens * width // height), 1), max_tokens)
    return Grid(rows, cols)


def budget_from_side(side: float | None, patch_size: int, max_tokens: int) -> int:
    """Turn a drawn side (pixels of the square of equal area) into a token budget, at least 1."""
    if side is None:
        return max_tokens
    return min(max_tokens, max(1, int(side * side / (patch_size * patch_size))))


def _fill_budget(height: int, width: int, patch_size: int, max_tokens: int) -> Grid:
    """Find the largest scale whose grid, sides rounded up, has at most ``max_tokens`` patches.

    It is the bisection NaFlex processors use, with their bounds: scales from 1e-6 to 100, known to
    1e-5. Only the same steps in the same floats give the same grid for every size; the exact
    largest scale would differ where it lies less than 1e-5 above the one found.
    """
    low, high, tolerance = 1e-6, 100.0, 1e-5
    rows = cols = 1
    while high - low >= tolerance:
        scale = (low + high) / 2
        # First times the scale, then by the patch size: another order rounds otherwise.
        more_rows, more_cols = ceil(height * scale / patch_size), ceil(width * scale / patch_size)
        if more_rows * more_cols <= max_tokens:
            low, rows, cols = scale, more_rows, more_cols
        else:
            high = scale
    return Grid(rows, cols)


def _side_of_area(share: float, low: float, high: float) -> float:
    """Return the side of the square that lies ``share`` of the way between two areas."""
    return sqrt(low * low + share * (high * high - low * low))


def _check_std(name: str, std: float) -> None:
    if not std > 0:
        raise ValueError(f"{name}: std must be positive; got {std}. The paper uses 1.")


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 < low <= high:
        raise ValueError(f"{name}: need 0 < low <= high in pixels; got low={low}, high={high}.")
