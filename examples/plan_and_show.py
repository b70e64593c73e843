"""Planning without a pixel: image sizes in, packed sequences out, drawn in the terminal."""

from packer import BetaDrop, PackerConfig
from packer.plan.image import plan_image
from packer.plan.place import pack_lengths
from packer.plan.types import ImagePlan, ImageSize

SIZES = {
    "photo": ImageSize(480, 640),
    "portrait": ImageSize(640, 427),
    "banner": ImageSize(90, 728),
    "thumbnail": ImageSize(120, 160),
    "icon": ImageSize(48, 48),
    "screenshot": ImageSize(1080, 1920),
    "panorama": ImageSize(400, 2400),
    "poster": ImageSize(1200, 800),
}


def plan(config: PackerConfig) -> list[list[ImagePlan]]:
    """Plan every image and place the plans into sequences of ``config.seq_len`` tokens."""
    plans = [plan_image(name, size, config) for name, size in SIZES.items()]
    lengths = [image.num_kept for image in plans]
    sequences = pack_lengths(lengths, config.seq_len, max_images=config.max_images_per_seq)
    return [[plans[index] for index in sequence] for sequence in sequences]


def show(sequences: list[list[ImagePlan]], seq_len: int, width: int = 64) -> str:
    """Render one line per image and one bar per sequence, dots for padding."""
    lines = [f"{'image':<12}{'native':>12}{'grid':>9}{'tokens':>8}{'kept':>6}"]
    for image in (image for sequence in sequences for image in sequence):
        native = f"{image.size.height} x {image.size.width}"
        grid = f"{image.grid.rows} x {image.grid.cols}"
        lines.append(
            f"{image.key:<12}{native:>12}{grid:>9}{image.grid.num_tokens:>8}{image.num_kept:>6}"
        )
    lines.append("")
    for index, sequence in enumerate(sequences):
        bar, used = "", 0
        for number, image in enumerate(sequence):
            used += image.num_kept
            bar += "█▒"[number % 2] * (round(used * width / seq_len) - len(bar))
        names = ", ".join(image.key for image in sequence)
        lines.append(f"{index:>3} {bar:·<{width}} {used:>5} of {seq_len}: {names}")
    return "\n".join(lines)


def main() -> None:
    config = PackerConfig(
        patch_size=16, seq_len=512, max_tokens=256, token_drop=BetaDrop(mean=0.25, maximum=0.4)
    )
    print(show(plan(config), config.seq_len))


if __name__ == "__main__":
    main()
