"""One model at one token budget and patch size: every metric its data allow, and what it costs."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from navit.evaluate.accuracy import KS, accuracies, ranks_in_chunks
from navit.evaluate.captions import Captions, image_captions, pair_metrics
from navit.evaluate.data import ImageSet
from navit.evaluate.encode import EncodedImages, encode_images, text_encoder
from navit.evaluate.labels import LABEL_SET, ClassNumbers, Members
from navit.evaluate.probes import Probes
from navit.evaluate.prompts import (
    DEFAULT_TEMPLATES,
    EncodeTexts,
    class_vectors,
    evaluate_prompts,
    prompt_accuracy,
)
from navit.evaluate.results import PROBES, BudgetResult, Settings
from navit.evaluate.shape_baseline import shape_baselines
from navit.evaluate.source import Subject
from navit.model.classifier import Classifier
from packer.batch import BatchStats


class BudgetEvaluator:
    """Evaluates one model on one data set, at as many budgets and patch sizes as are asked for.

    Json is read, and a text is encoded, once for all of them.

    Args:
        subject: The model.
        val: Validation images.
        train: Labelled training images, for the probes and the shape-only baseline; or None.
        settings: What is measured.
    """

    def __init__(
        self, subject: Subject, val: ImageSet, train: ImageSet | None, settings: Settings
    ) -> None:
        self.subject, self.val, self.train, self.settings = subject, val, train, settings
        self.metadata = val.metadata()
        # A shard of the training part may have the name, and so its samples the keys, of one here.
        self.train_metadata = {} if train is None else train.metadata()
        self.numbers = ClassNumbers(self.metadata, self.train_metadata)
        self.class_names = settings.class_names or val.class_names or subject.classes
        self.templates = settings.templates or val.templates or DEFAULT_TEMPLATES
        self.encode_texts = self._text_encoder() if subject.has_text else None
        self._warm: set[int] = set()

    def evaluate(
        self, max_tokens: int | None = None, patch_size: int | None = None
    ) -> BudgetResult:
        """Encode the images within a token budget and compute every metric.

        Args:
            max_tokens: Token budget of an image; None: the model's own, and at another patch size
                the one that keeps each image's resolution, see `Subject.at_patch_size`.
            patch_size: Side of a patch in pixels; None: the model's own.

        Raises:
            ValueError: If there is no usable image, or a label has no name.
        """
        subject = self.subject if patch_size is None else self.subject.at_patch_size(patch_size)
        packing = subject.packing
        budget = max_tokens or packing.image_budget
        packing = replace(packing, max_tokens=budget, seq_len=max(packing.seq_len, budget))
        subject = replace(subject, packing=packing)
        self._warm_up(subject)
        found = EncodedImages.join(list(self._pass(subject, self.val, "validation")))
        if not found.keys:
            what = "labelled image" if self.val.labelled else "image-text pair"
            raise ValueError(
                f"the validation data hold no usable {what}; {found.stats.samples_read} samples "
                f"were read and skipped: {dict(found.stats.skipped)}. Check the shards."
            )
        members = self.numbers.members(found.keys, found.labels, self.metadata)
        metrics, captions = self._text_metrics(found, members)
        if "logits" in found.vectors:
            metrics |= _classifier_metrics(found.vectors["logits"], members.get(LABEL_SET))
        classes = self._count_classes(members)
        train_stats, notes = None, self._notes(members)
        if self._probed:
            probed, train_stats, more = self._probe(subject, found, members, classes)
            metrics, notes = metrics | probed, (*notes, *more)
        if self.train is not None and "shape" in self.settings.metrics:
            known = {f"train/{key}": fields for key, fields in self.train_metadata.items()}
            metrics |= shape_baselines(known, self.metadata)
        if not metrics:
            notes = (*notes, "nothing measured: metrics need labels, or captions and a text tower")
        return BudgetResult(
            budget,
            metrics,
            found.stats,
            found.seconds,
            found.model_seconds,
            captions,
            classes,
            train_stats,
            notes,
            packing.patch_size,
        )

    @property
    def _probed(self) -> tuple[str, ...]:
        if self.train is None:
            return ()
        return tuple(kind for kind in PROBES if kind in self.settings.metrics)

    @property
    def _features(self) -> str:
        return "pooled" if self.subject.clip is None else self.settings.features

    def _names(self, images: ImageSet) -> set[str]:
        """Say which vectors of the images are needed."""
        names = {self._features} if self._probed or not self.subject.has_text else set()
        if images is self.val:
            if self.subject.has_text:
                names.add("embedding")
            if isinstance(self.subject.model, Classifier) and "classifier" in self.settings.metrics:
                names.add("logits")
        return names

    def _pass(self, subject: Subject, images: ImageSet, title: str) -> Iterator[EncodedImages]:
        settings, packing = self.settings, subject.packing
        batches = images.batches(packing, settings.sequences_per_batch, workers=settings.workers)
        return encode_images(
            subject.model,
            subject.encoder(self._names(images)),
            batches,
            subject.device,
            subject.autocast_dtype,
            progress=settings.progress,
            title=f"{title}, {packing.image_budget} tokens of {packing.patch_size} pixels",
        )

    def _warm_up(self, subject: Subject) -> None:
        """Encode the first batch once: the first call of a kernel would count as its speed."""
        packing = subject.packing
        if packing.patch_size in self._warm:
            return
        batches = self.val.batches(packing, self.settings.sequences_per_batch, workers=0)
        first = next((batch for batch in batches if batch.num_images), None)
        if first is not None:
            encode = subject.encoder(self._names(self.val))
            for _ in encode_images(
                subject.model,
                encode,
                [first],
                subject.device,
                subject.autocast_dtype,
                progress=False,
            ):
                pass
        self._warm.add(packing.patch_size)

    def _text_encoder(self) -> EncodeTexts:
        """Return an encoder that remembers: captions and prompts are the same at every budget."""
        model, tokenizer = self.subject.clip, self.subject.tokenizer
        assert model is not None
        assert tokenizer is not None
        encode = text_encoder(
            model,
            tokenizer,
            model.config.text.max_tokens,
            self.subject.device,
            self.subject.autocast_dtype,
        )
        known: dict[str, Tensor] = {}

        def remembered(texts: list[str]) -> Tensor:
            new = list(dict.fromkeys(text for text in texts if text not in known))
            if new:
                known.update(zip(new, encode(new), strict=True))
            return torch.stack([known[text] for text in texts])

        return remembered

    def _text_metrics(
        self, found: EncodedImages, members: Mapping[str, Members]
    ) -> tuple[dict[str, float], int]:
        if self.encode_texts is None:
            return {}, 0
        image, count = found.vectors["embedding"], 0
        metrics: dict[str, float] = {}
        if "retrieval" in self.settings.metrics:
            several = image_captions(
                found.texts, found.keys, self.metadata, lines=self.val.caption_lines
            )
            rows = [row for row, texts in enumerate(several) if texts]
            captions = Captions.of([several[row] for row in rows])
            count = len(captions.texts)
            if count:
                text = self.encode_texts(list(captions.texts))
                metrics |= pair_metrics(image[rows], text, captions)
        if "prompts" in self.settings.metrics:
            metrics |= self._prompt_metrics(image, found, members)
        return metrics, count

    def _prompt_metrics(
        self, image: Tensor, found: EncodedImages, members: Mapping[str, Members]
    ) -> dict[str, float]:
        assert self.encode_texts is not None
        own = members.get(LABEL_SET)
        if own is None:
            return evaluate_prompts(
                image, found.keys, self.metadata, self.encode_texts, templates=self.templates
            )
        if self.class_names is None:
            return {}  # said in the notes
        if int(own.classes.max()) >= len(self.class_names):
            raise ValueError(
                f"every label must have a class name; got label {int(own.classes.max())} and "
                f"{len(self.class_names)} names. Give all of them, one a line."
            )
        classes = class_vectors(self.encode_texts, self.class_names, self.templates)
        ranked = prompt_accuracy(image[own.rows], own.classes, classes)
        return {f"{LABEL_SET}/{name}": value for name, value in ranked.items()}

    def _probe(
        self,
        subject: Subject,
        found: EncodedImages,
        members: Mapping[str, Members],
        counts: dict[str, dict[str, int]],
    ) -> tuple[dict[str, float], BatchStats, tuple[str, ...]]:
        """Feed the training images to the probes of every set, part by part."""
        assert self.train is not None
        vectors = found.vectors[self._features]
        probes = {
            name: Probes(vectors[own.rows], own.classes, self.settings.probes, self._probed)
            for name, own in members.items()
        }
        stats, notes = BatchStats(), []
        for part in self._pass(subject, self.train, "training"):
            stats = stats + part.stats
            for name, own in self.numbers.members(
                part.keys, part.labels, self.train_metadata
            ).items():
                if name in probes:
                    keys = [part.keys[row] for row in own.rows.tolist()]
                    probes[name].add(part.vectors[self._features][own.rows], own.classes, keys)
        metrics: dict[str, float] = {}
        for name, probe in probes.items():
            metrics |= {f"{name}/{key}": value for key, value in probe.metrics().items()}
            counts[name]["train_images"] = probe.images
            if not probe.images:
                notes.append(f"{name}: no labelled training image")
            if probe.not_finite:
                notes.append(f"{name}: {probe.not_finite} training vectors are not finite")
        return metrics, stats, tuple(notes)

    def _notes(self, members: Mapping[str, Members]) -> tuple[str, ...]:
        if not self.subject.has_text or "prompts" not in self.settings.metrics:
            return ()
        if LABEL_SET in members and self.class_names is None:
            return ("labels without names: no prompts; give the names with --classes",)
        return ()

    def _count_classes(self, members: Mapping[str, Members]) -> dict[str, dict[str, int]]:
        counts = {}
        for name, own in members.items():
            if name in self.numbers.numbers:
                classes = len(self.numbers.numbers[name])
            elif self.class_names is not None:
                classes = len(self.class_names)
            else:
                classes = int(own.classes.max()) + 1
            counts[name] = {"classes": classes, "images": len(own.rows)}
        return counts


def _classifier_metrics(logits: Tensor, own: Members | None) -> dict[str, float]:
    """Accuracy of a classifier's own classes, under the names `evaluate_classifier` uses."""
    if own is None:
        return {}
    ranks = ranks_in_chunks(lambda part: logits[own.rows[part]], own.classes)
    ks = [k for k in KS if k <= logits.shape[1]]
    found = accuracies(ranks, own.classes, "", ks=ks)
    return {**found, "chance/accuracy@1": 1 / logits.shape[1]}
