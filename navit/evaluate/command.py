"""`navit evaluate`: a checkpoint and a data set in, a table, JSON and a curve out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.cascade import evaluate_cascade
from navit.evaluate.cascade_answers import CascadeSettings
from navit.evaluate.cascade_data import labelled_images
from navit.evaluate.cascade_report import CascadeReport
from navit.evaluate.data import CaptionForm, ImageSet, Kind, read_image_set, read_lines
from navit.evaluate.probes import ProbeConfig
from navit.evaluate.report import Report, format_report
from navit.evaluate.results import (
    METRICS,
    PROBES,
    BudgetResult,
    Metric,
    Settings,
    check_budgets,
    check_patch_sizes,
)
from navit.evaluate.source import Precision, RunLoader, Subject, load_subject
from navit.model.classifier import Classifier
from navit.serialize import to_plain


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a checkpoint: retrieval, zero-shot and probed classes, by token budget, patch size.

    What is measured follows from the data: retrieval where images have captions; caption prompts
    where they have classes with names; linear probe, few-shot and nearest neighbours where there
    are labelled training images too.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run folder or one of its checkpoints; a folder of weights, saved here or by Hugging Face's
    transformers (SigLIP 2, SigLIP, CLIP); a FlexiViT's .npz; or a hub id."""
    shards: tuple[str, ...]
    """Validation images: tar shards or brace ranges; or one folder, in CLIP_benchmark's layout or
    with one subfolder a class."""
    train_shards: tuple[str, ...] = ()
    """Labelled training images, in the same forms, for the probes and the shape-only baseline."""
    split: str = "test"
    """Split of the validation images in CLIP_benchmark's layout."""
    train_split: str = "train"
    """Split of the training images in that layout."""
    max_tokens: tuple[int, ...] = ()
    """Token budgets of an image, each evaluated; none: the model's own."""
    patch_sizes: tuple[int, ...] = ()
    """Patch sizes in pixels, each evaluated at each budget; without budgets an image keeps its
    resolution at every size, within the pixels of the model's own budget. A tower trained at one
    size is evaluated with PI-resized weights at others. None: the model's own size."""
    cascade: tuple[int, ...] = ()
    """Token budgets of the stages of a cascade, rising: sure answers of a cheap stage are kept, the
    other images are packed anew for the next. Needs labels, or class names in the json."""
    cascade_patch_sizes: tuple[int, ...] = ()
    """Patch size of each stage in pixels; none: the model's own."""
    cascade_shares: tuple[float, ...] = ()
    """Wanted mean tokens of an image as shares of the last budget's alone, such as 0.5, each
    measured; none: five, spread evenly."""
    cascade_curve: Path | None = None
    """Draw the cascade's accuracy over its cost here; none: beside the JSON."""
    metrics: tuple[Metric, ...] = METRICS
    """Which metrics, where the data allow them; the probes encode the training images too."""
    kind: Kind = "auto"
    """"pairs": samples have captions, and classes in their json if any; "classes": they have a .cls
    each; "auto": what the layout or the first sample says."""
    captions: CaptionForm = "auto"
    """"lines": each line of a .txt is a caption; "whole": all of it is one; "auto": lines in a
    retrieval set of CLIP_benchmark, whole elsewhere. A list in the json counts always."""
    classes: Path | None = None
    """Names of the labels, one a line; none: classnames.txt of the layout, names of subfolders."""
    templates: Path | None = None
    """Prompts, one a line, with {} or {c} for the name; none: those of the layout, else ours."""
    tokenizer: Path | None = None
    """The model's tokenizer.json; none: the run's, or the one beside the weights."""
    probes: tyro.conf.OmitArgPrefixes[ProbeConfig] = field(default_factory=ProbeConfig)
    """How image vectors are probed."""
    features: Literal["pooled", "embedding"] = "pooled"
    """What is probed: the image tower's vector, or a CLIP's projected one of length 1."""
    raw_weights: bool = False
    """Evaluate a run's weights of the last step and not their running average."""
    sequences_per_batch: int = 8
    """Sequences encoded at a time."""
    workers: int = 0
    """Processes that read and decode; 0 does it in this one."""
    device: str = "auto"
    """"auto" is CUDA where there is one."""
    precision: Precision = "auto"
    """"auto": what a run trained with; of weights, bf16 on CUDA alone."""
    json: Path | None = None
    """Also write everything to this file."""
    curve: Path | None = None
    """Draw quality over cost, or over patch size, here; none: beside the JSON where there are
    several budgets or patch sizes."""
    progress: Literal["auto", "off"] = "auto"
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        check_budgets(self.max_tokens)
        check_patch_sizes(self.patch_sizes)
        if self.cascade:
            cascade_settings(self)
        if self.sequences_per_batch < 1 or self.workers < 0:
            raise ValueError(
                "sequences_per_batch must be at least 1 and workers at least 0; got "
                f"{self.sequences_per_batch} and {self.workers}."
            )


def run_evaluate(command: EvaluateCommand, runs: RunLoader) -> Report:
    """Evaluate a checkpoint, and write what the command asks for.

    Args:
        command: What is evaluated, on what, and how.
        runs: How runs are read.

    Raises:
        ValueError: If a setting or the data are wrong, or nothing could be measured.
        FileNotFoundError: If a file or the checkpoint does not exist.
        ConnectionError: If a hub id cannot be resolved.
    """
    subject = load_subject(
        command.checkpoint,
        runs,
        averaged=not command.raw_weights,
        tokenizer=command.tokenizer,
        device=command.device,
        precision=command.precision,
    )
    val, train = _image_sets(command, subject)
    settings = _settings(command)
    _check_measurable(subject, train, settings)
    evaluator = BudgetEvaluator(subject, val, train, settings)
    budgets = check_budgets(command.max_tokens) or (None,)
    sizes = check_patch_sizes(command.patch_sizes) or (None,)
    results = tuple(evaluator.evaluate(budget, size) for budget in budgets for size in sizes)
    cascade = _measure_cascade(evaluator, command) if command.cascade else None
    data = {
        "validation": val.describe(),
        "training": None if train is None else train.describe(),
        "templates": list(evaluator.templates),
    }
    report = Report(
        results,
        {"checkpoint": command.checkpoint, **subject.describe()},
        data,
        to_plain(command),
        {name: version(name) for name in ("torch", "numpy", "pillow")},
        (*subject.notes, *patch_size_notes(subject, command.patch_sizes)),
        cascade,
    )
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    curve = curve_path(command)
    if curve is not None:
        _draw(
            results,
            report.model["patch_size"],
            curve,
            over_patch_size=len(set(command.patch_sizes)) > 1,
        )
    return report


def cascade_settings(command: EvaluateCommand) -> CascadeSettings:
    """Return which cascades are measured.

    Raises:
        ValueError: If they cannot be.
    """
    return CascadeSettings(
        command.cascade,
        command.cascade_patch_sizes,
        command.cascade_shares,
        sequences_per_batch=command.sequences_per_batch,
        progress=command.progress == "auto",
    )


def _measure_cascade(evaluator: BudgetEvaluator, command: EvaluateCommand) -> CascadeReport:
    images = labelled_images(evaluator)
    report = evaluate_cascade(evaluator.subject, images, cascade_settings(command))
    path = cascade_curve_path(command)
    if path is not None:
        from navit.evaluate.cascade_curve import draw_cascade  # matplotlib takes a second

        draw_cascade(report, path)
    return report


def cascade_curve_path(command: EvaluateCommand) -> Path | None:
    """Return where the cascade's curve is drawn; None where it is not."""
    if command.cascade_curve is None and command.cascade and command.json is not None:
        return command.json.with_name(f"{command.json.stem}-cascade.png")
    return command.cascade_curve if command.cascade else None


def patch_size_notes(subject: Subject, sizes: Sequence[int]) -> tuple[str, ...]:
    """Say so where a tower is evaluated at patch sizes it has no weights for."""
    own = subject.vision.config.patch_size
    if subject.is_flexible or not set(sizes) - {own}:
        return ()
    return (
        f"the image tower was trained on patches of {own} pixels alone: at other sizes its weights "
        "are PI-resized, and it is not expected to keep its quality (FlexiViT, figure 3)",
    )


def _draw(results: Sequence[BudgetResult], own: int, path: Path, *, over_patch_size: bool) -> None:
    # Imported here: matplotlib takes a second.
    from navit.evaluate.curve import draw_curve
    from navit.evaluate.patch_curve import draw_patch_curve

    if over_patch_size:
        draw_patch_curve(results, path, own)
    else:
        draw_curve(results, path)


def curve_path(command: EvaluateCommand) -> Path | None:
    """Return where the curve is drawn; None where it is not."""
    several = max(len(set(command.max_tokens)), len(set(command.patch_sizes))) > 1
    if command.curve is None and several and command.json is not None:
        return command.json.with_suffix(".png")
    return command.curve


def format_result(report: Report, command: EvaluateCommand) -> str:
    """Lay out a report and the files written, for the terminal."""
    files = [
        ("json", command.json),
        ("curve", curve_path(command)),
        ("cascade", cascade_curve_path(command)),
    ]
    lines = [f"{name + ':':<9}{path}" for name, path in files if path is not None]
    return "\n\n".join([format_report(report), *(["\n".join(lines)] if lines else [])])


def _image_sets(command: EvaluateCommand, subject: Subject) -> tuple[ImageSet, ImageSet | None]:
    kind = command.kind
    if isinstance(subject.model, Classifier) and kind == "auto":
        kind = "classes"
    val = read_image_set(
        command.shards,
        split=command.split,
        kind=kind,
        captions=command.captions,
        classes=subject.classes,
    )
    if not command.train_shards:
        return val, None
    names = val.class_names if val.folder is not None else subject.classes
    train = read_image_set(
        command.train_shards, split=command.train_split, kind=kind, classes=names
    )
    return val, train.without(val)


def _settings(command: EvaluateCommand) -> Settings:
    return Settings(
        metrics=command.metrics,
        probes=command.probes,
        features=command.features,
        templates=None if command.templates is None else read_lines(command.templates, "template"),
        class_names=None if command.classes is None else read_lines(command.classes, "class name"),
        sequences_per_batch=command.sequences_per_batch,
        workers=command.workers,
        progress=command.progress == "auto",
    )


def _check_measurable(subject: Subject, train: ImageSet | None, settings: Settings) -> None:
    """Refuse to encode images for nothing."""
    wanted = set(settings.metrics)
    texts = subject.has_text and wanted & {"retrieval", "prompts"}
    own = isinstance(subject.model, Classifier) and "classifier" in wanted
    probed = train is not None and wanted & {*PROBES, "shape"}
    if not (texts or own or probed):
        raise ValueError(
            "something must be measurable; this model has no text side that can be used "
            f"({'; '.join(subject.notes) or 'none was asked for'}), and there are no training "
            "images for probes. Give --train-shards, or --tokenizer."
        )
