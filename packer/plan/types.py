"""The values a plan is made of: integers only, printable, comparable, testable without an image."""

from typing import NamedTuple


class ImageSize(NamedTuple):
    """Height and width in pixels, after EXIF orientation is applied."""

    height: int
    width: int


class Grid(NamedTuple):
    """Rows and columns of patches an image is resized to, before token dropping."""

    rows: int
    cols: int

    @property
    def num_tokens(self) -> int:
        """Number of patches of the full grid, ``rows * cols``."""
        return self.rows * self.cols


class Box(NamedTuple):
    """A crop in native pixels (after EXIF orientation): top-left corner and extent."""

    top: int
    left: int
    height: int
    width: int


class ImagePlan(NamedTuple):
    """Everything decided about one image before any of its pixels is touched."""

    key: str
    """Identifies the sample; with the seed and the epoch it determines every draw below."""
    size: ImageSize
    """Native size in pixels."""
    box: Box | None
    """Crop in native pixels, or None for the whole image."""
    grid: Grid
    """Patch grid the (cropped) image is resized to."""
    patch_size: int
    """Side of a patch in pixels."""
    num_kept: int
    """Tokens left after token dropping: the image's length in its sequence, at least 1."""
    kept_draw: int
    """64-bit draw that selects which tokens are kept (`packer.plan.drop.kept_indices`)."""
    augment_draw: int
    """64-bit draw that seeds the keyed `transform`."""
    caption_draw: int
    """64-bit draw that selects one of several captions."""


SequencePlan = tuple[ImagePlan, ...]
"""Images sharing one sequence of L tokens, in their order in the sequence."""

BatchPlan = tuple[SequencePlan, ...]
"""The sequences of one batch."""
