"""One epoch of a data set of known sizes: which images share a sequence, and which rank takes it.

The whole epoch is placed at once, from sizes alone. Its sequences are cut into global steps of
``ranks * per_rank``, and each step's are dealt out to the ranks so that their cost is even.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.plan.balance import attention_costs, balance_steps
from packer.plan.draws import KeyedDraws, keyed_draws, keyed_draws_many
from packer.plan.drop import ConstantDrop, NoDrop, ScheduledDrop
from packer.plan.many import budgets_many, patch_sizes_many, plan_resize_many
from packer.plan.patch_size import OnePatchSize, ScheduledPatchSize
from packer.plan.place import pack_lengths
from packer.plan.resize import FixedSide, Native, NoCrop
from packer.plan.types import ImageSize

Int64Array = npt.NDArray[np.int64]

_PATCH_SIZE = KeyedDraws._fields.index("patch_size")
_SAMPLED = 20_000  # images whose lengths in two epochs tell how much an epoch's total varies
_DEVIATIONS = 5  # between two epochs, that there is room for: exceeded once in 3 million epochs


def kept_lengths(
    keys: Sequence[str],
    sizes: Int64Array,
    config: PackerConfig,
    *,
    epoch: int = 0,
    images_seen: int | Int64Array = 0,
) -> Int64Array:
    """Return the ``num_kept`` that `packer.plan.image.plan_image` plans, for many images.

    Args:
        keys: Key of each image.
        sizes: int64 (n, 2) heights and widths in pixels, after EXIF orientation.
        config: The packer's configuration.
        epoch: Passes over the data completed before this one.
        images_seen: Images the whole run has seen before, one for all or int64 (n,).

    Returns:
        int64 (n,) tokens. A million take a tenth of a second where nothing is drawn and some
        10 seconds with `BetaDrop`.
    """
    crop, resolution, drop = config.crop, config.resolution, config.token_drop
    drawn = has_random_lengths(config)
    draws = keyed_draws_many(config.seed, epoch, keys) if drawn else np.zeros((len(keys), 8), "u8")
    by_side, by_crop, by_drop = draws[:, 0].tolist(), draws[:, 1].tolist(), draws[:, 2].tolist()
    if not isinstance(crop, NoCrop):
        boxes = [
            crop.box(ImageSize(height, width), draw)
            for (height, width), draw in zip(sizes.tolist(), by_crop, strict=True)
        ]
        sizes = np.array([(box.height, box.width) for box in boxes], np.int64).reshape(-1, 2)
    sides = None
    if isinstance(resolution, FixedSide):
        sides = np.full(len(sizes), resolution.px, np.float64)
    elif not isinstance(resolution, Native):
        sides = np.array(list(map(resolution.side, by_side)), np.float64)
    patch_sizes: int | Int64Array = config.patch_size
    if not isinstance(config.patch_sizes, OnePatchSize):
        # As `packer.plan.draws.uniform`, bit for bit.
        uniforms = (draws[:, _PATCH_SIZE] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        all_seen = np.broadcast_to(np.asarray(images_seen, np.int64), len(sizes))
        patch_sizes = patch_sizes_many(config, uniforms, sizes, sides, all_seen)
    budgets = budgets_many(sides, patch_sizes, config.image_budget)
    rows, cols = plan_resize_many(
        sizes[:, 0], sizes[:, 1], patch_size=patch_sizes, max_tokens=budgets, policy=config.resize
    )
    tokens = rows * cols
    if isinstance(drop, NoDrop | ConstantDrop):
        rates = np.full(len(tokens), drop.rate(1, 0))
    else:
        seen = np.broadcast_to(np.asarray(images_seen), tokens.shape).tolist()
        rates = np.array(list(map(drop.rate, tokens.tolist(), by_drop, seen)), np.float64)
    # The floats of `num_kept_tokens`, one by one.
    kept: Int64Array = np.maximum(tokens - np.floor(rates * tokens).astype(np.int64), 1)
    return kept


def has_random_lengths(config: PackerConfig) -> bool:
    """Whether an image's number of kept tokens is drawn, so that it differs between epochs."""
    drop = config.token_drop
    fixed_drop = isinstance(drop, NoDrop | ConstantDrop) or (
        isinstance(drop, ScheduledDrop) and drop.maximum is None
    )
    return not (
        fixed_drop
        and isinstance(config.crop, NoCrop)
        and isinstance(config.patch_sizes, OnePatchSize)
        and isinstance(config.resolution, Native | FixedSide)
    )


def _moments(config: PackerConfig) -> list[int]:
    """Images seen where a schedule may leave an image most tokens; none without a schedule."""
    drop, patch_sizes, moments = config.token_drop, config.patch_sizes, set()
    if isinstance(drop, ScheduledDrop):
        moments.add(1 << 62 if drop.tau < 0 else 0)  # a falling schedule is lowest at its end
    if isinstance(patch_sizes, ScheduledPatchSize):
        moments |= {patch_sizes.images * i // 4 for i in range(5)}
    return sorted(moments)


@dataclass(frozen=True)
class PlacedEpoch:
    """The images of an epoch in their sequences, which no rank or step owns yet."""

    order: Int64Array
    """(n,) The images in the order of the epoch: image ``order[j]`` is at place j."""
    lengths: Int64Array
    """(n,) Kept tokens of the image at each place."""
    sequences: list[list[int]]
    """Places that share a sequence."""


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch does with its images: index arrays, no pixels.

    Axes: n images, S sequences of all batches together.
    """

    order: Int64Array
    """(n,) The images in the order of the epoch: image ``order[j]`` is at place j."""
    placed: Int64Array
    """(n,) Places, sequence after sequence and batch after batch; -1 at the end for each image that
    found no room."""
    bounds: Int64Array
    """(S + 1,) Where each sequence starts in `placed`, and the end of the last."""
    used_steps: int
    """Global steps that hold images; those after them are empty on every rank."""
    left_out: int
    """Images that found no room in this epoch."""


@dataclass(frozen=True)
class EpochPlanner:
    """Plans the epochs of a data set of known sizes; validated by `packer.dataset`."""

    sizes: Int64Array
    """(N, 2) heights and widths of all images in pixels, after EXIF orientation."""
    images: Int64Array
    """(n,) the images that are used, rising."""
    keys: Sequence[str] | None
    """Key of each of the N images; None: its index."""
    config: PackerConfig
    """What is done to every image."""
    shuffle: bool
    """Whether each epoch packs the images in another order."""
    ranks: int
    """Ranks that work in step."""
    per_rank: int
    """Sequences a rank takes in a step."""
    width: int
    """The model's width, which weighs linear cost against quadratic cost."""

    def key(self, image: int) -> str:
        """Return the key of an image, which determines its draws."""
        return str(image) if self.keys is None else self.keys[image]

    def images_seen(self, epoch: int, place: int) -> int:
        """Return how many images the run has seen before the one at a place of an epoch."""
        return epoch * len(self.images) + place

    def place(self, epoch: int) -> PlacedEpoch:
        """Order the images of an epoch, plan their lengths, and place them into sequences."""
        order = self._order(epoch)
        seen = self.images_seen(epoch, 0) + np.arange(len(order))
        return self._placed(order, self._lengths(order, epoch, seen))

    def num_steps(self, first: PlacedEpoch) -> int:
        """Return the global steps that suffice for every epoch, one as for all.

        It is what epoch 0 needs (with a schedule, where it leaves most tokens), and where epochs
        differ one sequence more and five standard deviations of the difference between two epochs.

        Args:
            first: Epoch 0, as `place` gives it.
        """
        order, n, seen = first.order, len(first.order), 0
        moments = _moments(self.config)
        if moments:
            longest = [
                (self._placed(order, self._lengths(order, 0, moment)), moment) for moment in moments
            ]
            first, seen = max(longest, key=lambda pair: len(pair[0].sequences))
        needed = len(first.sequences)
        varies = has_random_lengths(self.config) or bool(moments)
        if self.shuffle or varies:
            # A sample in two epochs: half the mean square difference is an image's variance.
            some = order[:: ceil(n / _SAMPLED)]
            difference = self._lengths(some, 0, seen) - self._lengths(some, 1, seen)
            variance = n * float(np.mean(difference.astype(np.float64) ** 2)) / 2
            # Room left, but for the emptiest sequence: nearly none with "exact".
            used = [first.lengths[sequence].sum() for sequence in first.sequences]
            fullest = np.sort(np.array(used))[1:]
            variance += needed * float(fullest.var()) if len(fullest) else 0.0
            deviation = sqrt(2 * variance) / self.config.seq_len
            needed = min(needed + 1 + ceil(_DEVIATIONS * deviation), n)
        return ceil(needed / (self.ranks * self.per_rank))

    def deal(self, placed: PlacedEpoch, num_steps: int) -> EpochPlan:
        """Deal an epoch's sequences out to ``num_steps`` global steps and their ranks."""
        n = len(placed.order)
        places = num_steps * self.ranks * self.per_rank
        sequences = placed.sequences[:places]
        counts = np.array([len(sequence) for sequence in sequences])
        flat = np.array([place for sequence in sequences for place in sequence], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        costs = attention_costs(placed.lengths[flat], starts, self.width)
        dealt = self._deal_steps(costs)

        # Sequences in the order of batches; the last entry stands for an empty one.
        counts, dealt = np.append(counts, 0), dealt.flatten()
        bounds = np.concatenate([[0], np.cumsum(counts[dealt])])
        within = np.arange(len(flat)) - np.repeat(bounds[:-1], counts[dealt])
        in_batches = np.full(n, -1, np.int64)
        in_batches[: len(flat)] = flat[np.repeat(starts[dealt], counts[dealt]) + within]
        return EpochPlan(
            order=placed.order,
            placed=in_batches,
            bounds=np.pad(bounds, (0, places + 1 - len(bounds)), mode="edge"),
            used_steps=len(dealt) // (self.ranks * self.per_rank),
            left_out=n - len(flat),
        )

    def _order(self, epoch: int) -> Int64Array:
        if not self.shuffle:
            return self.images
        draw = keyed_draws(self.config.seed, epoch, "order of the data set").spare
        # Raw bits of PCG64 are stable across numpy releases, which Generator methods are not.
        noise = np.random.PCG64(draw).random_raw(len(self.images))
        return self.images[np.argsort(noise, kind="stable")]

    def _lengths(self, images: Int64Array, epoch: int, seen: int | Int64Array) -> Int64Array:
        keys = list(map(self.key, images.tolist()))
        return kept_lengths(keys, self.sizes[images], self.config, epoch=epoch, images_seen=seen)

    def _placed(self, order: Int64Array, lengths: Int64Array) -> PlacedEpoch:
        options: dict[str, Any] = asdict(self.config.placement)
        limit = self.config.max_images_per_seq
        sequences = pack_lengths(lengths, self.config.seq_len, max_images=limit, **options)
        return PlacedEpoch(order, lengths, sequences)

    def _deal_steps(self, costs: Int64Array) -> Int64Array:
        """Deal sequences out: (steps, ranks, per_rank) indices, S = len(costs) for an empty one.

        All steps are full but the last two, which share what they have: a step with fewer sequences
        than ranks would leave some of them idle.
        """
        total, size = len(costs), self.ranks * self.per_rank
        steps = ceil(total / size)
        in_step = np.full(steps, size)
        rest = total - size * max(steps - 2, 0)
        in_step[-2:] = [(rest + 1) // 2, rest // 2] if steps > 1 else [rest]
        slots = np.full((steps, size), total)
        slots[np.arange(size) < in_step[:, None]] = np.arange(total)
        if self.ranks == 1:
            return slots[:, None, :]
        dealt = balance_steps(np.append(costs, 0)[slots], self.ranks, self.per_rank)
        return slots[np.arange(steps)[:, None, None], dealt]
