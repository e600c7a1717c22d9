"""How good the base policy in assets/tiny_pi0 is, per task family: ``python benchmarks/base_policy.py [--episodes 512]``.

Prints a Markdown table: success of the deterministic policy with 95 % Wilson intervals, on the training split and on held-out
layouts, wordings and named objects, within the time limit and within twice the time (its teachers were slow).
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch

from mmrl.config import MeasuringConfig
from mmrl.evaluation import evaluate
from mmrl.progress import Quiet
from policies.pi0 import Pi0
from simulators.tabletop import DEFAULT_MAX_STEPS, Tabletop

ROOT = Path(__file__).parent.parent
FAMILIES = ("reach", "push", "pick_place", "sort")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--checkpoint", default=str(ROOT / "assets" / "tiny_pi0"))
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    settings = Pi0.Config(arguments.checkpoint, sampler="ode", critic=None, max_text_tokens=16, attention="eager")
    policy = Pi0(settings, device=cpu)
    print("| family | training split | the same, twice the time | held out | the same, twice the time |\n|---|---|---|---|---|")
    for family in FAMILIES:
        cells = []
        for split, patience in product(("train", "held_out"), (1, 2)):
            limits = {family: DEFAULT_MAX_STEPS[family] * patience}
            environment = Tabletop(Tabletop.Config((family,), split=split, max_steps=limits), num_envs=256, device=cpu)
            settings = MeasuringConfig(episodes=arguments.episodes)
            result = evaluate(policy, environment, settings, seed=0, device=cpu, progress=Quiet())
            cells.append(f"{result.success:.1%} [{result.low:.1%}, {result.high:.1%}]")
        print(f"| {family} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
