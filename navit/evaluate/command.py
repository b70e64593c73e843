"""`navit evaluate`: a checkpoint and a data set in, a table, JSON and a curve out."""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.data import CaptionForm, ImageSet, Kind, read_image_set, read_lines
from navit.evaluate.probes import ProbeConfig
from navit.evaluate.report import Report, format_report
from navit.evaluate.results import METRICS, PROBES, Metric, Settings, check_budgets
from navit.evaluate.source import Precision, RunLoader, Subject, load_subject
from navit.model.classifier import Classifier
from navit.serialize import to_plain


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a checkpoint: retrieval, zero-shot and probed classes, at one or more token budgets.

    What is measured follows from the data: retrieval where images have captions; caption prompts
    where they have classes with names; linear probe, few-shot and nearest neighbours where there
    are labelled training images too.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run folder or one of its checkpoints; a folder of weights, saved here or by Hugging Face's
    transformers (SigLIP 2, SigLIP, CLIP); or a hub id."""
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
    """Draw quality over cost here; none: beside the JSON where there are several budgets."""
    progress: Literal["auto", "off"] = "auto"
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        check_budgets(self.max_tokens)
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
    budgets = check_budgets(command.max_tokens) or (subject.packing.image_budget,)
    results = tuple(evaluator.evaluate(budget) for budget in budgets)
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
        subject.notes,
    )
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    curve = curve_path(command)
    if curve is not None:
        from navit.evaluate.curve import draw_curve  # matplotlib takes a second

        draw_curve(results, curve)
    return report


def curve_path(command: EvaluateCommand) -> Path | None:
    """Return where the curve is drawn; None where it is not."""
    several = len(set(command.max_tokens)) > 1
    if command.curve is None and several and command.json is not None:
        return command.json.with_suffix(".png")
    return command.curve


def format_result(report: Report, command: EvaluateCommand) -> str:
    """Lay out a report and the files written, for the terminal."""
    files = [("json", command.json), ("curve", curve_path(command))]
    lines = [f"{name + ':':<8}{path}" for name, path in files if path is not None]
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
