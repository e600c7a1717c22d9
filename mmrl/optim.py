"""One optimizer step, done carefully: AdamW or Muon over named groups, a schedule, clipping, averaging, only finite updates.

All but Muon is a library's: ``torch.optim.AdamW``, ``torch.nn.utils`` for norms, ``torch.optim.swa_utils`` for the
average, ``transformers.get_scheduler`` for the learning rate. What is added here is names: parameters are known as
``group/index`` (index in the order the policy lists them), so that state can be saved without pickle and restored exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_scheduler

from mmrl.errors import CheckpointError, ConfigError, TrainingError
from mmrl.muon import MuonAdamW

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_NO_WARMUP = "constant"
_WITH_FLOOR = "cosine_with_min_lr"
# The schedules of transformers.SchedulerType that are functions of the update alone and need nothing beyond the fields below.
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    _WITH_FLOOR,
)


@dataclass(config=_CONFIG, frozen=True)
class GroupConfig:
    """What one parameter group has of its own; None takes the optimizer's."""

    lr: float | None = None
    """Peak learning rate of this group; 0 freezes it (None: the optimizer's ``lr``)."""
    weight_decay: float | None = None
    """Decoupled weight decay of this group (None: the optimizer's ``weight_decay``)."""
    method: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the group's matrices, with a ``lr`` near 0.02; its other weights stay with AdamW, at the
    optimizer's ``lr``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_at_least_zero(lr=self.lr, weight_decay=self.weight_decay)
        if self.method == "muon" and self.lr is None:
            raise ValueError("lr is missing: with method 'muon' a group needs one of its own, near 0.02")
        return self


@dataclass(config=_CONFIG, frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule, clipping and averaging."""

    lr: float = 3e-4
    """Peak learning rate of every group that names none of its own."""
    groups: dict[str, GroupConfig | None] = field(default_factory=dict)
    """Per parameter group (actor, embedding, critic, noise_head, ...: the policy names them) what differs; null: nothing."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of every group that names none of its own."""
    clip_norm: float | None = 1.0
    """Largest L2 norm of the whole gradient, all groups together (None: not clipped)."""
    schedule: str = "constant"
    """Learning-rate schedule, by its name in transformers.SchedulerType; an unknown name is answered with the list."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0 to its peak."""
    min_lr_ratio: float | None = None
    """Where ``cosine_with_min_lr`` ends, as a fraction of the peak (it needs the number, the other schedules refuse it)."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, used for evaluation (None: no average)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_at_least_zero(lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup, eps=self.eps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; each must be at least 0 and below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; give a positive number, or null for no clipping")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay between 0 and 1 such as 0.99, or null for no average")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; known schedules: {', '.join(SCHEDULES)}")
        if self.warmup and self.schedule == _NO_WARMUP:
            raise ValueError(
                f"warmup is {self.warmup}, but schedule {self.schedule!r} has no warm-up; "
                "use 'constant_with_warmup' or set warmup to 0"
            )
        if (self.min_lr_ratio is None) == (self.schedule == _WITH_FLOOR):
            raise ValueError(
                f"min_lr_ratio is {self.min_lr_ratio} with schedule {self.schedule!r}; set it with {_WITH_FLOOR!r} and only there"
            )
        if self.min_lr_ratio is not None and not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}; it is a fraction of the peak, between 0 and 1")


@plain_dataclass(frozen=True)
class StepReport:
    """What a step did: whether it was skipped, the gradient's L2 norm before clipping, the learning rate of each group."""

    skipped: bool
    grad_norm: float
    lr: dict[str, float]


class Optimization:
    """Updates a policy's parameters, group by group; one per stage.

    ``parameters_by_group`` is what ``Policy.trainable()`` returns; groups without parameters are left out. ``total_updates`` is
    where decaying schedules end, ``max_skipped`` how many updates in a row may be skipped before the run stops, ``where`` the
    dotted key of ``config`` for messages. Raises ConfigError for a configured group that is not trained.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters_by_group: Mapping[str, Sequence[nn.Parameter]],
        total_updates: int,
        *,
        max_skipped: int,
        where: str = "optimizer",
    ) -> None:
        groups = {name: list(parameters_by_group[name]) for name in sorted(parameters_by_group) if len(parameters_by_group[name])}
        _check_groups(config, groups, where)
        self._config = config
        self._max_skipped = max_skipped
        self._named = {f"{group}/{i}": p for group, parameters in groups.items() for i, p in enumerate(parameters)}
        self._optimizer = _optimizer(config, groups)
        self._moments = _moment_names(self._named, self._optimizer)
        self._scheduler = _scheduler(config, self._optimizer, total_updates)
        self._averages: list[Tensor] = []
        if config.ema is not None:
            self._averages = [p.detach().to(_average_dtype(p), copy=True) for p in self._named.values()]
        self._showing_averages = False
        self.skipped_in_a_row = 0
        self.skipped_total = 0

    @property
    def updates(self) -> int:
        """Updates made so far, skipped ones not counted."""
        return self._scheduler.last_epoch

    @property
    def lr(self) -> dict[str, float]:
        """The learning rate of the next update, by group."""
        return {group["name"]: float(group["lr"]) for group in self._optimizer.param_groups if group["name"]}

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, loss_is_finite: bool = True, *, loss: float | None = None) -> StepReport:
        """Update from the gradients in ``.grad``, which are cleared.

        An update whose loss or gradient is not finite is skipped: weights, moments, averages and schedule stay as they are.
        ``loss`` is checked too and named in the error. Raises TrainingError after ``max_skipped`` skipped updates in a row.
        """
        if self._showing_averages:
            raise RuntimeError("step() inside ema_scope() would update the averaged weights; leave the scope first")
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        grad_norm, lr = float(norm), self.lr
        loss_is_finite = loss_is_finite and (loss is None or math.isfinite(loss))
        if not (loss_is_finite and math.isfinite(grad_norm)):
            self._skip(grad_norm, loss_is_finite, loss)
            return StepReport(True, grad_norm, lr)
        if self._config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._named.values(), self._config.clip_norm, norm)
        self._optimizer.step()
        self._scheduler.step()
        self._average()
        self.zero_grad()
        self.skipped_in_a_row = 0
        return StepReport(False, grad_norm, lr)

    def _skip(self, grad_norm: float, loss_is_finite: bool, loss: float | None) -> None:
        self.zero_grad()
        self.skipped_in_a_row += 1
        self.skipped_total += 1
        if self.skipped_in_a_row >= self._max_skipped:
            loss_text = str(loss) if loss is not None else ("finite" if loss_is_finite else "not finite")
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite (last loss: {loss_text}, "
                f"last gradient norm: {grad_norm}) after {self.updates} good ones; lower optimizer.lr or optimizer.clip_norm, "
                "or train in float32, and resume from the last checkpoint"
            )

    @torch.no_grad()
    def _average(self) -> None:
        if self._config.ema is None:
            return
        current = [p.detach().to(average.dtype) for p, average in zip(self._named.values(), self._averages, strict=True)]
        get_ema_multi_avg_fn(self._config.ema)(self._averages, current, None)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Parameters hold their moving averages within the scope and what they held before after it (no ``ema``: no change)."""
        if self._config.ema is None:
            yield
            return
        if self._showing_averages:
            raise RuntimeError("ema_scope() does not nest")
        trained = [p.detach().clone() for p in self._named.values()]
        try:
            self._showing_averages = True
            self._assign(self._averages)
            yield
        finally:
            self._assign(trained)
            self._showing_averages = False

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._named.values(), values, strict=True):
            parameter.copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta) for ``load``: ``group/index/{step,exp_avg,exp_avg_sq,momentum_buffer,ema}``, and what fits in json.

        The tensors are the live ones, not copies. A parameter that never had a gradient has no moments.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        if self._averages:
            tensors |= {f"{name}/ema": average for name, average in zip(self._named, self._averages, strict=True)}
        meta = {"updates": self.updates, "skipped_in_a_row": self.skipped_in_a_row, "skipped_total": self.skipped_total}
        return tensors, meta

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was taken. Learning rates, betas and the like are the config's, not the state's.

        Raises CheckpointError, with nothing changed, where the tensors do not fit these parameters.
        """
        self._check_fits(tensors)
        # torch numbers parameters in the order of its groups, which are not ours where Muon splits one
        order = {id(p): i for i, p in enumerate(p for group in self._optimizer.param_groups for p in group["params"])}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, parameter in self._named.items():
            entries = {key: tensors[f"{name}/{key}"].clone() for key in self._moments[name] if f"{name}/{key}" in tensors}
            if entries:
                moments[order[id(parameter)]] = entries
        self._optimizer.load_state_dict({"state": moments, "param_groups": self._optimizer.state_dict()["param_groups"]})
        for name, average in zip(self._named, self._averages, strict=False):
            average.copy_(tensors[f"{name}/ema"])
        self.skipped_in_a_row = int(meta["skipped_in_a_row"])
        self.skipped_total = int(meta["skipped_total"])
        self._resume_schedule(int(meta["updates"]))

    def _resume_schedule(self, updates: int) -> None:
        # A LambdaLR's learning rate is base * f(update) and nothing else, so recomputing it is exact, and a run resumed with
        # another learning rate gets it.
        scheduler = self._scheduler
        scheduler.last_epoch = updates
        rates = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        known = {f"{name}/{key}" for name, keys in self._moments.items() for key in keys}
        averages = {f"{name}/ema" for name in self._named} if self._averages else set()
        begun = {name for name, keys in self._moments.items() if any(f"{name}/{key}" in tensors for key in keys)}
        needed = averages | {f"{name}/{key}" for name in begun for key in self._moments[name]}
        unexpected, missing = sorted(tensors.keys() - known - averages), sorted(needed - tensors.keys())
        if unexpected or missing:
            problem = f"holds {unexpected[0]!r}" if unexpected else f"lacks {missing[0]!r}"
            raise CheckpointError(
                f"the optimizer state {problem}, which does not fit the trained groups {_groups_text(self._named)} "
                f"(optimizer.ema: {self._config.ema}); resume with the config that wrote it"
            )
        for name, parameter in self._named.items():
            for key in (*self._moments[name][1:], "ema"):
                value = tensors.get(f"{name}/{key}")
                if value is not None and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"the optimizer state's {name}/{key} has shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(parameter.shape)}; resume with the config and policy that wrote it"
                    )


# The state of a parameter; the first is a number, the others have its shape.
_ADAMW_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MUON_MOMENTS = ("step", "momentum_buffer")


def _require_at_least_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be a finite number, at least 0")


def _groups_text(named: Mapping[str, nn.Parameter]) -> str:
    counts: dict[str, int] = {}
    for name in named:
        group = name.rpartition("/")[0]
        counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({count} parameters)" for group, count in counts.items())


def _check_groups(config: OptimizerConfig, groups: Mapping[str, Sequence[nn.Parameter]], where: str) -> None:
    if not groups:
        raise ConfigError("the policy trains no parameters; set its train option to one that does")
    unknown = [name for name, own in config.groups.items() if own is not None and name not in groups]
    if unknown:
        raise ConfigError(
            f"{where}.groups.{unknown[0]} configures a group the policy does not train; it trains: {', '.join(groups)}"
        )
    owner: dict[int, str] = {}
    for name, parameters in groups.items():
        for parameter in parameters:
            if id(parameter) in owner:
                raise ValueError(f"a parameter is listed twice, in groups {owner[id(parameter)]!r} and {name!r}; list it once")
            owner[id(parameter)] = name


def _optimizer(config: OptimizerConfig, groups: Mapping[str, list[nn.Parameter]]) -> MuonAdamW:
    """torch's groups carry our names; the vectors of a group whose matrices Muon has are a further one without a name."""
    described = []
    for name, parameters in groups.items():
        own = config.groups.get(name) or GroupConfig()
        lr = config.lr if own.lr is None else own.lr
        decay = {"weight_decay": config.weight_decay if own.weight_decay is None else own.weight_decay}
        muon = own.method == "muon"
        matrices = [p for p in parameters if p.dim() == 2] if muon else parameters
        described.append({"name": name, "params": matrices, "lr": lr, "muon": muon, **decay})
        if muon:
            vectors = [p for p in parameters if p.dim() != 2]
            described.append({"name": "", "params": vectors, "lr": config.lr, "muon": False, **decay})
    # Fused kernels exist for CPU and CUDA; on a small policy on CPU they are nine times as fast as the default loop.
    fused = all(p.device.type in ("cpu", "cuda") for parameters in groups.values() for p in parameters)
    return MuonAdamW(described, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def _moment_names(named: Mapping[str, nn.Parameter], optimizer: MuonAdamW) -> dict[str, tuple[str, ...]]:
    with_muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    return {name: _MUON_MOMENTS if id(p) in with_muon else _ADAMW_MOMENTS for name, p in named.items()}


def _scheduler(config: OptimizerConfig, optimizer: MuonAdamW, total_updates: int) -> LambdaLR:
    extra = {} if config.min_lr_ratio is None else {"min_lr_rate": config.min_lr_ratio}
    scheduler = get_scheduler(config.schedule, optimizer, config.warmup, total_updates, scheduler_specific_kwargs=extra)
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"schedule {config.schedule!r} is not a function of the update alone, so it could not be resumed")
    return scheduler


def _average_dtype(parameter: Tensor) -> torch.dtype:
    """At least float32: a step of 1 - decay is lost in bfloat16."""
    return torch.promote_types(parameter.dtype, torch.float32)
