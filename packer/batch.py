"""`PackedBatch`: the only type that crosses from the data side to the model side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """Integer counts since the stream's previous batch, so that sums over batches are exact."""

    samples_read: int = 0
    """Samples taken from the source: ``images + skipped`` plus the growth of the pending window."""
    images: int = 0
    """Images in this batch (N)."""
    tokens: int = 0
    """Kept tokens in this batch."""
    tokens_before_drop: int = 0
    """Tokens the same images had before token dropping."""
    tokens_filled: int = 0
    """Of `tokens`, those kept beyond an image's drawn number to fill its sequence
    (`PackerConfig.fill_leftover`)."""
    places: int = 0
    """Token places of the batch, B * L; ``places - tokens`` is padding."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Skipped samples by cause."""
    noted: Mapping[str, int] = field(default_factory=dict)
    """Samples kept in spite of a defect, by cause (a caption decoded with replacement, ...)."""

    @property
    def padding(self) -> float:
        """Share of token places that hold no token, in [0, 1]."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def __add__(self, other: "BatchStats") -> "BatchStats":
        """Sum two counts, cause by cause."""
        total: dict[str, Any] = {}
        for item in fields(self):
            a, b = getattr(self, item.name), getattr(other, item.name)
            if isinstance(a, Mapping):
                total[item.name] = {
                    cause: a.get(cause, 0) + b.get(cause, 0) for cause in {**a, **b}
                }
            else:
                total[item.name] = a + b
        return BatchStats(**total)


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """Captions as one run of tokens, without padding.

    Axes: T tokens of all captions together, M captions.
    """

    ids: Int64[Tensor, " T"]
    """Token ids; every caption ends with the end token."""
    cu_seqlens: Int32[Tensor, " M_plus_1"]
    """Caption boundaries over the T tokens, from 0 to T."""
    segment_lengths: tuple[int, ...]
    """Length of each caption in tokens, on the host."""
    image_index: Int64[Tensor, " M"]
    """Which of the batch's N images the caption belongs to."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedText":
        """Copy the tensors to a device."""
        return _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedText":
        """Copy the tensors to page-locked memory."""
        return _map_tensors(self, lambda t: t.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle small tensors by value, see `_reduced`."""
        return _reduced(self)

    def check(self, num_images: int) -> None:
        """Verify the invariants; `AssertionError` names the one that is broken."""
        assert min(self.segment_lengths, default=1) > 0, "a caption must hold at least one token"
        bounds = [0, *accumulate(self.segment_lengths)]
        assert self.cu_seqlens.tolist() == bounds, (
            "captions.cu_seqlens disagrees with captions.segment_lengths"
        )
        assert len(self.ids) == bounds[-1], "captions.segment_lengths must cover all caption tokens"
        index = self.image_index.tolist()
        assert len(index) == len(self.segment_lengths), "captions.image_index must be M long"
        assert set(index) <= set(range(num_images)), (
            "captions.image_index must name images of the batch"
        )


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Images packed into fixed-length sequences; the only type `packer` hands to `navit`.

    Axes: B sequences, L tokens per sequence, P values per patch, S segments (one per image, one
    per padded tail), E image slots per sequence (the paper's E_max), N images, C classes. N = 0 is
    legal. Keys, captions, labels and pooled vectors share one order: the input's from a collator,
    that of placement from a stream or dataset.
    """

    patches: UInt8[Tensor, "B L P"]
    """Pixel values of the kept patches, (patch row, patch column, channel) order; 0 in padding."""
    patch_size: int
    """Side of a patch in pixels; with `patch_sizes`, the largest."""
    segment_ids: Int32[Tensor, "B L"]
    """k >= 1 for the k-th image of its sequence, 0 for padding."""
    position_ids: Int32[Tensor, "B L 2"]
    """(row, col) in the image's full grid, unchanged by dropping; 0 in padding."""
    grid_sizes: Int32[Tensor, "B E 2"]
    """(rows, cols) of each image before dropping, in patches; 0 in an empty slot."""
    image_index: Int64[Tensor, "B E"]
    """Which of the N images fills the slot; -1 in an empty slot."""
    cu_seqlens: Int32[Tensor, " S_plus_1"]
    """Segment boundaries over the flattened B * L tokens, from 0 to B * L."""
    segment_lengths: tuple[int, ...]
    """Length of each of the S segments, always on the host: attention plans read only this."""
    keys: tuple[str, ...]
    """Key of each of the N images."""
    segment_images: tuple[int, ...] = ()
    """Which of the N images each of the S segments is, -1 for a padded tail; always on the host.
    Derived from `segment_ids` and `image_index` where it is not given."""
    patch_sizes: Int32[Tensor, "B E"] | None = None
    """Side of each image's patches in pixels, 0 in an empty slot; None when all are `patch_size`.
    Where it is smaller than `patch_size` a patch's values are followed by zeros."""
    segment_patch_sizes: tuple[int, ...] = ()
    """Patch size of each of the S segments, 0 for a padded tail; always on the host, and empty
    where `patch_sizes` is None. Derived where it is not given."""
    segment_grids: tuple[tuple[int, int], ...] = ()
    """(rows, cols) of the image of each of the S segments, (0, 0) for a padded tail; always on the
    host. Derived from `grid_sizes` where it is not given."""
    texts: tuple[str, ...] | None = None
    """Caption of each image, or None."""
    captions: PackedText | None = None
    """The captions as tokens, or None without a tokenizer."""
    labels: Int64[Tensor, " N"] | Float32[Tensor, "N C"] | None = None
    """Class index, or multi-label targets, of each image."""
    stats: BatchStats = field(default_factory=BatchStats)
    """Counts since this stream's previous batch."""
    state: Mapping[str, Any] | None = None
    """State of the stream after this batch; None from a collator."""

    def __post_init__(self) -> None:
        if not self.segment_images and self.segment_lengths:
            starts = [0, *accumulate(self.segment_lengths)][:-1]
            ids, index = self.segment_ids.flatten().tolist(), self.image_index.tolist()
            images = (
                index[start // self.seq_len][ids[start] - 1] if ids[start] else -1
                for start in starts
            )
            object.__setattr__(self, "segment_images", tuple(images))
        if self.patch_sizes is not None and not self.segment_patch_sizes:
            index, sizes = (x.flatten().tolist() for x in (self.image_index, self.patch_sizes))
            by_image = {**dict(zip(index, sizes, strict=True)), -1: 0}
            found = tuple(by_image[image] for image in self.segment_images)
            object.__setattr__(self, "segment_patch_sizes", found)
        if not self.segment_grids and self.segment_lengths:
            object.__setattr__(self, "segment_grids", self._grids_by_segment())

    @property
    def num_images(self) -> int:
        """N, the number of images in the batch."""
        return len(self.keys)

    @property
    def seq_len(self) -> int:
        """L, the number of token places per sequence."""
        return self.segment_ids.shape[1]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest segment, in tokens; 0 without segments."""
        return max(self.segment_lengths, default=0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """Copy the tensors to a device; host-side fields stay where they are."""
        return _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Copy the tensors to page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return _map_tensors(self, lambda t: t.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle small tensors by value, see `_reduced`."""
        return _reduced(self)

    def check(self) -> None:
        """Verify every invariant stated above; `AssertionError` names the one that is broken."""
        host = self.to("cpu")
        host._check_segments()
        host._check_tokens()
        host._check_images()
        host._check_patch_sizes()

    def _grids_by_segment(self) -> tuple[tuple[int, int], ...]:
        index, grids = self.image_index.flatten().tolist(), self.grid_sizes.flatten(0, 1).tolist()
        by_image = {image: (rows, cols) for image, (rows, cols) in zip(index, grids, strict=True)}
        padded = {**by_image, -1: (0, 0)}
        return tuple(padded.get(image, (0, 0)) for image in self.segment_images)

    def _check_segments(self) -> None:
        """Segments, slots and the host-side tuples tell the same story."""
        lengths, index = self.segment_lengths, self.image_index.tolist()
        assert min(lengths, default=1) > 0, "a segment must hold at least one token"
        bounds = [0, *accumulate(lengths)]
        assert self.cu_seqlens.tolist() == bounds, "cu_seqlens disagrees with segment_lengths"
        assert bounds[-1] == self.segment_ids.numel(), "segments must cover all B * L tokens"
        runs: list[int] = []
        images: list[int] = []
        for ids, slots in zip(self.segment_ids.tolist(), index, strict=True):
            found = [(value, len(list(run))) for value, run in groupby(ids)]
            filled = sum(image >= 0 for image in slots)
            in_order = [*range(1, filled + 1), *([0] if ids and ids[-1] == 0 else [])]
            assert [value for value, _ in found] == in_order, (
                "segment_ids must number the images of a sequence 1, 2, ... and end with padding, "
                "one for each filled slot of image_index"
            )
            assert slots[filled:] == [-1] * (len(slots) - filled), "filled slots must come first"
            runs += [length for _, length in found]
            images += [slots[value - 1] if value else -1 for value, _ in found]
        assert runs == list(lengths), "segment_ids disagree with segment_lengths"
        assert images == list(self.segment_images), "segment_images disagrees with image_index"
        assert sorted(image for image in images if image >= 0) == list(range(self.num_images)), (
            "each image must fill one slot"
        )

    def _check_tokens(self) -> None:
        """Padding is 0, and every position lies in its image's grid."""
        ids, positions, grids = self.segment_ids, self.position_ids, self.grid_sizes
        padding = ids == 0
        assert self.patches.shape[-1] == 3 * self.patch_size**2, "P must be 3 * patch_size ** 2"
        assert not self.patches[padding].any(), "patches must be 0 in padding"
        assert not positions[padding].any(), "position_ids must be 0 in padding"
        filled = self.image_index >= 0
        assert bool((grids[filled] > 0).all()), "grid_sizes must be positive in filled slots"
        assert not grids[~filled].any(), "grid_sizes must be 0 in empty slots"
        rows = torch.arange(len(ids))[:, None].expand_as(ids)[~padding]
        inside = positions[~padding] < grids[rows, ids[~padding].long() - 1]
        assert bool((inside & (positions[~padding] >= 0)).all()), (
            "a position lies outside its image's grid"
        )

    def _check_images(self) -> None:
        """Whatever belongs to an image has one entry for each of the N."""
        assert self._grids_by_segment() == tuple(self.segment_grids), (
            "segment_grids disagrees with grid_sizes"
        )
        for name in ("texts", "labels"):
            value = getattr(self, name)
            assert value is None or len(value) == self.num_images, (
                f"{name} must have one entry per image"
            )
        if self.captions is not None:
            self.captions.check(self.num_images)

    def _check_patch_sizes(self) -> None:
        """Patch sizes agree with each other and with the zeros behind smaller patches."""
        if self.patch_sizes is None:
            assert not self.segment_patch_sizes, "segment_patch_sizes needs patch_sizes"
            return
        filled = self.image_index >= 0
        sizes = self.patch_sizes[filled]
        assert bool(((sizes > 0) & (sizes <= self.patch_size)).all()), (
            "patch_sizes must be between 1 and patch_size"
        )
        assert not self.patch_sizes[~filled].any(), "patch_sizes must be 0 in empty slots"
        by_image = dict(zip(self.image_index[filled].tolist(), sizes.tolist(), strict=True))
        by_segment = [by_image.get(image, 0) for image in self.segment_images]
        assert by_segment == list(self.segment_patch_sizes), (
            "segment_patch_sizes disagrees with patch_sizes"
        )
        tokens, bounds = self.patches.flatten(0, 1), [0, *accumulate(self.segment_lengths)]
        for size, (start, stop) in zip(by_segment, pairwise(bounds), strict=True):
            assert not tokens[start:stop, 3 * size**2 :].any(), (
                "a patch smaller than patch_size must be followed by zeros"
            )


T = TypeVar("T", "PackedBatch", "PackedText")


def _map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    changes: dict[str, Any] = {}
    for item in fields(value):
        part = getattr(value, item.name)
        if isinstance(part, Tensor):
            changes[item.name] = function(part)
        elif isinstance(part, PackedText):
            changes[item.name] = _map_tensors(part, function)
    return replace(value, **changes)


_BY_VALUE = 1 << 20  # bytes


def _reduced(value: PackedBatch | PackedText) -> tuple[Any, ...]:
    """Describe a value for pickling, small CPU tensors as arrays.

    A `DataLoader` worker hands every tensor over in shared memory of its own: a file descriptor, a
    mapping and a round trip each, which cost more than copying anything but the patches.
    """
    changed: dict[str, Any] = {}
    for item in fields(value):
        part = getattr(value, item.name)
        small = isinstance(part, Tensor) and part.device.type == "cpu"
        if small and part.nbytes < _BY_VALUE and not part.is_shared():
            part = part.numpy()
        changed[item.name] = part
    return _rebuild, (type(value), changed)


def _rebuild(kind: type[T], parts: dict[str, Any]) -> T:
    whole: dict[str, Any] = {
        name: torch.from_numpy(part) if isinstance(part, np.ndarray) else part
        for name, part in parts.items()
    }
    return kind(**whole)
