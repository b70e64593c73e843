"""Caption-prompt accuracy: classify an image by the class whose prompts are nearest to it."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from navit.evaluate.accuracy import KS, accuracies
from navit.evaluate.retrieval import first_hit_ranks

EncodeTexts = Callable[[list[str]], Tensor]
"""Texts to their M vectors, (M, D) on the CPU, as `navit.evaluate.encode.text_encoder` makes it."""

DEFAULT_TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a close-up of a {}",
    "this is a {}",
    "a {}",
    "{}",
)
"""General prompts; as in CLIP (arXiv:2103.00020), section 3.1.4, several are averaged."""

_ARTICLE = re.compile(r"\b([Aa])n? \{\}")
_VOWEL_SOUND = re.compile(r"(?!uni|use|uti|ure|eu|one\b|once\b)[aeiou]|hour|hono|heir|x-", re.I)


def fill_template(template: str, class_name: str) -> str:
    """Put a class name in the place of ``{}``, with the article its sound asks for, or of ``{c}``.

    Args:
        template: A prompt holding ``{}`` at least once; "a" or "an" before it is adapted. With
            ``{c}`` instead, as CLIP_benchmark's files write it, nothing is adapted: published
            accuracies were measured so.
        class_name: The name, taken literally.

    Returns:
        The prompt, as in ``fill_template("a photo of a {}", "ant") == "a photo of an ant"`` and
        ``fill_template("a photo of a {c}", "ant") == "a photo of a ant"``.

    Raises:
        ValueError: If the template has neither.
    """
    if "{c}" in template:
        return template.replace("{c}", class_name)
    if "{}" not in template:
        raise ValueError(
            f"A template must hold {{}} or {{c}} where the class name goes; got {template!r}."
        )
    article = r"\1n {}" if _VOWEL_SOUND.match(class_name) else r"\1 {}"
    return _ARTICLE.sub(article, template).replace("{}", class_name)


def class_vectors(
    encode_texts: EncodeTexts,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Float[Tensor, "C D"]:
    """Average each class over its prompts: normalised, averaged, normalised again.

    Args:
        encode_texts: Texts to vectors; need not normalise.
        class_names: The C names, at least one.
        templates: Prompts with ``{}`` or ``{c}`` in the place of the name, at least one.

    Returns:
        One vector of norm 1 per class, float32 or float64 as encoded.

    Raises:
        ValueError: If there is no name or no template, or a template has no place for the name.

    Source: CLIP (arXiv:2103.00020), section 3.1.4 "Prompt engineering and ensembling".
    """
    if not class_names or not templates:
        raise ValueError(
            f"class_names and templates must not be empty; got {len(class_names)} names and "
            f"{len(templates)} templates."
        )
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    vectors = encode_texts(prompts)
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    per_class = normalize(vectors, dim=-1).view(len(class_names), len(templates), -1)
    return normalize(per_class.mean(1), dim=-1)


def prompt_accuracy(
    image: Float[Tensor, "N D"],
    class_index: Int64[Tensor, " N"],
    classes: Float[Tensor, "C D"],
    *,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Share of images whose own class is among the k nearest class vectors.

    Args:
        image: One vector per image.
        class_index: Index of each image's class.
        classes: One vector per class (`class_vectors`).
        ks: Ranks to report.

    Returns:
        ``"prompt_accuracy@k"`` for each k and ``"prompt_class_recall"``, the mean over the classes
        that occur of the share found first; in [0, 1], 0 without images. Another class that is as
        similar as the image's own counts as nearer, so a constant vector scores 0; a similarity
        that is not finite is never a hit.

    Raises:
        ValueError: If an index names no class.
    """
    num_classes = len(classes)
    if len(class_index) and not 0 <= int(class_index.min()) <= int(class_index.max()) < num_classes:
        raise ValueError(
            f"class_index must hold indices from 0 to {num_classes - 1}; got "
            f"{int(class_index.min())} to {int(class_index.max())}."
        )
    own = torch.arange(num_classes, device=class_index.device)
    rank = first_hit_ranks(image, classes, class_index, own, torch.stack([own, own]))
    return accuracies(rank, class_index, "prompt_", ks=ks)


def class_lists(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Collect the class names of each `set`, sorted; samples without `class_name` name none."""
    names: dict[str, set[str]] = defaultdict(set)
    for fields in metadata.values():
        label = class_label(fields)
        if label is not None:
            names[label[0]].add(label[1])
    return {set_name: tuple(sorted(found)) for set_name, found in sorted(names.items())}


def class_label(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Read (set, class name) from a sample's json; None without a class name.

    A sample that names a class and no set belongs to the set "all".
    """
    name = fields.get("class_name")
    return (str(fields.get("set") or "all"), str(name)) if name is not None else None


def evaluate_prompts(
    image_vectors: Float[Tensor, "N D"],
    keys: Sequence[str],
    metadata: Mapping[str, Mapping[str, Any]],
    encode_texts: EncodeTexts,
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Caption-prompt accuracy on every `set` of the metadata that has class names.

    Args:
        image_vectors: One vector per image.
        keys: Key of each image, as in `metadata`; an image without metadata is left out.
        metadata: Json of the samples by key (`navit.evaluate.encode.read_metadata`).
        encode_texts: Texts to vectors; called once per set with all its prompts.
        templates: Prompts with ``{}`` or ``{c}`` in the place of the name.
        classes: Class names of each set to choose from; None takes those found in `metadata`,
            which may hold more samples than `keys`.

    Returns:
        ``"<set>/prompt_accuracy@1"``, ``"<set>/prompt_accuracy@5"`` and
        ``"<set>/prompt_class_recall"`` for each set that an image belongs to, in [0, 1].

    Raises:
        ValueError: If keys and vectors differ in number, or an image's class is not in `classes`.
    """
    if len(keys) != len(image_vectors):
        raise ValueError(
            f"keys must name every image vector ({len(image_vectors)}); got {len(keys)}."
        )
    members: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row, key in enumerate(keys):
        label = class_label(metadata.get(key, {}))
        if label is not None:
            members[label[0]].append((row, label[1]))
    class_names = class_lists(metadata) if classes is None else classes
    results: dict[str, float] = {}
    for set_name, samples in sorted(members.items()):
        index = {name: number for number, name in enumerate(class_names.get(set_name, ()))}
        unknown = sorted({name for _, name in samples} - index.keys())
        if unknown:
            raise ValueError(
                f"classes[{set_name!r}] must hold the class of every image of the set; got an "
                f"image of class {unknown[0]!r}. Add the name or leave classes out."
            )
        vectors = class_vectors(encode_texts, list(index), templates).to(image_vectors.device)
        images = image_vectors[[row for row, _ in samples]]
        targets = torch.tensor([index[name] for _, name in samples], device=images.device)
        found = prompt_accuracy(images, targets, vectors)
        results |= {f"{set_name}/{name}": value for name, value in found.items()}
    return results
