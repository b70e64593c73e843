"""`TrainConfig`: one run, and the named runs as functions."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from navit.distill_loss import Divergence
from navit.label_loss import LabelLoss
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.model.corrupt import Corruption
from navit.train.optim import OptimConfig
from navit.train.parallel import ParallelConfig
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop
from packer.plan.resize import RandomCrop, UniformSide

Precision = Literal["auto", "bf16", "fp32"]
ContrastiveLoss = Literal["softmax", "sigmoid"]
Tower = Literal["vision", "text"]
TaskName = Literal["contrastive", "classify", "masked"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    task: TaskName = "contrastive"
    """"contrastive": image-text pairs; "classify": labelled images (a `.cls` in each sample);
    "masked": images alone, the tower of which is then given to another run as `init`."""
    corruption: Corruption = field(default_factory=Corruption)
    """Patches that "masked" corrupts and asks for (ViT, appendix B.1.2)."""
    num_classes: int = 0
    """Classes of "classify"; 0 counts the subfolders of a folder."""
    representation_size: int | None = None
    """Hidden size of the classifier's head (ViT, section 3.1: at pre-training); None: one linear
    layer."""
    contrastive_loss: ContrastiveLoss = "softmax"
    """Loss of "contrastive": CLIP's, each image among all texts and back; or SigLIP's, every pair
    by itself. "sigmoid" starts as SigLIP does (scale 10 without a bound, bias -10), unless
    `model.init_logit_bias` is set: then as `model` says."""
    label_loss: LabelLoss = "softmax"
    """Loss of "classify": over all classes, or one sigmoid a class (the paper's, for JFT)."""
    init: Path | None = None
    """Folder of weights the image tower starts from: saved here, or by transformers (SigLIP,
    SigLIP 2, CLIP); None starts at random. Its shape replaces that of `model.vision`, but for
    `model.vision.patch_buffer`, where that is set: the tower is made flexible."""
    init_grid: int | None = None
    """Side in patches the learned grid of `init` is resized to, corners aligned as ViT does to
    fine-tune at another resolution (arXiv:2010.11929, section 3.2); None leaves it as it is."""
    teacher: Path | None = None
    """A trained model to agree with (FlexiViT, section 3.5): a run folder, one of its checkpoints,
    or a folder of ``save_pretrained``. It may be larger, and of another patch size, than the
    student, which starts from its weights where `init` names it too."""
    distill_kl: Divergence = "forward"
    """"forward": KL(teacher || student), of the authors' code; "reverse": KL(student || teacher),
    as the paper prints it."""
    distill_weight: float = 1.0
    """The teacher's share of the loss; the rest is the task's own."""
    distill_temperature: float = 1.0
    """Divides the logits of both classifiers; similarities of pairs have their own multipliers."""
    freeze: tuple[Tower, ...] = ()
    """Towers that keep the weights of `init`; their projections to the common space learn on. With
    "text" `init` must be a CLIP, and the run starts from all of it: FlexiViT's FlexiLiT. "vision"
    with "classify" is a linear probe. (MFU counts a frozen tower's backward pass all the same, and
    not a teacher's forward pass.)"""
    shards: tuple[str, ...] = ()
    """Training shards: tar files or brace ranges; empty: the demonstration set, made if missing.
    To classify also a folder with one subfolder a class, for "masked" any folder of images."""
    val: tuple[str, ...] = ()
    """Validation shards; empty with `shards`: no evaluation."""
    run: Path | None = None
    """Run folder; None numbers a new one below runs/."""
    resume: bool = False
    """Continue from the newest checkpoint of `run` (None: of the newest run)."""
    packer: PackerConfig = field(default_factory=PackerConfig)
    """What is done to every image."""
    model: CLIPConfig = field(default_factory=CLIPConfig)
    """Both towers; patch size, text length and vocabulary follow `packer` and the tokenizer."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How a step is shared by ranks and by batches one after another."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    sequences_per_batch: int = 16
    """B: sequences of `packer.seq_len` tokens a step."""
    workers: int = 1
    """DataLoader workers; 0 loads in the training process."""
    shuffle_window: int = 1024
    """Samples among which a stream draws its next one."""
    num_streams: int | None = None
    """Logical streams the shards are dealt to, fixed for a run: at least the largest number of
    ranks it may go on with; None: ranks x max(workers, 1) of the first start."""
    flip: float = 0.0
    """Probability of a horizontal flip; 0 where captions speak of left and right."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    loss_chunk: int | None = None
    """Side of a tile of the contrastive loss; None: 512 on a CPU, 4,096 on a GPU."""
    ema_decay: float = 0.995
    """Decay of the averaged weights that are evaluated and exported; 0 turns averaging off."""
    compile: bool = False
    """Compile the towers (`NaViT.compile`): for GPUs; the first steps take a minute or two."""
    precision: Precision = "auto"
    """Autocast: "auto" is bf16 on CUDA and on CPUs with bf16 instructions."""
    device: str = "auto"
    """"auto" is CUDA where there is one."""
    tokenizer: Path | None = None
    """A tokenizer.json; None trains a byte-level BPE on the captions."""
    vocab_size: int = 8192
    """Largest vocabulary of a trained tokenizer."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end alone."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_bad_losses: int = 10
    """Steps in a row with a loss that is not finite after which the run ends."""
    time_limit: float | None = None
    """Minutes after which the run saves and ends as on SIGTERM; None: no limit."""
    seed: int = 0
    """Seed of the weights; the data's is `packer.seed`."""

    def __post_init__(self) -> None:
        positive = ("steps", "sequences_per_batch", "shuffle_window", "vocab_size")
        for name in (*positive, "checkpoint_every", "keep_checkpoints", "max_bad_losses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("workers", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")
        for name in ("num_streams", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, or None; got {self.time_limit}.")
        for name in ("flip", "color_jitter", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}.")
        if self.task not in get_args(TaskName):
            raise ValueError(
                f"task must be 'contrastive', 'classify' or 'masked'; got {self.task!r}."
            )
        if self.task == "masked" and (self.teacher is not None or self.freeze):
            raise ValueError(
                "task 'masked' trains the image tower by itself: it takes no teacher and freezes "
                f"nothing; got teacher={self.teacher} and freeze={self.freeze}. Leave them out."
            )
        if self.contrastive_loss not in get_args(ContrastiveLoss):
            raise ValueError(
                f"contrastive_loss must be 'softmax' or 'sigmoid'; got {self.contrastive_loss!r}."
            )
        if self.label_loss not in get_args(LabelLoss):
            raise ValueError(f"label_loss must be 'softmax' or 'sigmoid'; got {self.label_loss!r}.")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision must be 'auto', 'bf16' or 'fp32'; got {self.precision!r}.")
        if self.compile and self.parallel.strategy == "fsdp2":
            raise ValueError(
                "compile needs parallel.strategy 'ddp' or 'auto': FSDP2 gathers weights by hooks "
                "inside the towers, which one graph cannot hold. Leave out one of the two."
            )
        if self.freeze and self.init is None:
            raise ValueError(
                f"freeze keeps trained weights, which init must name; got {self.freeze} without "
                "init. Give --init."
            )
        if self.freeze and self.task == "contrastive" and {"vision", "text"} <= set(self.freeze):
            raise ValueError("freeze must leave one of the towers to learn; got both.")
        if "text" in self.freeze and self.task != "contrastive":
            raise ValueError(f"freeze 'text' needs a text tower; task {self.task!r} has none.")
        if self.distill_kl not in get_args(Divergence):
            raise ValueError(f"distill_kl must be 'forward' or 'reverse'; got {self.distill_kl!r}.")
        if not 0 < self.distill_weight <= 1 or not self.distill_temperature > 0:
            raise ValueError(
                "distill_weight must be in (0, 1] and distill_temperature positive; got "
                f"{self.distill_weight} and {self.distill_temperature}. Leave out teacher to learn "
                "without one."
            )
        unknown = sorted(set(self.freeze) - set(get_args(Tower)))
        if unknown:
            raise ValueError(f"freeze must hold 'vision' or 'text'; got {unknown}.")
        if self.init_grid is not None and (self.init is None or self.init_grid < 1):
            raise ValueError(
                "init_grid resizes the positions of the weights in init: it must be positive, and "
                f"init given; got {self.init_grid} and {self.init}."
            )
        if self.val and not self.shards:
            raise ValueError(
                "val needs shards: the demonstration set brings its own validation shard. Give "
                "--shards too."
            )


def small_clip() -> CLIPConfig:
    """Return two towers of 1.3 and 0.6 million weights beside the vocabulary, for minutes on a CPU.

    Mean pooling, not the paper's attention pooling: in runs of a few hundred steps it learned
    faster (docs/experiments.md).
    """
    width, num_heads = 160, 5
    shape = {"width": width, "num_heads": num_heads, "mlp_dim": 4 * width}
    return CLIPConfig(
        vision=NaViTConfig.from_dict({**shape, "depth": 4, "pool": "mean"}),
        text=TextConfig.from_dict({**shape, "depth": 2, "pool": "mean"}),
        embed_dim=width,
    )


def demo() -> TrainConfig:
    """Train on the demonstration set: about 4 minutes on 2 CPU cores."""
    return TrainConfig(
        packer=PackerConfig(
            patch_size=8, seq_len=512, max_tokens=100, token_drop=ConstantDrop(0.3)
        ),
        model=small_clip(),
        optim=OptimConfig(
            learning_rate=3e-3, muon_learning_rate=8e-3, warmup_steps=20, cooldown_steps=130
        ),
        steps=260,
        sequences_per_batch=22,
        ema_decay=0.98,
        eval_every=65,
    )


def classify() -> TrainConfig:
    """Train a classifier on labelled images, from scratch or from --init: a start to change."""
    return TrainConfig(
        task="classify",
        packer=PackerConfig(
            patch_size=16,
            seq_len=1024,
            max_tokens=256,
            resolution=UniformSide(64, 256),
            token_drop=BetaDrop(0.25, 0.4),
        ),
        model=CLIPConfig(vision=NaViTConfig.named("s")),
        sequences_per_batch=16,
        steps=10_000,
        optim=OptimConfig(warmup_steps=500, cooldown_steps=2000),
        eval_every=2000,
        flip=0.5,
    )


def masked() -> TrainConfig:
    """Pre-train the image tower on the demonstration set, without captions: about 2 minutes."""
    config = demo()
    return replace(
        config,
        task="masked",
        packer=replace(config.packer, token_drop=NoDrop()),
        steps=200,
        eval_every=50,
        optim=replace(config.optim, cooldown_steps=100),
    )


def pairs() -> TrainConfig:
    """Train on a few thousand web-like pairs: about 18 minutes on 2 CPU cores."""
    return TrainConfig(
        packer=PackerConfig(
            patch_size=8,
            seq_len=512,
            max_tokens=100,
            resolution=UniformSide(40, 80),
            crop=RandomCrop(0.25, 1.4),
            token_drop=BetaDrop(0.5, 0.8),
        ),
        model=small_clip(),
        optim=OptimConfig(
            learning_rate=2e-3,
            muon_learning_rate=8e-3,
            weight_decay=0.5,
            warmup_steps=20,
            cooldown_steps=600,
        ),
        steps=1000,
        sequences_per_batch=20,
        ema_decay=0.99,
        eval_every=250,
        flip=0.5,
        color_jitter=0.4,
    )


PRESETS = {"demo": demo, "pairs": pairs, "classify": classify, "masked": masked}
