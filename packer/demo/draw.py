"""Drawing a demonstration scene: anti-aliased shapes and patterns on a textured background."""

import io
from math import cos, pi, radians, sin

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

from packer.demo.scene import BACKGROUNDS, COLOURS, Scene, SceneObject
from packer.plan.types import ImageSize

_Points = list[tuple[float, float]]
_SECOND = {"black": (200, 200, 200), "white": (150, 152, 158)}
"""Second colour of a pattern where white would not do."""


def draw_image(scene: Scene, size: ImageSize) -> Image.Image:
    """Draw a scene at a size in pixels; what it shows does not depend on the size.

    Args:
        scene: Content, in shares of the image box and of its short side.
        size: Height and width in pixels.

    Returns:
        RGB image of ``size.width`` x ``size.height`` pixels.
    """
    image = Image.fromarray(_background(scene, size))
    # The surround of an "inside" pair comes second and must not cover its content.
    for item in sorted(scene.objects, key=lambda item: -item.diameter):
        _paste(image, item, size)
    return image


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encode an image as JPEG bytes; equal images give equal bytes."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _background(scene: Scene, size: ImageSize) -> npt.NDArray[np.uint8]:
    colour = np.array(BACKGROUNDS[scene.background], np.float32)
    light = np.ones((*size, 1), np.float32)
    if scene.texture == "gradient":
        light = np.broadcast_to(np.linspace(1.12, 0.6, size.height)[:, None, None], (*size, 1))
    elif scene.texture == "speckled":
        cell = max(1, round(min(size) / 30))
        rows, cols = (-(-side // cell) for side in size)
        bits = np.random.PCG64(scene.texture_seed).random_raw(rows * cols).reshape(rows, cols)
        light = np.where(bits >> 61 == 0, 0.72, np.where(bits >> 61 == 1, 1.2, 1.0))
        light = light.repeat(cell, 0).repeat(cell, 1)[: size.height, : size.width, None]
    return (colour * light).clip(0, 255).astype(np.uint8)


def _paste(image: Image.Image, item: SceneObject, size: ImageSize) -> None:
    short = min(size)
    fine = 3 if short < 160 else 2  # supersampling; edges of large shapes need less
    radius = item.diameter * short / 2
    side = 2 * (int(radius * 1.1) + 1)
    centre, unit = side * fine / 2, radius * fine
    turn = radians(item.tilt)
    right, down = unit * cos(turn), unit * sin(turn)
    points = [
        (centre + x * right - y * down, centre + x * down + y * right)
        for x, y in _OUTLINES[item.shape]
    ]
    extent = (side * fine, side * fine)
    mask, edge = Image.new("L", extent), Image.new("L", extent)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    # Half of a line along the outline lies inside the mask; round joints keep its width even.
    width = round(2 * unit * (0.21 if item.fill == "outlined" else 0.12))
    ImageDraw.Draw(edge).line([*points, *points[:2]], fill=255, width=width, joint="curve")
    edge = ImageChops.darker(edge, mask)
    colour, second = COLOURS[item.colour], _SECOND.get(item.colour, (255, 255, 255))
    layer = _pattern(item.fill, colour, second, side * fine, unit)
    layer.paste(colour, mask=edge)
    shown = edge if item.fill == "outlined" else mask
    left, top = round(item.x * size.width - side / 2), round(item.y * size.height - side / 2)
    image.paste(layer.reduce(fine), (left, top), shown.reduce(fine))


def _pattern(
    fill: str, first: tuple[int, int, int], second: tuple[int, int, int], side: int, unit: float
) -> Image.Image:
    layer = Image.new("RGB", (side, side), first)
    draw = ImageDraw.Draw(layer)
    step = 0.5 * unit  # as many stripes on a small shape as on a large one
    middle = side / 2
    if fill == "striped":
        for i in range(-4, 5):
            at = middle + i * step
            band = [(at - middle, side), (at + middle, 0), (at + middle + step / 2, 0)]
            draw.polygon([*band, (at - middle + step / 2, side)], fill=second)
    cells = [(i, j) for i in range(-3, 4) for j in range(-3, 4)]
    for i, j in cells:
        x, y = middle + i * step, middle + j * step
        if fill == "dotted":
            r = 0.32 * step
            draw.ellipse([x - r, y - r, x + r, y + r], second)
        elif fill == "checked" and (i + j) % 2 == 0:
            draw.rectangle([x, y, x + step, y + step], second)
    return layer


def _round(steps: int = 60) -> _Points:
    return [(cos(2 * pi * i / steps), sin(2 * pi * i / steps)) for i in range(steps)]


def _star() -> _Points:
    radii = (1.08, 0.46)
    return [
        (radii[i % 2] * sin(pi * i / 5), 0.06 - radii[i % 2] * cos(pi * i / 5)) for i in range(10)
    ]


def _heart(steps: int = 60) -> _Points:
    angles = [2 * pi * i / steps for i in range(steps)]
    return [
        (sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16 - 0.1)
        for a in angles
    ]


def _crescent(steps: int = 40) -> _Points:
    # The unit circle without a circle of radius 0.902 around (0.752, 0); they meet at 60 degrees.
    outer = [pi / 3 + (4 * pi / 3) * i / steps for i in range(steps + 1)]
    inner = [1.287 * (2 * i / steps - 1) for i in range(steps + 1)]
    points = [(cos(a), sin(a)) for a in outer]
    points += [(0.752 - 0.902 * cos(a), 0.902 * sin(a)) for a in inner]
    return [(x + 0.2, y) for x, y in points]


_CROSS = [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34)]
_OUTLINES: dict[str, _Points] = {
    "circle": _round(),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (1.04, 0.82), (-1.04, 0.82)],
    "diamond": [(0, -1.08), (0.8, 0), (0, 1.08), (-0.8, 0)],
    "star": _star(),
    "cross": _CROSS + [(-x, -y) for x, y in _CROSS],
    "heart": _heart(),
    "crescent": _crescent(),
    "arrow": [(0, -1.05), (0.95, 0), (0.4, 0), (0.4, 1), (-0.4, 1), (-0.4, 0), (-0.95, 0)],
}
"""Corners of each shape around (0, 0), x to the right, y down, in radii."""
