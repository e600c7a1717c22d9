"""How a picture's latents walk from noise to data, and the likelihood of the steps that were drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmrl.numerics import flow
from mmrl.numerics.draws import Draws
from policies.diffusion_parts.schedule import Grid, Schedule


class Network(Protocol):
    """What it says of a state x [B, ...] at the network's times [B]; rows: whose prompts are meant (int64 [B]; None: their own).

    apart: what the branch without prompt said last, where it is asked alone and without gradients; said again, it is not asked.
    """

    apart: Tensor | None

    def __call__(self, x: Tensor, time_B: Tensor, rows: Tensor | None, apart: Tensor | None = None) -> Tensor: ...


class Unit(NamedTuple):
    """One step drawn at random, of N pictures: log-density [N], mean [N, D], std [N] and length [N] of the step."""

    log_prob_N: Tensor
    mean_ND: Tensor
    std_N: Tensor
    delta_N: Tensor


class Walk(NamedTuple):
    """B pictures' walk: where it ended [B, ...], and of the K drawn steps the states before and after, and their units.

    apart: of the drawn steps what the branch without prompt said, where it was asked alone.
    """

    clean: Tensor
    before: list[Tensor]
    after: list[Tensor]
    units: list[Unit]
    apart: list[Tensor]


class Sampler:
    """rule and level: of the drawn steps. reduction: mean or sum over the D numbers of a state."""

    def __init__(self, schedule: Schedule, *, rule: str, level: float | None, reduction: str) -> None:
        self.schedule, self._rule, self._level, self._reduction = schedule, rule, level, reduction

    def walk(self, network: Network, noise: Tensor, grid: Grid, draws: Draws | None, chosen: Sequence[int]) -> Walk:
        """From noise [B, ...] to data; ``chosen`` steps are drawn from ``draws``, the others follow the ODE.

        A state is rounded to the type of ``noise`` before it is scored, so that scoring it again sees the same numbers.
        """
        walk = Walk(self.schedule.start(noise), [], [], [], [])
        return self._go_on(network, walk, grid, draws, chosen, range(len(grid.times)))

    def walk_from_one_point(
        self, network: Network, noise_P: Tensor, prompt_B: Tensor, grid: Grid, draws: Draws, chosen: Sequence[int]
    ) -> Walk:
        """As ``walk``, but the steps before the first chosen one are made once for each of P prompts, from noise_P [P, ...].

        prompt_B: the prompt (0 to P - 1) of each picture.
        """
        first = chosen[0]
        x_P = self.schedule.start(noise_P)
        rows_P = torch.stack([(prompt_B == p).nonzero()[0, 0] for p in range(len(noise_P))])
        shared = self._go_on(network, Walk(x_P, [], [], [], []), grid, None, (), range(first), rows_P)
        walk = Walk(shared.clean[prompt_B], [], [], [], [])
        return self._go_on(network, walk, grid, draws, chosen, range(first, len(grid.times)))

    def _go_on(
        self,
        network: Network,
        walk: Walk,
        grid: Grid,
        draws: Draws | None,
        chosen: Sequence[int],
        steps: range,
        rows: Tensor | None = None,
    ) -> Walk:
        x, before, after, units, apart = walk
        for k in steps:
            step_B = torch.full((len(x),), k, device=x.device)
            output = self._ask(network, x, grid, step_B, rows)
            if k not in chosen:
                x = self.schedule.transition(x, output, grid, step_B, rule="ode", level=None)[0].mean.to(x.dtype)
                continue
            assert draws is not None
            (mean, std), delta_B = self._transition(x, output, grid, step_B)
            x_next = (mean + std * draws.normal(*x.shape[1:], dtype=mean.dtype)).to(x.dtype)
            before.append(x)
            after.append(x_next)
            units.append(self._unit(x_next, mean, std, delta_B))
            apart += [] if network.apart is None else [network.apart]
            x = x_next
        return Walk(x, before, after, units, apart)

    def score(
        self, network: Network, before: Tensor, after: Tensor, grid: Grid, step_N: Tensor, apart: Tensor | None = None
    ) -> Unit:
        """One drawn step of N pictures again, with gradients; before and after [N, ...], step_N int64 [N].

        apart [N, ...]: what the branch without prompt says, if that is known.
        """
        (mean, std), delta_N = self._transition(before, self._ask(network, before, grid, step_N, None, apart), grid, step_N)
        return self._unit(after, mean, std, delta_N)

    def entropy(self, stds_NK: Tensor, size: int) -> Tensor:
        """Of the units: [N, K], of one of a state's ``size`` numbers (reduction mean) or of all (sum)."""
        return flow.gaussian_entropy(stds_NK) * (1 if self._reduction == "mean" else size)

    def _ask(
        self, network: Network, x: Tensor, grid: Grid, step_B: Tensor, rows: Tensor | None, apart: Tensor | None = None
    ) -> Tensor:
        times = grid.times.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return network(x, times[step_B], rows, apart)

    def _transition(self, x: Tensor, output: Tensor, grid: Grid, step_B: Tensor) -> tuple[flow.Transition, Tensor]:
        return self.schedule.transition(x, output, grid, step_B, rule=self._rule, level=self._level)

    def _unit(self, x_next: Tensor, mean: Tensor, std: Tensor, delta_N: Tensor) -> Unit:
        density_ND = flow.gaussian_log_prob(x_next, mean, std).flatten(1)
        log_prob_N = density_ND.mean(1) if self._reduction == "mean" else density_ND.sum(1)
        return Unit(log_prob_N, mean.flatten(1), std.flatten(1)[:, 0].expand(len(mean)), delta_N)
