"""What a demonstration scene shows and how it is put into words; no pixel is drawn here."""

import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (250, 136, 18),
    "yellow": (252, 222, 42),
    "green": (36, 148, 54),
    "blue": (30, 84, 214),
    "purple": (126, 40, 168),
    "pink": (248, 130, 190),
    "brown": (112, 66, 28),
    "black": (16, 16, 18),
    "white": (252, 252, 252),
}
"""Colours of objects, sRGB."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (142, 144, 148),
    "pale blue": (158, 204, 236),
    "pale green": (170, 216, 172),
    "beige": (222, 204, 166),
    "lavender": (196, 184, 230),
    "charcoal": (58, 60, 66),
}
"""Colours of backgrounds, sRGB; every object colour stands out from grey."""
TEXTURES = ("plain", "gradient", "speckled")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "crescent", "arrow")
FILLS = ("solid", "striped", "dotted", "checked", "outlined")
DIAMETERS = {"small": 0.26, "large": 0.44}
"""Diameter of an object in short sides of its image; two large ones fit side by side."""
PLACES = {
    "middle": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
}
"""Centre (x, y) of a lone object, in shares of the image's width and height."""
MAX_WORDS = 23
"""Words and marks of a caption: with an end token it fits the paper's 24 text tokens."""

_OUTER_SHAPES = ("circle", "square", "diamond")
_MIN_CONTRAST = 88.0
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
_FILL_WORDS = {
    "solid": ("", "", "solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
    "outlined": ("outlined", "hollow"),
}
_FILL_PHRASES = {"striped": "with stripes", "dotted": "with dots", "checked": "with checks"}
_OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "inside": ("inside", "within", "in the middle of"),
    "around": ("around", "surrounding", "enclosing"),
}
_PLACE_WORDS = {
    "middle": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top edge"),
    "bottom": ("at the bottom", "near the bottom edge"),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: what its caption says, and where it stands in shares of the image box."""

    size: str
    fill: str
    colour: str
    shape: str
    x: float
    """Centre, in image widths from the left."""
    y: float
    """Centre, in image heights from the top."""
    diameter: float
    """In short sides of the image, so that a shape is never stretched."""
    tilt: float
    """Rotation in degrees, small enough that a square is no diamond."""

    @property
    def look(self) -> tuple[str, str, str]:
        """(size, colour, shape): what every caption states about the object."""
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Content of one image, independent of the image's size and shape."""

    objects: tuple[SceneObject, ...]
    """One to three, of different colours; with a relation, its subject first."""
    relation: str
    """Of the first to the second: "left of", "above", "inside"; of a lone object: from `PLACES`."""
    third: str
    """Where the third object is, seen from both others: "left of", "right of", "above", "below"."""
    background: str
    texture: str
    texture_seed: int

    def attributes(self) -> dict[str, Any]:
        """Return what the json member of the pair says about the scene."""
        names = ("size", "fill", "colour", "shape")
        return {
            "objects": [{name: asdict(item)[name] for name in names} for item in self.objects],
            "relation": self.relation,
            "third": self.third,
            "background": self.background,
            "texture": self.texture,
        }

    def identities(self) -> Iterator[tuple[object, ...]]:
        """Yield what no two validation scenes may share, so that no caption fits two of them.

        A lone object is identified by its look and place, several by the looks of every two of
        them. Fill, relation and background are left out: a caption may be silent about them.
        """
        if len(self.objects) == 1:
            yield self.relation, self.objects[0].look
        for a, b in combinations(self.objects, 2):
            yield tuple(sorted((a.look, b.look)))


def draw_scene(rng: random.Random) -> Scene:
    """Draw the content of one scene: one to three objects, their relation and the background."""
    count = rng.choices((1, 2, 3), weights=(20, 50, 30))[0]
    colours = rng.sample(tuple(COLOURS), count)
    relation, third = rng.choice(tuple(PLACES)), ""
    if count == 2:
        relation = rng.choice(("left of", "left of", "above", "above", "inside"))
    elif count == 3:
        relation = rng.choice(("left of", "above"))
        third = rng.choice(("above", "below") if relation == "left of" else ("left of", "right of"))
    centres = _centres(relation, third)
    objects = []
    for i, (colour, (x, y)) in enumerate(zip(colours, centres, strict=True)):
        size, fill, shape = rng.choice(tuple(DIAMETERS)), rng.choice(FILLS), rng.choice(SHAPES)
        if relation == "inside":
            # A plain, roomy surround keeps the inner object visible.
            size = ("small", "large")[i]
            fill = (fill, rng.choice(("solid", "outlined")))[i]
            shape = (shape, rng.choice(_OUTER_SHAPES))[i]
        grown = 1.85 if relation == "inside" and i == 1 else 1.0
        jitter = 0.0 if grown > 1 else 0.02
        objects.append(
            SceneObject(
                size,
                fill,
                colour,
                shape,
                x + rng.uniform(-jitter, jitter),
                y + rng.uniform(-jitter, jitter),
                DIAMETERS[size] * grown * rng.uniform(0.96, 1.04),
                rng.uniform(-7, 7),
            )
        )
    visible = [name for name in BACKGROUNDS if _stands_out(name, colours)]
    background, texture = rng.choice(visible), rng.choice(TEXTURES)
    return Scene(tuple(objects), relation, third, background, texture, rng.getrandbits(63))


def draw_caption(scene: Scene, rng: random.Random) -> str:
    """Put a scene into words: one of several wordings, at most `MAX_WORDS` words and marks."""
    objects = [_object_phrase(item, rng) for item in scene.objects]
    if len(objects) == 1:
        place = rng.choice(_PLACE_WORDS[scene.relation])
        lone = objects[0].split(" ", 1)[1]
        text = rng.choice(
            (f"a single {lone} {place}", f"{place}, a lone {lone}", f"only one {lone} {place}")
        )
    elif len(objects) == 2:
        text = _relation_phrase(scene.relation, objects, rng)
    else:
        text = _triple_phrase(scene, objects, rng)
    if rng.random() < 0.6:
        longer = f"{text} {_background_phrase(scene, rng)}"
        text = longer if count_words(longer) <= MAX_WORDS else text
    # Articles carry nothing; without them the longest wordings fit.
    return text if count_words(text) <= MAX_WORDS else re.sub(r"\b(a|an) ", "", text)


def count_words(text: str) -> int:
    """Count words and punctuation marks, the fewest tokens a word-splitting tokenizer can use."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _centres(relation: str, third: str) -> list[tuple[float, float]]:
    if relation in PLACES:
        return [PLACES[relation]]
    if relation == "inside":
        return [(0.5, 0.5), (0.5, 0.5)]
    # A pair lies along one axis; a third object takes the other half of the other axis.
    across = {"above": 0.74, "left of": 0.74, "below": 0.26, "right of": 0.26, "": 0.5}[third]
    pair = [(0.26, across), (0.74, across)]
    alone = [(0.5, 1 - across)] if third else []
    centres = pair + alone
    return centres if relation == "left of" else [(y, x) for x, y in centres]


def _stands_out(background: str, colours: list[str]) -> bool:
    ground = BACKGROUNDS[background]
    return all(
        sum((a - b) ** 2 for a, b in zip(COLOURS[name], ground, strict=True)) ** 0.5 > _MIN_CONTRAST
        for name in colours
    )


def _object_phrase(item: SceneObject, rng: random.Random) -> str:
    size, fill = rng.choice(_SIZE_WORDS[item.size]), rng.choice(_FILL_WORDS[item.fill])
    form = rng.random()
    if item.fill in _FILL_PHRASES and form < 0.2:
        words = [size, item.colour, item.shape, _FILL_PHRASES[item.fill]]
    elif form < 0.5:
        words = [size, item.colour, fill, item.shape]
    else:
        words = [size, fill, item.colour, item.shape]
    return " ".join(["a", *filter(None, words)])


def _relation_phrase(relation: str, objects: list[str], rng: random.Random) -> str:
    first, second = objects
    if rng.random() < 0.5:
        first, second, relation = second, first, _OPPOSITE[relation]
    words = rng.choice(_RELATION_WORDS[relation])
    if rng.random() < 0.2:
        return f"{words} {second}, {first}"
    return f"{first} {words} {second}"


def _triple_phrase(scene: Scene, objects: list[str], rng: random.Random) -> str:
    first, second, third = objects
    if rng.random() < 0.5:
        # `third` says where the last object is, so both others are on the opposite side of it.
        return f"{first} {scene.relation} {second}, both {_OPPOSITE[scene.third]} {third}"
    side = _OPPOSITE[scene.relation]
    return f"{third} {scene.third} both {first} and, {side} it, {second}"


def _background_phrase(scene: Scene, rng: random.Random) -> str:
    name = scene.background
    if scene.texture == "gradient":
        return rng.choice((f"on a {name} gradient", f"on fading {name}"))
    if scene.texture == "speckled":
        return rng.choice((f"on a speckled {name} background", f"on {name} with speckles"))
    return rng.choice((f"on a {name} background", f"on {name}"))
