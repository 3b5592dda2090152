"""The trainer's own settings, and :class:`Config`, which joins the settings of all packages: one field per section."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from outlast.checkpoint.config import CheckpointConfig
from outlast.comm.config import UPDATE_BETA1, UPDATE_CLIP_RMS, CommConfig
from outlast.config import require
from outlast.config_tables import Table
from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.page.config import PageConfig
from outlast.launch.config import LaunchConfig


def _require_default(config: Any, section: str, keys: tuple[str, ...], factory: str, instead: str) -> None:
    """Settings that a factory leaves no place for must not be set."""
    defaults = {one.name: one.default for one in fields(config)}
    for key in keys:
        value = getattr(config, key)
        require(value == defaults[key], f"{section}.{key}", value, f"not set, with {section}.{factory}: {instead}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """``[run]``: name, directory and seed of the run."""

    name: str = "run"
    """The run's name; its directory is ``runs/NAME`` unless ``dir`` is set."""
    dir: str | None = None
    """The run's directory."""
    resume: str = "never"
    """``never``: refuse a used directory. ``auto``: resume from the newest complete checkpoint, or start. ``STEP``:
    resume from that step's checkpoint; newer ones are kept as ``step_….aside-N``. A restart within a job always behaves
    as ``auto``."""
    start_from: str | None = None
    """Checkpoints, a path or any fsspec URL, whose parameters and buffers a new run begins with; optimizer, error
    feedback, data and step begin anew. A run that has a checkpoint of its own resumes from that, and from all of it."""
    start_step: int | None = None
    """With ``start_from``: the step; none takes the newest one that is undamaged."""
    start_strict: bool = True
    """With ``start_from``: the tensors must be those of the model. If false, those that fit by name and shape are
    taken, and the log names the others, a changed head for example, which begin as initialised."""
    seed: int = 0
    """Seeds the model's initial weights and the order of the data."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a name without '/'")
        ok = self.resume in ("auto", "never") or self.resume.isdecimal()
        require(ok, "run.resume", self.resume, "auto, never, or the number of a checkpointed step")
        require(self.start_from != "", "run.start_from", self.start_from, "a path or URL of checkpoints, or none")
        alone = self.start_from is None and (self.start_step is not None or not self.start_strict)
        require(not alone, "run.start_from", None, "set, with run.start_step or run.start_strict")
        least = self.start_step is None or self.start_step >= 0
        require(least, "run.start_step", self.start_step, "0 or more, or none for the newest")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "0 <= seed < 2**63")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``[model]``: a GPT, or what a factory makes."""

    factory: str | None = None
    """``package.module:name`` of a function or class that makes the model, called with ``[model.arguments]``; none:
    the built-in GPT. Looked for in the current folder and in that of the config file, too."""
    arguments: Table = field(default_factory=dict)
    """The factory's arguments, by name. A table with the key ``factory``, and ``arguments`` or not, is itself made so:
    ``config = {factory = "transformers:GPT2Config", arguments = {n_layer = 2}}``."""
    loss: str | None = None
    """``package.module:name`` of a class, made once with ``[model.loss_arguments]``, or of a function, to which the
    model's output and the target are passed. None: the model returns a loss, or an output that has one."""
    loss_arguments: Table = field(default_factory=dict)
    """The arguments of ``loss``, by name."""
    layers: int = 6
    """Transformer blocks."""
    heads: int = 6
    """Attention heads; divides ``width``."""
    width: int = 384
    """Width of the residual stream."""
    context: int = 256
    """Tokens per sequence of ``data.files``, whatever the model."""
    vocabulary: int = 256
    """How many different tokens there are; 256 are all bytes."""

    def __post_init__(self) -> None:
        if self.factory is not None:
            own = ("layers", "heads", "width", "vocabulary")
            _require_default(self, "model", own, "factory", "sizes are arguments of the factory")
        require(self.factory is not None or not self.arguments, "model.factory", None, "set, with [model.arguments]")
        needs = "set, with model.loss: the built-in GPT computes its own loss"
        require(self.loss is None or self.factory is not None, "model.factory", None, needs)
        require(self.loss is not None or not self.loss_arguments, "model.loss", None, "set, with model.loss_arguments")
        for key in ("layers", "heads", "width", "context", "vocabulary"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"a divisor of model.width = {self.width}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``[data]``: text files, read as bytes."""

    files: tuple[str, ...] = ("{stdlib}/**/*.py",)
    """Files or globs (``**`` descends). ``{stdlib}`` is the folder of Python's standard library."""
    held_out_files: tuple[str, ...] = ()
    """Files or globs for evaluation, in place of a share of ``files``."""
    format: Literal["text", "uint16", "uint32", "megatron"] = "text"
    """What the files hold: ``text``: bytes, each a token; ``uint16`` and ``uint32``: bare little-endian tokens, as
    nanoGPT writes them; ``megatron``: ``.bin`` files with their ``.idx`` beside them."""
    factory: str | None = None
    """``package.module:name`` of what makes a dataset, called with ``[data.arguments]``, and with those of ``split``
    (train, held_out), ``rank``, ``world_size``, ``seed`` and ``batch_size`` that it has arguments for. A map-style
    dataset is taken in our order; any iterable in its own. None: ``files``."""
    arguments: Table = field(default_factory=dict)
    """The factory's arguments, by name."""
    held_out_arguments: Table = field(default_factory=dict)
    """What is different in them for evaluation. Without any, and without an argument ``split``: a share of a map-style
    dataset is held out, and a stream is not evaluated."""
    collate: str | None = None
    """``package.module:name`` of a function from a list of samples to a batch; none: PyTorch's ``default_collate``."""
    exclude: tuple[str, ...] = ("*/site-packages/*", "*/dist-packages/*", "*/__pycache__/*")
    """Patterns of files to leave out (fnmatch, on the whole path)."""
    held_out_share: float = 0.05
    """Share of the files that are held out for evaluation, chosen by a hash of their names."""
    batch_size: int = 8
    """Sequences per rank and micro-batch."""
    form: Literal["pair", "transformers"] = "pair"
    """How a batch of ``files`` reaches the model. ``pair``: ``model(tokens, targets)``, targets one token ahead.
    ``transformers``: ``model(input_ids=tokens, labels=tokens)``, where the model itself looks one token ahead."""

    def __post_init__(self) -> None:
        if self.factory is not None:
            own = ("files", "held_out_files", "format", "form")
            _require_default(self, "data", own, "factory", "the factory reads the data")
        needs = "set, with data.arguments, data.held_out_arguments or data.collate"
        alone = self.factory is None and bool(self.arguments or self.held_out_arguments or self.collate)
        require(not alone, "data.factory", None, needs)
        require(len(self.files) > 0, "data.files", self.files, "at least one file or glob")
        require(0 < self.held_out_share < 1, "data.held_out_share", self.held_out_share, "0 < share < 1")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """``[optim]``: AdamW with linear warm-up and cosine decay, or what factories make."""

    factory: str | None = None
    """``package.module:name`` of a function or class that makes the optimizer, called with the list of parameters,
    ``lr`` and ``[optim.arguments]``; ``model`` is passed too if it has an argument of that name. None: AdamW."""
    arguments: Table = field(default_factory=dict)
    """The factory's arguments, by name."""
    scheduler: str | None = None
    """``package.module:name`` of a function or class that makes a scheduler, stepped after each update; called with the
    optimizer and ``[optim.scheduler_arguments]``; ``steps`` is passed too if it has an argument of that name."""
    scheduler_arguments: Table = field(default_factory=dict)
    """The scheduler's arguments, by name."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_share: float = 0.1
    """The learning rate at the last step, as a share of the peak."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; 1-D parameters have none."""
    beta1: float | None = None
    """Decay of the first moment. By default 0.9; with ``comm.target = "update"`` 0, because there the
    error-feedback residual acts as a momentum."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = None
    """Global norm to which averaged gradients are clipped; 0 clips nothing. By default 1; with
    ``comm.target = "update"`` 0, because there are no averaged gradients."""
    clip_rms: float = UPDATE_CLIP_RMS
    """With ``comm.target = "update"``: root mean square to which each tensor's update is clipped before the learning
    rate; 0 clips nothing."""

    def __post_init__(self) -> None:
        if self.factory is not None:
            instead = "write it under [optim.arguments], if it takes it"
            _require_default(self, "optim", ("weight_decay", "beta1", "beta2", "eps"), "factory", instead)
        require(self.factory is not None or not self.arguments, "optim.factory", None, "set, with [optim.arguments]")
        if self.scheduler is not None:
            instead = "the schedule is the scheduler's"
            _require_default(self, "optim", ("warmup_steps", "min_lr_share"), "scheduler", instead)
        alone = self.scheduler is None and bool(self.scheduler_arguments)
        require(not alone, "optim.scheduler", None, "set, with [optim.scheduler_arguments]")
        require(self.lr > 0, "optim.lr", self.lr, "lr > 0")
        require(0 <= self.min_lr_share <= 1, "optim.min_lr_share", self.min_lr_share, "0 <= share <= 1")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.beta1 is None or 0 <= self.beta1 < 1, "optim.beta1", self.beta1, "0 <= beta1 < 1")
        require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "0 <= beta2 < 1")
        require(self.eps > 0, "optim.eps", self.eps, "eps > 0")
        require(self.clip_rms >= 0, "optim.clip_rms", self.clip_rms, "0 or more")
        require(self.clip_norm is None or self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """``[trainer]``: the loop."""

    steps: int = 100
    """The last step, counted from 1 over all attempts."""
    accumulate: int = 1
    """Micro-batches per rank and step."""
    eval_every_steps: int = 50
    """Evaluate on held-out text every so many steps, and before the first and after the last; 0: only then."""
    eval_batches: int = 4
    """Micro-batches of held-out text per rank and evaluation."""
    log_every_steps: int = 10
    """Log a line on rank 0 every so many steps. Its ``|g|`` is the norm of the averaged gradient before clipping. With
    ``comm.target = "update"`` it is ``|u|``, the norm of the averaged update (Adam's direction, before the learning
    rate), of the order of the square root of the number of parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: autocast in forward and backward; parameters, gradients and optimizer state stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one, else CPU."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Of PyTorch's process group. ``auto``: NCCL for CUDA, gloo for CPU. With ``gloo`` several ranks may share a GPU,
    which NCCL refuses: a way to try things out, since gloo takes everything through the host's memory."""
    compile: bool = False
    """``torch.compile`` each block of the model, one compilation for all of them."""
    deterministic: bool = False
    """Only algorithms that give the same bits on every run (``torch.use_deterministic_algorithms``). What a CPU does is
    so in any case; on CUDA it costs speed, and a run that was interrupted ends bit-identical only with it."""
    engine: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """How the model is replicated or sharded: ``ddp``: replicated by DistributedDataParallel; ``fsdp2``: sharded by
    ``fully_shard``, see ``[fsdp]``; ``deepspeed``: as its JSON says, see ``[deepspeed]``."""
    bucket_mb: float = 25.0
    """Size of DDP's gradient buckets in MiB. Smaller ones start earlier and overlap more communication; larger ones
    compress at less cost, which is faster on few cores (docs/compression.md). The default is DDP's own."""
    find_unused_parameters: bool = False
    """With ``engine = "ddp"``: the loss need not depend on all parameters, which DDP otherwise takes for an error. It
    looks through the graph of each step for those."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank's device, for the MFU in the log. If not set, the log shows the achieved GFLOP/s."""
    timeout_s: float = 600.0
    """Timeout of the trainer's own collectives."""

    def __post_init__(self) -> None:
        for key in ("steps", "accumulate", "eval_batches", "log_every_steps"):
            require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "1 or more")
        require(self.eval_every_steps >= 0, "trainer.eval_every_steps", self.eval_every_steps, "0 or more")
        require(
            not (self.backend == "nccl" and self.device == "cpu"),
            "trainer.backend",
            self.backend,
            'auto or gloo with trainer.device = "cpu"',
        )
        ok = not self.find_unused_parameters or self.engine == "ddp"
        require(ok, "trainer.find_unused_parameters", True, 'false without trainer.engine = "ddp"')
        require(self.bucket_mb > 0, "trainer.bucket_mb", self.bucket_mb, "bucket_mb > 0")
        require(self.peak_tflops is None or self.peak_tflops > 0, "trainer.peak_tflops", self.peak_tflops, "> 0")
        require(self.timeout_s > 0, "trainer.timeout_s", self.timeout_s, "timeout_s > 0")


@dataclass(frozen=True, kw_only=True)
class FsdpConfig:
    """``[fsdp]``: for ``trainer.engine = "fsdp2"``."""

    mesh: tuple[int, ...] = ()
    """Empty: the model is sharded over all ranks. ``[COPIES, SHARDS]``: over SHARDS ranks that follow one another, in
    as many copies (HSDP); their product is the number of ranks."""
    blocks: tuple[str, ...] = ()
    """Names of the classes of modules that are sharded each for itself, so that their parameters are gathered one after
    another. Empty: what a transformers model says must not be split, else what stands in an ``nn.ModuleList``."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward and gather them again for the backward; False keeps them."""

    def __post_init__(self) -> None:
        ok = len(self.mesh) in (0, 2) and all(size >= 1 for size in self.mesh)
        require(ok, "fsdp.mesh", list(self.mesh), "empty, or [COPIES, SHARDS], each 1 or more")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """``[deepspeed]``: for ``trainer.engine = "deepspeed"``."""

    config: str | None = None
    """DeepSpeed's JSON, a path. Batch size, accumulation, clipping and optimizer are taken from the other settings
    where it leaves them out; where it has them they must agree."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; each field is a section of the TOML file, owned by the package of that name."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name, directory and seed of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """FSDP2's settings."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed's settings."""
    comm: CommConfig = field(default_factory=CommConfig)
    """Gradient compression."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    """Recording and reports."""
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    """The watch on the run's numbers: values that are not finite, spikes, replicas that differ, drift."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Metrics for Prometheus and others, under ``outlast launch``."""
    page: PageConfig = field(default_factory=PageConfig)
    """The report while the job runs, as a page, under ``outlast launch``."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Restarts and hang detection, under ``outlast launch``."""

    def __post_init__(self) -> None:
        if self.run.resume.isdecimal():
            step = int(self.run.resume)
            require(step <= self.trainer.steps, "run.resume", step, f"at most trainer.steps = {self.trainer.steps}")
        if self.comm.target == "update":
            rule = 'not set, or 0, with comm.target = "update", where there are no averaged gradients to clip'
            require(not self.optim.clip_norm, "optim.clip_norm", self.optim.clip_norm, rule)
            rule = 'not set with comm.target = "update", whose optimizer is Adam; with comm.target = "gradient", any'
            require(self.optim.factory is None, "optim.factory", self.optim.factory, rule)
        if self.trainer.engine != "fsdp2":
            rule = 'not set without trainer.engine = "fsdp2"'
            require(self.fsdp == FsdpConfig(), "fsdp", self.fsdp, rule)
        self._check_deepspeed()
        if self.model.factory is None:
            rule = 'pair, for the built-in GPT; "transformers" is for a model.factory'
            require(self.data.form == "pair", "data.form", self.data.form, rule)

    def _check_deepspeed(self) -> None:
        path = self.deepspeed.config
        if self.trainer.engine != "deepspeed":
            require(path is None, "deepspeed.config", path, 'not set without trainer.engine = "deepspeed"')
            return
        require(path is not None, "deepspeed.config", path, 'DeepSpeed\'s JSON, with trainer.engine = "deepspeed"')
        precision = "fp32 under DeepSpeed, whose JSON says it: bf16.enabled or torch_autocast"
        require(self.trainer.precision == "fp32", "trainer.precision", self.trainer.precision, precision)
        require(not self.trainer.compile, "trainer.compile", True, "false under DeepSpeed")
        begin = "none under DeepSpeed, which keeps copies of the parameters"
        require(self.run.start_from is None, "run.start_from", self.run.start_from, begin)

    @property
    def beta1(self) -> float:
        """``optim.beta1`` if set, else the default for ``comm.target``."""
        if self.optim.beta1 is None:
            return UPDATE_BETA1 if self.comm.target == "update" else 0.9
        return self.optim.beta1

    @property
    def clip_norm(self) -> float:
        """``optim.clip_norm`` if set, else the default for ``comm.target``; 0 clips nothing."""
        if self.optim.clip_norm is None:
            return 0.0 if self.comm.target == "update" else 1.0
        return self.optim.clip_norm
