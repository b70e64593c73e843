"""A teacher: a trained model whose outputs another one learns to give (distillation).

It sees the student's own images. Where it takes patches of one size alone and they come in others,
the images are put together again and cut anew (`packer.recut`), in the training process: the loader
knows nothing of teachers, and beside a teacher's forward pass the copy costs little.

Source: FlexiViT (arXiv:2212.08013), section 3.5 "Connection to knowledge distillation".
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier
from navit.model.clip import CLIPOutput
from navit.train.config import TrainConfig
from navit.train.setup import resolve_autocast
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.plan.drop import NoDrop
from packer.plan.patch_size import OnePatchSize
from packer.recut import recut

TOKENIZER_FILE = "tokenizer.json"
TEACHER_FILE = "teacher.sha256"
"""Digest of the teacher's weights, beside a checkpoint's."""


class Teacher:
    """A frozen model that answers the batches a student is trained on.

    Args:
        config: The student's run; `teacher` names a run folder, one of its checkpoints, or a folder
            of ``save_pretrained``.
        device: Where it answers.
        classes: Names of the run's classes, in the order of their labels, where it knows them.

    Raises:
        ValueError: If it is of another kind than the student's task, has other classes, or cannot
            see the images as the run packs them.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, classes: Sequence[str] | None = None
    ) -> None:
        self.model = _load(config, classes)
        self.digest = _digest(self.model)
        self.model.to(device).eval().requires_grad_(requires_grad=False)
        self.device, self.autocast_dtype = device, resolve_autocast(config, device)

    @torch.no_grad()
    def __call__(self, batches: Sequence[PackedBatch]) -> CLIPOutput | Tensor:
        """Answer batches: one row for each of their images, in their order."""
        outputs = [self._forward(batch) for batch in batches]
        logits = [output for output in outputs if isinstance(output, Tensor)]
        if logits:
            return torch.cat(logits)
        pairs = [output for output in outputs if isinstance(output, CLIPOutput)]
        image, text = (torch.cat([getattr(x, name) for x in pairs]) for name in ("image", "text"))
        return replace(pairs[0], image=image, text=text)

    def _forward(self, batch: PackedBatch) -> CLIPOutput | Tensor:
        dtype = self.autocast_dtype
        seen = self._as_seen(batch).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            output: CLIPOutput | Tensor = self.model(seen)
        return output

    def _as_seen(self, batch: PackedBatch) -> PackedBatch:
        config = self.model.vision.config
        alike = batch.patch_sizes is None and batch.patch_size == config.patch_size
        if alike or config.patch_buffer is not None:
            return batch
        return recut(batch, config.patch_size)


def given_tokenizer(config: TrainConfig) -> Path | None:
    """Return the tokenizer beside a teacher, or beside the CLIP a run starts from; None: neither.

    A run that reads texts as another model does must cut them into the same tokens.
    """
    frozen = config.init if "text" in config.freeze else None
    for folder in (config.teacher, frozen):
        if folder is not None and (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    return None


def check_tokenizer(
    model: CLIP | Classifier, folder: Path | None, tokenizer: CaptionTokenizer
) -> None:
    """Refuse a run whose tokens are not those of a model it takes over or learns from.

    Raises:
        ValueError: If the tokenizer beside the model is another one, or, where none is, if the
            vocabulary has another size.
    """
    assert folder is not None, "the model comes from it"
    assert isinstance(model, CLIP), "a model with texts"
    beside = folder / TOKENIZER_FILE
    if beside.is_file():
        same = CaptionTokenizer.from_file(beside).hash == tokenizer.hash
    else:
        same = model.config.text.vocab_size == tokenizer.vocab_size
    if not same:
        raise ValueError(
            f"the run must read texts as the model in {folder} does, and has another tokenizer. "
            "Give --tokenizer with that model's tokenizer.json."
        )


def mixed_loss(agreed: Tensor, own: Callable[[], Tensor], weight: float) -> Tensor:
    """Mix the distance to a teacher with the task's own loss, which is left out at a weight of 1.

    Args:
        agreed: The distance to the teacher.
        own: Computes the task's loss.
        weight: The teacher's share.
    """
    return agreed if weight == 1 else weight * agreed + (1 - weight) * own()


def teacher_files(teacher: Teacher | None) -> dict[str, str]:
    """Return the digest that lies beside a checkpoint; nothing without a teacher."""
    return {} if teacher is None else {TEACHER_FILE: teacher.digest + "\n"}


def _load(config: TrainConfig, classes: Sequence[str] | None) -> CLIP | Classifier:
    """Read the teacher and check that it can teach this run."""
    from navit.train.restore import load_model, load_trained  # they make tasks, which make teachers

    assert config.teacher is not None, "the caller checks it"
    try:
        trained = load_trained(config.teacher)
    except FileNotFoundError:
        model, known = load_model(config.teacher), None
    else:
        model, known = trained.model, trained.classes
    if known is not None and classes is not None and tuple(known) != tuple(classes):
        raise ValueError(
            f"the teacher must have the run's classes in their order; {config.teacher} was trained "
            "on other subfolders."
        )
    wanted = CLIP if config.task == "contrastive" else Classifier
    if isinstance(model, NaViT) or not isinstance(model, wanted):
        raise ValueError(
            f"the teacher of task {config.task!r} must be a {wanted.__name__}; {config.teacher} is "
            f"a {type(model).__name__}."
        )
    if isinstance(model, Classifier) and model.config.num_classes != config.num_classes:
        raise ValueError(
            f"the teacher must have the run's {config.num_classes} classes; it has "
            f"{model.config.num_classes}."
        )
    longest = config.packer.max_text_tokens
    if isinstance(model, CLIP) and model.config.text.max_tokens < longest:
        raise ValueError(
            f"packer.max_text_tokens must be at most the teacher's {model.config.text.max_tokens}; "
            f"got {longest}."
        )
    tower, packer = model.vision.config, config.packer
    one = isinstance(packer.patch_sizes, OnePatchSize) and packer.patch_size == tower.patch_size
    if tower.patch_buffer is None and not one and not isinstance(packer.token_drop, NoDrop):
        raise ValueError(
            f"a teacher with patches of {tower.patch_size} pixels alone must see whole images, to "
            "have them cut into its own patches; packer.token_drop drops some. Set "
            "packer.token-drop:no-drop, or take a flexible teacher."
        )
    return model


def _digest(model: torch.nn.Module) -> str:
    """Hash the weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
