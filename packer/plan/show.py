"""Plans as text: what happens to each image, and which images share a sequence."""

from collections.abc import Sequence

from packer.plan.types import ImagePlan, SequencePlan

_MAX_KEY = 28  # columns


def plan_text(
    sequences: Sequence[SequencePlan],
    seq_len: int,
    *,
    width: int = 64,
    max_images: int | None = 40,
    max_sequences: int | None = 40,
) -> str:
    """Render planned sequences for the terminal: a table of the images, a bar for each sequence.

    Args:
        sequences: The images of each sequence, in its order.
        seq_len: L, token places of a sequence.
        width: Characters the token places of a sequence are drawn with.
        max_images: Images listed, from the first sequence on; None lists all, 0 leaves the table
            out.
        max_sequences: Bars drawn; None draws all.

    Returns:
        Blocks as long as the images' kept tokens, dots for padding, the share of places filled.

    Raises:
        ValueError: If a sequence holds more tokens than ``seq_len``.
    """
    images = [image for sequence in sequences for image in sequence]
    tokens = sum(image.num_kept for image in images)
    fullest = max((sum(i.num_kept for i in sequence) for sequence in sequences), default=0)
    if fullest > seq_len:
        raise ValueError(f"a sequence has seq_len ({seq_len}) places; got one of {fullest} tokens.")
    padding = 1 - tokens / (len(sequences) * seq_len) if sequences else 0.0
    lines = [
        f"{_count(len(images), 'image')} in {_count(len(sequences), 'sequence')} of {seq_len} "
        f"tokens, {padding:.2%} padding".replace("% ", " % ")
    ]
    shown = images[:max_images]
    if shown:
        lines += ["", *_table(shown)]
        lines += _rest(len(images) - len(shown), "image")
    lines.append("")
    bars = sequences[:max_sequences]
    lines += [_bar(index, sequence, seq_len, width) for index, sequence in enumerate(bars)]
    lines += _rest(len(sequences) - len(bars), "sequence")
    return "\n".join(lines)


def _table(images: Sequence[ImagePlan]) -> list[str]:
    keys = [_shorten(image.key) for image in images]
    width = max(len("image"), *map(len, keys))
    cropped = any(image.box is not None for image in images)
    crop = f"{'crop':>12}" if cropped else ""
    sizes_differ = len({image.patch_size for image in images}) > 1
    patch = f"{'patch':>7}" if sizes_differ else ""
    counts = f"{patch}{'patches':>10}{'tokens':>8}{'kept':>6}{'drop %':>8}"
    lines = [f"{'image':<{width}}{'pixels':>13}{crop}{counts}"]
    for key, image in zip(keys, images, strict=True):
        if cropped:
            box = image.box
            crop = f"{'-' if box is None else f'{box.height} x {box.width}':>12}"
        total = image.grid.num_tokens
        native, grid = "{} x {}".format(*image.size), "{} x {}".format(*image.grid)
        if sizes_differ:
            patch = f"{image.patch_size:>7}"
        dropped = 100 * (1 - image.num_kept / total)
        lines.append(
            f"{key:<{width}}{native:>13}{crop}{patch}{grid:>10}{total:>8}{image.num_kept:>6}"
            f"{dropped:>8.1f}"
        )
    return lines


def _bar(index: int, sequence: SequencePlan, seq_len: int, width: int) -> str:
    bar, used = "", 0
    for number, image in enumerate(sequence):
        used += image.num_kept
        bar += "█▒"[number % 2] * (round(used * width / seq_len) - len(bar))
    counts = [str(image.num_kept) for image in sequence]
    text = " ".join(counts[:6]) + (f" ... ({len(counts)} images)" if len(counts) > 6 else "")
    return f"{index:4d} {bar:·<{width}} {100 * used / seq_len:6.2f} %  {text or 'empty'}"


def _shorten(key: str) -> str:
    return key if len(key) <= _MAX_KEY else f"...{key[3 - _MAX_KEY :]}"


def _rest(count: int, what: str) -> list[str]:
    return [f"... and {_count(count, what)} more"] if count else []


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("s" if count != 1 else "")
