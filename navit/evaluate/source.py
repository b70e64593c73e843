"""A checkpoint of any kind -> a model with all that evaluating it needs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from navit.embed.config import EmbedConfig
from navit.evaluate.encode import EncodeImages
from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier
from navit.pretrained import load
from navit.pretrained.source import find_folder, stated_tokens
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig

Precision = Literal["auto", "fp32", "bf16"]
TOKENIZER_FILE = "tokenizer.json"


class Run(Protocol):
    """What a training run gives; `navit.train.restore.Trained` has it."""

    @property
    def model(self) -> CLIP | Classifier | NaViT:
        """The model, on the CPU."""

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Its tokenizer."""

    @property
    def config(self) -> Any:
        """Its configuration, of which ``packer`` is read."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of its classes, where they are known."""


@dataclass(frozen=True)
class RunLoader:
    """How runs are read: handed in, as training stands on evaluation and not the other way."""

    load: Callable[..., Run]
    """``load(path, averaged=...)``; `FileNotFoundError` where there is no run."""
    autocast_dtype: Callable[[Any, torch.device], torch.dtype | None]
    """A run's configuration and a device -> the precision it evaluates with."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    model: NaViT | CLIP | Classifier
    """On its device, float32."""
    packing: PackerConfig
    """What its images are given as."""
    device: torch.device
    """Where it is."""
    autocast_dtype: torch.dtype | None
    """Precision of the matrix products; None leaves autocast off."""
    tokenizer: CaptionTokenizer | None = None
    """Turns texts into its tokens; None where there is none."""
    classes: tuple[str, ...] | None = None
    """Names of a classifier's classes, where they are known."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know of it."""

    @property
    def vision(self) -> NaViT:
        """The image tower."""
        return self.model if isinstance(self.model, NaViT) else self.model.vision

    @property
    def clip(self) -> CLIP | None:
        """The model where it has both towers."""
        return self.model if isinstance(self.model, CLIP) else None

    @property
    def has_text(self) -> bool:
        """Whether texts can be encoded."""
        return self.clip is not None and self.tokenizer is not None

    @property
    def is_flexible(self) -> bool:
        """Whether the image tower takes patches of any size."""
        return self.vision.config.patch_buffer is not None

    def at_patch_size(self, size: int) -> "Subject":
        """Return the subject with images cut into patches of another size.

        Images keep their resolution: the token budget becomes the number of patches of this size
        that have the pixels of the one before, hence 4 times the tokens at half the size. A tower
        of one patch size is replaced by a copy whose weights are PI-resized once, from those it
        was trained with.

        Args:
            size: Side of a patch in pixels.
        """
        packing, model = self.packing, self.model
        budget = max(packing.image_budget * packing.patch_size**2 // size**2, 1)
        if not self.is_flexible and size != self.vision.config.patch_size:
            model = model.at_patch_size(size)
        packing = replace(
            packing, patch_size=size, max_tokens=budget, seq_len=max(packing.seq_len, budget)
        )
        return replace(self, model=model, packing=packing)

    def encoder(self, names: Collection[str]) -> EncodeImages:
        """Return what gives vectors of the names asked for.

        Args:
            names: Of "pooled", the image tower's vector; "embedding", of a CLIP, the same projected
                and scaled to length 1; "logits", of a classifier.
        """

        def encode(batch: PackedBatch) -> Mapping[str, Tensor]:
            pooled = self.vision(batch).pooled
            found = {"pooled": pooled}
            if "embedding" in names and isinstance(self.model, CLIP):
                found["embedding"] = F.normalize(self.model.image_proj(pooled).float(), dim=-1)
            if "logits" in names and isinstance(self.model, Classifier):
                found["logits"] = self.model.head(pooled)
            return {name: found[name] for name in names}

        return encode

    def describe(self) -> dict[str, Any]:
        """Say what is evaluated, JSON-ready."""
        return {
            "kind": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "patch_size": self.packing.patch_size,
            "patch_buffer": self.vision.config.patch_buffer,
            "resize": self.packing.resize,
            "decode": self.packing.decode,
            "device": str(self.device),
            "precision": "fp32" if self.autocast_dtype is None else "bf16",
            "tokenizer": None if self.tokenizer is None else self.tokenizer.hash,
        }


def load_subject(
    source: str,
    runs: RunLoader,
    *,
    averaged: bool = True,
    tokenizer: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Subject:
    """Load a checkpoint.

    Args:
        source: A run folder or one of its checkpoints; a folder of weights as ``save_pretrained``
            of ours or of Hugging Face (SigLIP 2, SigLIP, CLIP) writes it; a FlexiViT's .npz; or a
            hub id.
        runs: How runs are read.
        averaged: Of a run, whether to take the running average of the weights.
        tokenizer: A ``tokenizer.json``; None takes the run's, or the one in the folder of weights.
        device: "auto" is CUDA where there is one.
        precision: "auto": of a run what it evaluates with, of weights bf16 on CUDA alone.

    Raises:
        FileNotFoundError: If there is no such checkpoint or tokenizer.
        ConnectionError: If a hub id cannot be resolved.
        ValueError: If the model is of a kind that is not known, or the tokenizer of another model.
    """
    where = device
    if device == "auto":
        where = "cuda" if torch.cuda.is_available() else "cpu"
    at = torch.device(where)
    given = None if tokenizer is None else CaptionTokenizer.from_file(tokenizer)
    own = EmbedConfig(precision=precision)
    try:
        run = runs.load(Path(source), averaged=averaged)
    except FileNotFoundError:
        is_file = Path(source).suffix == ".npz" and Path(source).is_file()
        if not (is_file or (Path(source) / "config.json").is_file()) and (
            Path(source).exists() or "/" not in source
        ):
            raise  # neither weights nor a hub id
        return _of_weights(source, at, own, given)
    dtype = own.autocast_dtype(at)
    if precision == "auto":
        dtype = runs.autocast_dtype(run.config, at)
    model, packing, known = run.model.to(at), run.config.packer, given or run.tokenizer
    return _checked(Subject(model, packing, at, dtype, known, run.classes))


def _of_weights(
    source: str, device: torch.device, own: EmbedConfig, tokenizer: CaptionTokenizer | None
) -> Subject:
    folder = Path(source) if Path(source).is_file() else find_folder(source)
    model = load(folder).to(device, torch.float32)
    vision = model.vision if isinstance(model, CLIP) else model
    packing = own.packing(vision.config, stated_tokens=stated_tokens(folder))
    if tokenizer is None and isinstance(model, CLIP) and (folder / TOKENIZER_FILE).is_file():
        tokenizer = CaptionTokenizer.from_file(folder / TOKENIZER_FILE)
    return _checked(Subject(model, packing, device, own.autocast_dtype(device), tokenizer))


def _checked(subject: Subject) -> Subject:
    """Refuse a tokenizer whose tokens the model does not know; say what cannot be measured."""
    model, tokenizer = subject.model, subject.tokenizer
    if not isinstance(model, CLIP):
        note = "no text tower: image metrics alone, on the image tower's vectors"
        return _noted(subject, note) if isinstance(model, NaViT) else subject
    if tokenizer is None:
        return _noted(
            subject, "no tokenizer: image metrics alone; give the model's with --tokenizer"
        )
    vocabulary = model.config.text.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer must be the model's, with at most {vocabulary} tokens; got one of "
            f"{tokenizer.vocab_size}. Give the tokenizer.json the model was trained with."
        )
    return subject


def _noted(subject: Subject, note: str) -> Subject:
    return replace(subject, notes=(*subject.notes, note))
