"""Settings of gradient exchange, section ``[comm]``. Reads no torch, so that a config can be checked without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from outlast.config import nearest, require
from outlast.errors import OutOfRange, UnknownCompressor

CompressorName = Literal["topk", "block-topk", "randk", "sign", "int8", "int4", "natural", "lowrank", "gear", "dense"]
FeedbackName = Literal["ef14", "ef21", "ef21-sgdm", "ef21-bc", "econtrol", "none"]
Values = Literal["fp32", "fp16", "bf16", "int8", "int4", "natural", "sign"]
Selection = Literal["auto", "exact", "sampled"]
Target = Literal["auto", "gradient", "update"]
Residual = Literal["full", "int8"]
Transport = Literal["auto", "all-gather", "two-phase"]

COMPRESSORS: tuple[CompressorName, ...] = get_args(CompressorName)
FEEDBACKS: tuple[FeedbackName, ...] = get_args(FeedbackName)
"""The methods that a config can name; :data:`outlast.comm.feedback.METHODS` has more."""
VALUES: tuple[Values, ...] = get_args(Values)
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
RESIDUALS: tuple[Residual, ...] = get_args(Residual)

UPDATE_BETA1 = 0.0
"""Adam's beta1 where its direction is compressed. What error feedback holds back acts as a momentum, and a second one
lags: on the GPT of docs/compression.md (seed 0, clip_rms 0) a loss of 2.60 takes 75 steps with 0, 95 with 0.5."""

UPDATE_CLIP_RMS = 1.0
"""A direction with a larger root mean square than this is scaled down to it. Without a first moment, nothing else damps
an outsized gradient. The same GPT takes 76 steps to 2.60 with it and 98 without (seed 1), or 82 and 75 (seed 0)."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How gradients are averaged over ranks.

    Raises:
        UnknownCompressor: there is no such ``compressor`` or ``feedback``; names the nearest one that exists.
        OutOfRange: a value or combination that is not allowed.
    """

    compressor: Literal["auto", CompressorName] = field(default="topk", metadata={"unknown": UnknownCompressor})
    """``topk`` sends the largest entries of each tensor, ``block-topk`` the largest of each block of it, ``randk``
    random ones; ``sign``, ``int8``, ``int4`` and ``natural`` all of them in few bits; ``lowrank`` a product of two thin
    matrices; ``gear`` few bits, low rank and outliers; ``dense`` everything.
    ``auto`` sends the first steps dense and measures links and codecs. It then takes what it predicts to be fastest:
    dense, or one of a few methods whose cost in loss is small."""
    feedback: FeedbackName = field(default="ef14", metadata={"unknown": UnknownCompressor})
    """What happens to what is not sent: ``ef14``, ``ef21``, ``ef21-sgdm``, ``econtrol``, or ``ef21-bc``, which is ef21
    in the two-phase transport. Unused when dense. With ``target = "update"`` take ``ef14``: the others are trackers,
    and keep applying a direction long after it has changed.
    ``none`` drops it, which diverges, and is refused."""
    density: float = 0.01
    """Share of a tensor's entries that topk, block-topk, randk and gear's outliers send, 0 < density <= 1:
    k = ceil(density * numel)."""
    values: Values = "int8"
    """How the numbers that topk, block-topk, randk, lowrank and gear send are written: ``fp32``, ``fp16``, ``bf16``,
    ``int8``, ``int4``, ``natural`` (powers of two) or ``sign``. Rounding is fed back like all that is not sent."""
    rank: int = 4
    """Columns of the thin matrices of lowrank and gear."""
    block: int = 0
    """Entries of a block: of block-topk (0: 1 / density), and those that share a scale in int8 (0: 256), int4 and gear
    (0: 32) and sign (0: the whole tensor)."""
    selection: Selection = "auto"
    """How the k largest entries are found. All three send the same bytes: ``exact`` ranks the whole tensor,
    ``sampled`` ranks only the entries above a threshold estimated from a sample, ``auto`` samples large tensors."""
    warmup_steps: int = 0
    """Steps 1 .. warmup_steps send whole tensors. The trackers (ef21, ef21-sgdm, econtrol) send their first message
    whole in any case."""
    eta: float | None = None
    """Strength of the method. ef21-sgdm: weight of the new gradient in the momentum, 0 < eta <= 1, default 0.1.
    econtrol: weight of the accumulated error, 0 < eta <= min(2 * alpha, 0.5), default min(alpha, 0.5), where alpha is
    the density of topk, block-topk and randk, 2 / pi of sign, and what the compressor guarantees of the others.
    ef14 and ef21 have none."""
    target: Target = "auto"
    """What is averaged: ``update``, the direction in which Adam would take this rank's gradient, or ``gradient``. With
    ``update`` the optimizer is an AdamW that the reducer is given, or ``torch.optim.SGD``; with ``gradient`` any, but
    Adam lags behind compressed gradients.
    ``auto`` becomes ``update``, or with ``compressor = "dense"`` ``gradient``."""
    residual: Residual = "full"
    """How ef14 keeps what was not sent: ``full``, in fp32, or ``int8``, in a quarter of the memory."""
    probe_every_steps: int = 10
    """Steps between measurements of what compression loses (a few passes over the gradients); 0 measures nothing."""
    resync_every_steps: int = 1000
    """Steps between dense exchanges that replace the running means of what ranks track (ef21, econtrol), which drift by
    rounding, by exact ones; 0: never."""
    transport: Transport = "all-gather"
    """How messages become a mean. ``all-gather``: every rank's message to every rank, (n - 1) messages sent by each.
    ``two-phase``: each rank sums one slice, compresses the sum and sends it to all, 2 (n - 1) / n messages sent by
    each. ``auto`` takes whichever sends fewer bytes."""
    ranks_per_node: int = 1
    """Ranks that share fast links: their gradients are averaged densely, and only the averages are compressed between
    nodes. Neighbours in rank order belong to one node. 1: every rank compresses its own."""
    dense_below: int = 4096
    """Tensors with fewer entries than this, and all tensors with one dimension, are sent whole."""
    timeout_s: float = 600.0
    """A collective that has not finished after this many seconds fails."""

    def __post_init__(self) -> None:
        choices: list[tuple[str, str, tuple[str, ...]]] = [
            ("compressor", self.compressor, ("auto", *COMPRESSORS)),
            ("feedback", self.feedback, FEEDBACKS),
            ("target", self.target, get_args(Target)),
            ("transport", self.transport, get_args(Transport)),
            ("values", self.values, VALUES),
            ("selection", self.selection, SELECTIONS),
            ("residual", self.residual, RESIDUALS),
        ]
        for key, value, known in choices:
            if value in known:
                continue
            if key in ("compressor", "feedback"):
                raise UnknownCompressor(f"comm.{key} = {value!r}: there is no such {key}", nearest(value, known))
            raise OutOfRange(f"comm.{key} = {value!r} is not known", nearest(value, known))
        if self.target == "auto":
            object.__setattr__(self, "target", "gradient" if self.compressor == "dense" else "update")
        require(self.rank >= 1, "comm.rank", self.rank, "rank >= 1")
        require(self.probe_every_steps >= 0, "comm.probe_every_steps", self.probe_every_steps, "0 or more")
        require(self.resync_every_steps >= 0, "comm.resync_every_steps", self.resync_every_steps, "0 or more")
        require(self.block >= 0, "comm.block", self.block, "block >= 0")
        require(self.ranks_per_node >= 1, "comm.ranks_per_node", self.ranks_per_node, "ranks_per_node >= 1")
        require(0 < self.density <= 1, "comm.density", self.density, "0 < density <= 1")
        require(self.warmup_steps >= 0, "comm.warmup_steps", self.warmup_steps, "warmup_steps >= 0")
        require(self.dense_below >= 0, "comm.dense_below", self.dense_below, "dense_below >= 0")
        require(0 < self.timeout_s < 1e6, "comm.timeout_s", self.timeout_s, "0 < timeout_s < 1e6")
        if self.compressor == "dense":
            return
        if self.feedback == "none":
            raise OutOfRange(
                f"comm.feedback = 'none' with comm.compressor = {self.compressor!r}: it diverges",
                "use feedback = 'ef21', 'ef21-sgdm', 'econtrol' or 'ef14', or compressor = 'dense'",
            )
        if self.feedback == "ef21-bc":
            rule = '"two-phase" with feedback = "ef21-bc", which is ef21 whose owners compress again'
            require(self.transport == "two-phase", "comm.transport", self.transport, rule)
        if self.residual != "full":
            require(self.feedback == "ef14", "comm.residual", self.residual, '"full", or feedback = "ef14"')
        if self.eta is not None:
            self._check_eta(self.eta)

    def _check_eta(self, eta: float) -> None:
        if self.feedback == "ef21-sgdm":
            require(0 < eta <= 1, "comm.eta", eta, "0 < eta <= 1 with feedback = 'ef21-sgdm'")
        elif self.feedback == "econtrol":
            sparse = self.compressor in ("topk", "block-topk", "randk")  # of others the compressor itself knows
            rule, limit = ("min(2 * density, 0.5) = ", min(2 * self.density, 0.5)) if sparse else ("", 0.5)
            require(
                0 < eta <= limit,
                "comm.eta",
                eta,
                f"0 < eta <= {rule}{limit:g} with feedback = 'econtrol'; it is unstable above",
            )
        else:
            require(False, "comm.eta", eta, f"unset: feedback = {self.feedback!r} has no eta")

    def describe(self) -> str:
        """The method in words, e.g. ``ef21 topk 5%``; ``dense`` when nothing is compressed."""
        if self.compressor == "dense":
            return "dense" if self.target == "gradient" else "dense updates"
        if self.compressor == "auto":
            return f"auto of {self.target}s"
        amounts = {"topk": self.density, "block-topk": self.density, "randk": self.density}
        what: str = self.compressor
        if what in amounts:
            what += f" {100 * amounts[what]:g}%"
        if what in ("lowrank", "gear"):
            what += f" {self.rank}"
        if what != self.compressor and self.values != "fp32":
            what += f" {self.values}"
        extra = [] if self.target == "gradient" else ["of updates"]
        extra += [] if self.transport == "all-gather" else [self.transport]
        extra += [] if self.ranks_per_node == 1 else [f"{self.ranks_per_node} ranks a node"]
        return ", ".join([f"{self.feedback} {what}", *extra]).replace(", of updates", " of updates")


def two_phase(config: CommConfig, n: int) -> bool:
    """Whether ``n`` ranks exchange messages in two phases: if the config says so, or with ``auto`` if that sends fewer
    bytes, 2 (n - 1) / n messages instead of n - 1."""
    return n > 1 and (config.transport == "two-phase" or (config.transport == "auto" and n > 2))
