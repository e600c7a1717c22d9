"""How much of a policy gradient is signal, and how much the noise of what was drawn? No update is made.

    python benchmarks/gradient_signal.py CONFIG [--stage improve] [--groups 64] [key=value ...]

The gradient g of the stage's loss, of one group of rollouts after another, at the config's own weights. Groups are independent,
so that products of different groups estimate the square of the mean gradient and each group's own square that and the noise:

    signal = mean over i != j of g_i g_j / mean over i of g_i g_i

which is the share of a group's squared gradient that every group has in common: a batch of about 1 / signal groups points as much
where the return grows as anywhere else. Printed with the jackknife's standard error over groups, in Adam's metric (each parameter
divided by the root of its mean square) and in the plain one. Where it is smaller than its error, ask for more groups, or expect
RL to wander.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from mmrl import progress
from mmrl.config import load
from mmrl.optim import Optimization, StepReport
from mmrl.trainer import Run, Stage


class Recorder:
    """Takes the place of an optimizer: keeps each gradient and moves nothing."""

    def __init__(self, optimization: Optimization, parameters: list[torch.nn.Parameter]) -> None:
        self.gradients: list[Tensor] = []
        self._parameters, self._lr, self._clear = parameters, optimization.lr, optimization.zero_grad
        optimization.step = self._step  # type: ignore[method-assign]

    def _step(self, loss_is_finite: bool = True, *, loss: float | None = None) -> StepReport:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradient = torch.cat([part.flatten() for part in parts]).clone()
        self.gradients.append(gradient)
        self._clear()
        return StepReport(not loss_is_finite, float(gradient.norm()), self._lr)


def signal(gradients_GP: Tensor) -> tuple[float, float]:
    """The share of signal in gradients [G, P], and its standard error."""
    products_GG = gradients_GP.double() @ gradients_GP.double().T
    own_G, g = products_GG.diagonal(), len(products_GG)
    common_G = products_GG.sum(1) - own_G
    total, square = common_G.sum(), own_G.mean()
    without_G = (total - 2 * common_G) / ((g - 1) * (g - 2))
    error = ((g - 1) / g * (without_G - without_G.mean()).square().sum()).sqrt()
    return float(total / (g * (g - 1)) / square), float(error / square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--stage", default="improve")
    parser.add_argument("--groups", type=int, default=64)
    arguments, overrides = parser.parse_known_args()
    config = load(arguments.config, overrides)
    index = [stage.name for stage in config.stages].index(arguments.stage)
    where = f"stages.{arguments.stage}"
    size = getattr(config.stages[index].algorithm.config, "group_size", 1)
    whole = [f"{where}.algorithm.minibatches=1", f"{where}.algorithm.epochs=1", f"{where}.collect.num_envs={size}"]
    config = load(arguments.config, [*overrides, *whole])
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Run(config, Path(folder), progress.make()), index, None, None)
        trained = [p for group in stage.policy.trainable().values() for p in group]
        recorder, returns, started = Recorder(stage.learner.optimization, trained), [], time.process_time()
        for iteration in track(range(arguments.groups), "groups"):
            returns.append(stage.learner.iterate(iteration)["rollout/return"])
        seconds = time.process_time() - started
        stage.close()
    gradients_GP = torch.stack(recorder.gradients)
    deviation_P = gradients_GP.square().mean(0).sqrt()
    taught = f"{len(gradients_GP)} of {arguments.groups} groups of {size} taught something"
    print(f"{taught}; mean return {sum(returns) / len(returns):.3f}")
    for metric, scaled_GP in (("Adam's metric", gradients_GP / deviation_P.clamp(min=1e-30)), ("plain metric", gradients_GP)):
        share, error = signal(scaled_GP)
        print(f"signal in {metric}: {share:.4f} ± {error:.4f}")
    print(f"{seconds / arguments.groups:.2f} s of processor time a group")


if __name__ == "__main__":
    main()
