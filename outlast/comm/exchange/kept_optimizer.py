"""The user's own Adam or AdamW, whose steps apply what was averaged: ``x -= lr * (direction + weight_decay * x)``.

The moments are the reducer's, and move in backward. The object stays: its groups say lr and weight decay at every step,
hooks, schedulers, closures and a GradScaler find it as it was, and ``state_dict()`` and ``load_state_dict()`` show and
take the reducer's moments. Two methods of the *object* are replaced until :meth:`KeptOptimizer.release`. One is
``_init_group``, through which a step collects what a group's parameters, gradients and moments are: in its place the
group's averaged parameters are moved, and left out of what is collected; the others are the optimizer's own as before.
The other one, ``__getstate__``, gives copies the moments, which are AdamW by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from outlast.comm.exchange.adam_settings import Followed, constants_of
from outlast.comm.state.adam_moments import AdamState, Moments
from outlast.errors import CommError, CommStateMismatch

_SLOTS = AdamState._fields


class KeptOptimizer:
    """An optimizer that a reducer has.

    Args:
        optimizer: the user's, which has passed :func:`check_optimizer`.
        moments: where the reducer keeps them. What the optimizer has of them is taken over.
        directions: follow the optimizer's constants.
        settle: waits until the moments are those of the last step; raises if the reducer has failed.
        step: the step that the reducer is at.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        moments: Moments,
        directions: Followed,
        settle: Callable[[], None],
        step: Callable[[], int],
    ) -> None:
        self.optimizer = optimizer
        self._moments = moments
        self._directions = directions
        self._settle = settle
        self._step = step
        self._loaded_at: int | None = None
        self._given: dict[Tensor, Mapping[str, Any]] = {}
        for param in self._mine():
            state = optimizer.state.pop(param, None)
            if state:
                moments.write(param, _adam_state(state))
        self._init_group: Callable[..., bool] = optimizer._init_group  # type: ignore[attr-defined]
        vars(optimizer).update(_init_group=self._apply, __getstate__=self._whole_state)
        self._handles = [
            optimizer.register_state_dict_pre_hook(self._show),
            optimizer.register_state_dict_post_hook(self._hide),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def before_step(self) -> None:
        """The optimizer is about to make a step: follow what its groups say.

        Raises:
            CommError: they say what cannot be followed; nothing has been changed.
        """
        self._directions.follow(constants_of(self._groups(self.optimizer.param_groups)))

    def reducer_loaded(self) -> None:
        """The reducer's own state was loaded. It is exact, so until the next step an optimizer's state dict does not
        replace it, in whichever order the two are loaded."""
        self._loaded_at = self._step()

    def own_state_dict(self) -> dict[str, Any]:
        """A state dict of the optimizer without the reducer's moments: its groups, and the state of parameters that are
        not the reducer's."""
        groups: list[dict[str, Any]] = []
        state: dict[int, Any] = {}
        number = 0
        for group in self.optimizer.param_groups:
            numbers = range(number, number + len(group["params"]))
            number = numbers.stop
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": list(numbers)})
            mine = zip(numbers, group["params"], strict=True)
            state |= {i: self.optimizer.state[p] for i, p in mine if self.optimizer.state.get(p)}
        return {"state": state, "param_groups": groups}

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Whether it could be loaded.

        Raises:
            CommError: its groups are not the optimizer's, or cannot be followed.
        """
        given, own = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self._own_groups))
        if given != own:
            raise CommStateMismatch(
                f"the checkpoint's optimizer has groups of {given} parameters, this one of {own}",
                "make the optimizer's groups as they were when it was saved",
            )
        self._directions.check(constants_of(self._groups(state_dict["param_groups"])))

    def load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`own_state_dict` was; the moments stay as they are.

        Raises:
            CommError: see :meth:`check_state_dict`.
        """
        self.check_state_dict(state_dict)
        self.reducer_loaded()
        self.optimizer.load_state_dict(state_dict)

    def release(self) -> None:
        """Give the optimizer back as it was, with the moments. Doing so twice is harmless."""
        if vars(self.optimizer).pop("_init_group", None) is None:
            return
        del vars(self.optimizer)["__getstate__"]
        for handle in self._handles:
            handle.remove()
        for param in self._mine():
            state = self._moments.read(param)
            if state is not None:
                own = self._as_shown(param, state)
                own |= {slot: own[slot].to(param.dtype) for slot in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = own

    def _mine(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [param for param in chain.from_iterable(g["params"] for g in groups) if self._moments.has(param)]

    def _groups(self, groups: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Those of ``groups``, of the optimizer or of a state dict, that have parameters of the reducer."""
        own = self._own_groups
        return {i: group for i, group in enumerate(groups[: len(own)]) if any(map(self._moments.has, own[i]["params"]))}

    @property
    def _own_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _apply(self, group: dict[str, Any], *collected: list[Tensor]) -> bool:
        """In place of ``_init_group``: move this group's averaged parameters, and collect the others."""
        if torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None:
            raise CommError(
                "torch.compile traces the step of an optimizer that applies averaged updates, and would apply this one "
                "again and again",
                "compile the model, not optimizer.step(); it is one fused operation a group",
            )
        averaged = [p for p in group["params"] if p.grad is not None and self._moments.has(p)]
        others = [p for p in group["params"] if not self._moments.has(p)]
        optimizer = self.optimizer
        if averaged:
            sgd(
                [_own(p) for p in averaged],
                [_own(p.grad) for p in averaged if p.grad is not None],
                [None] * len(averaged),
                foreach=group["foreach"],
                fused=group["fused"],
                grad_scale=getattr(optimizer, "grad_scale", None),
                found_inf=getattr(optimizer, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=0.0,
                lr=float(group["lr"]),
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        return self._init_group({**group, "params": others}, *collected) if others else False

    def _show(self, optimizer: Optimizer) -> None:
        self._settle()
        for param in self._mine():
            state = self._moments.read(param)
            if state is not None:
                optimizer.state[param] = self._as_shown(param, state)

    def _hide(self, optimizer: Optimizer, state_dict: dict[str, Any] | None = None) -> None:
        for param in self._mine():
            optimizer.state.pop(param, None)

    def _whole_state(self) -> dict[str, Any]:
        """What a copy is made of."""
        self._show(self.optimizer)
        try:
            whole = type(self.optimizer).__getstate__(self.optimizer)
            return {**whole, "state": self.optimizer.state.copy()}
        finally:
            self._hide(self.optimizer)

    def _as_shown(self, param: Tensor, state: AdamState) -> dict[str, Tensor]:
        """As this optimizer would have it: its step is on the CPU unless it is fused, which is said once for all."""
        fused = self.optimizer.defaults["fused"]
        shown = {**state._asdict(), "step": state.step if fused else state.step.to("cpu", copy=True)}
        if param.layout == torch.strided and not param.is_contiguous():
            # torch's fused kernels go through memory, and take it for granted that all have the parameter's format.
            shown |= {slot: torch.empty_like(param).copy_(shown[slot]) for slot in ("exp_avg", "exp_avg_sq")}
        return shown

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse what does not fit before anything is changed."""
        self._settle()
        self._directions.check(constants_of(self._groups(state_dict["param_groups"])))
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        # Other groups than the optimizer's are torch's to refuse, so here the shorter of the two counts.
        given = {param: state_dict["state"].get(number) for number, param in zip(numbers, params, strict=False)}
        self._given = {param: state for param, state in given.items() if state and self._moments.has(param)}
        _check_state(self._given)

    def _after_load(self, optimizer: Optimizer) -> None:
        given, self._given = self._given, {}
        exact = self._loaded_at is not None and self._loaded_at == self._step()
        for param in self._mine():
            optimizer.state.pop(param, None)
            if not exact:  # the state as it was given: torch has cast its own to the parameter's type
                state = given.get(param)
                self._moments.write(param, None if state is None else _adam_state(state))
        self._directions.follow(constants_of(self._groups(optimizer.param_groups)))


def check_optimizer(optimizer: Optimizer, params: Collection[Tensor]) -> None:
    """Whether a reducer of ``params`` can have an optimizer.

    Raises:
        CommError: another reducer has it.
        CommStateMismatch: its state is not of Adam.
    """
    if "_init_group" in vars(optimizer):
        raise CommError(
            "attach: another reducer has this optimizer",
            "close() that one first; for several models, give each its own optimizer",
        )
    known = {id(param) for param in params}
    mine = [p for p in chain.from_iterable(group["params"] for group in optimizer.param_groups) if id(p) in known]
    _check_state({param: optimizer.state[param] for param in mine if optimizer.state.get(param)})


def _check_state(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    for number, (param, state) in enumerate(states.items()):
        lacks = [slot for slot in _SLOTS if slot not in state]
        if lacks:
            raise CommStateMismatch(
                f"the optimizer's state of parameter {number} has {sorted(map(str, state))}, and no "
                f"{' and no '.join(lacks)}",
                "load the state dict of a torch.optim.AdamW or Adam",
            )
        for slot in ("exp_avg", "exp_avg_sq"):
            if hasattr(param, "full_tensor") and not hasattr(state[slot], "full_tensor"):  # DTensors
                raise CommStateMismatch(
                    f"the optimizer's {slot} of parameter {number} is a plain tensor, the parameter is sharded",
                    "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
                )
            if state[slot].shape != param.shape:
                raise CommStateMismatch(
                    f"the optimizer's {slot} of parameter {number} is {tuple(state[slot].shape)}, the parameter "
                    f"{tuple(param.shape)}",
                    "load the state dict of an optimizer of the same model",
                )


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, for which torch has no fused SGD; another tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _adam_state(state: Mapping[str, Any]) -> AdamState:
    step, exp_avg, exp_avg_sq = (state[slot] for slot in _SLOTS)
    return AdamState(step if isinstance(step, Tensor) else torch.tensor(float(step)), exp_avg, exp_avg_sq)
