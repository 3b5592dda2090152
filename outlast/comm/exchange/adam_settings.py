"""What a reducer takes from the user's own Adam or AdamW, and what of it cannot be followed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Adam as TorchAdam
from torch.optim import Optimizer

from outlast.comm.config import UPDATE_BETA1, UPDATE_CLIP_RMS, CommConfig
from outlast.comm.direction import Adam, Direction
from outlast.errors import CommError

_SGD = "or attach without optimizer=, and step with torch.optim.SGD"
_INIT_GROUP = (
    "self",
    "group",
    "params_with_grad",
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "state_steps",
)


class Constants(NamedTuple):
    """Of Adam, the same in all groups of an optimizer."""

    beta1: float
    beta2: float
    eps: float


def refuse_optimizer(optimizer: Any) -> None:
    """An optimizer whose step cannot be made to apply averaged updates.

    Raises:
        CommError: it is no Adam or AdamW of torch's, or a subclass that makes steps of its own.
    """
    kind = type(optimizer)
    if not isinstance(optimizer, TorchAdam):
        raise CommError(
            f"attach: the optimizer is {kind.__module__}.{kind.__name__}, and only torch.optim.AdamW and Adam can be "
            'kept with target = "update"',
            f"hand over one of these, {_SGD}; any optimizer goes with target = 'gradient', without optimizer=",
        )
    for method in ("step", "_init_group"):
        if inspect.unwrap(getattr(kind, method)) is not inspect.unwrap(getattr(TorchAdam, method)):
            raise CommError(
                f"attach: {kind.__name__} has a {method}() of its own, so what it does with an averaged update is not "
                "known",
                f"use torch.optim.AdamW itself, {_SGD}",
            )
    if tuple(inspect.signature(TorchAdam._init_group).parameters) != _INIT_GROUP:
        raise CommError(
            "attach: torch.optim.Adam is not built as outlast knows it (another _init_group)",
            f"use a torch that outlast is tested with, 2.11 or 2.13, {_SGD}",
        )


def constants_of(groups: Mapping[int, Mapping[str, Any]]) -> Constants:
    """The constants of those of an optimizer's groups that have parameters of the reducer.

    Args:
        groups: some of ``param_groups``, of an optimizer or of its state dict, by number.

    Raises:
        CommError: groups differ in them, or have a setting that an averaged update cannot follow.
    """
    found: Constants | None = None
    first = 0
    for index, group in groups.items():
        _refuse_group(index, group)
        beta1, beta2 = map(float, group["betas"])
        here = Constants(beta1, beta2, float(group["eps"]))
        if found is not None and here != found:
            raise CommError(
                f"the optimizer's groups differ: group {first} has betas = ({found.beta1:g}, {found.beta2:g}) and "
                f"eps = {found.eps:g}, group {index} ({here.beta1:g}, {here.beta2:g}) and {here.eps:g}; the reducer "
                "has one Adam for all",
                "give all groups the same betas and eps; lr and weight_decay may differ",
            )
        if found is None:
            found, first = here, index
    if found is None:
        raise CommError(
            "the optimizer has none of the model's parameters",
            "make it with the parameters of the model that is attached, once that is complete",
        )
    return found


def _refuse_group(index: int, group: Mapping[str, Any]) -> None:
    lacks = [name for name in ("betas", "eps") if name not in group]
    if lacks:
        raise CommError(
            f"group {index} has no {' and no '.join(lacks)}: it is not of Adam or AdamW", "load a state dict of AdamW"
        )
    for name, instead in (
        ("amsgrad", "leave it out"),
        ("maximize", "minimise the negative loss"),
        ("capturable", "leave it out: the exchange cannot be captured in a graph"),
        ("differentiable", "leave it out"),
    ):
        if group.get(name):
            raise CommError(
                f"group {index} of the optimizer has {name} = True, which an averaged update cannot follow", instead
            )
    decay = float(group.get("weight_decay", 0.0))
    if decay and not group.get("decoupled_weight_decay", False):
        raise CommError(
            f"group {index} of the optimizer is Adam's with weight_decay = {decay:g}, which it would add to each "
            "gradient ahead of the moments, where no averaged gradient exists",
            "use torch.optim.AdamW, whose decay is applied to the weights, or weight_decay = 0",
        )


class Followed:
    """The directions that follow an optimizer's constants.

    What is compressed has beta1 = 0, because what error feedback holds back acts as a momentum already (see
    :data:`UPDATE_BETA1`); where nothing is compressed, beta1 is the optimizer's. beta2 and eps are the optimizer's, and
    ``clip_rms`` is 1.

    Args:
        constants: of the optimizer.
        direction: the caller's own; its beta1 and clip_rms count, and the rest must be the optimizer's.
        dense_direction: the same where nothing is compressed.

    Raises:
        CommError: a direction that is no Adam, or contradicts the optimizer.
    """

    def __init__(
        self, constants: Constants, direction: Direction | None = None, dense_direction: Direction | None = None
    ) -> None:
        of_all = {"eps": constants.eps, "beta2": constants.beta2, "clip_rms": UPDATE_CLIP_RMS}
        self._given = [_adam(given) for given in (direction, dense_direction) if given is not None]
        self.compressed = Adam(beta1=UPDATE_BETA1, **of_all) if direction is None else _adam(direction)
        """Where something is compressed."""
        dense = dense_direction or direction
        self.dense = Adam(beta1=constants.beta1, **of_all) if dense is None else _adam(dense)
        """Where nothing is."""
        self.follow(constants)

    def of(self, config: CommConfig) -> Adam:
        """The one for reducers that have only one."""
        return self.dense if config.compressor == "dense" else self.compressed

    def check(self, constants: Constants) -> None:
        """Whether the directions can follow.

        Raises:
            CommError: they cannot.
        """
        for given in self._given:
            if (given.beta2, given.eps) != (constants.beta2, constants.eps):
                raise CommError(
                    f"the optimizer has beta2 = {constants.beta2:g} and eps = {constants.eps:g}, the direction beta2 = "
                    f"{given.beta2:g} and eps = {given.eps:g}",
                    "give both the same; beta1 and clip_rms are the direction's to say",
                )
        if self.dense not in self._given and bool(constants.beta1) != ("m" in self.dense.slots):
            raise CommError(
                f"the optimizer's beta1 has become {constants.beta1:g}, and was {self.dense.beta1:g} at attach(): with "
                "0 there is no first moment",
                "close() the reducer and attach() again",
            )

    def follow(self, constants: Constants) -> None:
        """Take the optimizer's constants, from the next gradient on.

        Raises:
            CommError: see :meth:`check`.
        """
        self.check(constants)
        for each in (self.compressed, self.dense):
            each.beta2, each.eps = constants.beta2, constants.eps
        if self.dense not in self._given:
            self.dense.beta1 = constants.beta1


def followed(
    optimizer: Optimizer | None,
    config: CommConfig,
    params: Collection[Tensor],
    direction: Direction | None = None,
    dense_direction: Direction | None = None,
) -> Followed | None:
    """The directions of an optimizer that is kept; None if there is none.

    Args:
        optimizer: the user's.
        config: of the reducer.
        params: of the reducer.
        direction: see :class:`Followed`.
        dense_direction: see :class:`Followed`.

    Raises:
        CommError: it cannot be kept: what it is, how it is set, or what the reducer averages.
    """
    if optimizer is None:
        return None
    if config.target != "update":
        raise CommError(
            f'attach: optimizer= is for target = "update"; with comm.target = {config.target!r} (compressor = '
            f"{config.compressor!r}) any optimizer steps as it would without outlast",
            'leave out optimizer=, or set target = "update"',
        )
    if config.ranks_per_node != 1:
        raise CommError(
            f"attach: optimizer= with comm.ranks_per_node = {config.ranks_per_node}: each rank has Adam's moments of a "
            "slice alone, so the optimizer would have no state of its own to show",
            f"set ranks_per_node = 1, {_SGD}",
        )
    refuse_optimizer(optimizer)
    known = {id(param) for param in params}
    mine = {i: g for i, g in enumerate(optimizer.param_groups) if any(id(p) in known for p in g["params"])}
    return Followed(constants_of(mine), direction, dense_direction)


def _adam(direction: Direction) -> Adam:
    if not isinstance(direction, Adam):
        raise CommError(
            f"attach: optimizer= with a direction that is {type(direction).__name__}: its moments are not the "
            "optimizer's",
            "make it outlast.comm.direction.Adam, or leave out optimizer=",
        )
    return direction
