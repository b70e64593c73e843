"""Labelled images for a cascade, one by one from their source, and the classes they are told by."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.data import ImageSet
from navit.evaluate.labels import LABEL_SET, ClassNumbers
from navit.evaluate.prompts import class_label, class_vectors
from navit.model.classifier import Classifier
from packer.config import PackerConfig
from packer.errors import NOTED_CAUSES, SkipSample
from packer.plan.draws import keyed_draws
from packer.shards import iter_shard, sample_from_raw


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """The images of one set of classes, with the number of each one's class as its label."""

    images: ImageSet
    """Where they are."""
    set_name: str
    """Name of the set of classes."""
    num_classes: int
    """C."""
    numbers: dict[str, int] | None = None
    """Class number by key; None: the images carry it themselves."""
    vectors: Tensor | None = None
    """Of a CLIP: (C, E) class vectors."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What could not be read in the latest pass, by cause."""

    def samples(self, packing: PackerConfig) -> Iterator[dict[str, Any]]:
        """Yield one pass over the set: ``key``, ``image`` and ``label``; others are passed over."""
        self.skipped.clear()
        for sample in self._all(packing):
            label = sample.get("label") if self.numbers is None else self.numbers.get(sample["key"])
            if label is not None and 0 <= label < self.num_classes:
                yield {"key": sample["key"], "image": sample["image"], "label": label}

    def half(self, samples: Iterable[dict[str, Any]], which: int, seed: int) -> Iterator[Any]:
        """Keep one of two halves, 0 or 1; which an image is in follows from its key alone."""
        return (sample for sample in samples if half_of(sample["key"], seed) == which)

    def _all(self, packing: PackerConfig) -> Iterator[dict[str, Any]]:
        folder = self.images.folder
        if folder is not None:
            yield from (folder[index] for index in range(len(folder)))
            return
        for shard in self.images.shards:
            for raw in iter_shard(shard, on_problem=self._note):
                try:
                    yield sample_from_raw(raw, config=packing)
                except SkipSample as error:
                    self.skipped[error.cause] += 1

    def _note(self, cause: str, detail: str) -> None:
        if cause not in NOTED_CAUSES:
            self.skipped[cause] += 1


def half_of(key: str, seed: int) -> int:
    """Return which of two halves an image is in, 0 or 1."""
    return keyed_draws(seed, 0, f"cascade half/{key}").spare >> 63


def labelled_images(evaluator: BudgetEvaluator) -> LabelledImages:
    """Find out which classes a model can tell the validation images by.

    Labels of the images count where they have them; else the class names in their json, of the set
    that most images are of.

    Raises:
        ValueError: If the model has no class logits, or the images no classes.
    """
    subject, val = evaluator.subject, evaluator.val
    if isinstance(subject.model, Classifier):
        return LabelledImages(val, LABEL_SET, subject.model.config.num_classes)
    if not subject.has_text or evaluator.encode_texts is None:
        raise ValueError(
            "a cascade needs class logits: a classifier, or a CLIP with its tokenizer; got a "
            f"{type(subject.model).__name__} ({'; '.join(subject.notes) or 'no tokenizer'})."
        )
    if val.labelled:
        names = evaluator.class_names
        if names is None:
            raise ValueError("labels need names to be prompted with; give them with --classes.")
        vectors = class_vectors(evaluator.encode_texts, names, evaluator.templates)
        return LabelledImages(val, LABEL_SET, len(names), vectors=vectors)
    sets = Counter(
        label[0]
        for fields in evaluator.metadata.values()
        if (label := class_label(fields)) is not None
    )
    if not sets:
        raise ValueError(
            "a cascade needs images with classes, as its thresholds are solved from right and "
            "wrong answers; the validation images have no labels, nor class names in their json."
        )
    largest = max(sorted(sets), key=lambda name: sets[name])
    by_name = ClassNumbers(evaluator.metadata).numbers[largest]
    numbers = {
        key: by_name[label[1]]
        for key, fields in evaluator.metadata.items()
        if (label := class_label(fields)) is not None and label[0] == largest
    }
    vectors = class_vectors(evaluator.encode_texts, list(by_name), evaluator.templates)
    return LabelledImages(val, largest, len(by_name), numbers, vectors)
