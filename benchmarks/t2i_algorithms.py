"""Which algorithm teaches an image generator most with the same number of pictures, and does it only please its reward?

    python benchmarks/t2i_algorithms.py [--config configs/grpo_sd3_shapes.yaml] [--seeds 0 1 2] [--only CPS] [key=value ...]

For each seed the config's stages of imitation once, and once with SOAR in their place. From there on each variant is the
config's last stage, with as many iterations and pictures: Flow-GRPO as the config has it; Fast and MixGRPO, which draw and train
a quarter of the steps behind a prefix that a prompt's pictures share; CPS; GRPO-Guard; DiffusionNFT; and Flow-GRPO after SOAR.
Reward, and the rewards of weight 0 that are only watched, on the prompts of the config's evaluation.

Every run is ``mmrl train`` in a process of its own, so the table can be had by hand too. Finished runs are kept under --output
and not repeated. Further arguments are overrides for all runs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import ROOT, mmrl
from rich.console import Console
from rich.table import Table

from mmrl.config import load, plain
from mmrl.metrics import read
from mmrl.numerics.statistics import mean_interval
from mmrl.picturing import SCORE
from policies.diffusion_parts.options import TrainedSteps

IMITATION, SOAR = "imitation", "SOAR"


@dataclass(frozen=True)
class Recipe:
    """The config, as variants read it. stages: of imitation, and the last one, as plain data. watched: rewards of weight 0."""

    path: Path
    overrides: list[str]
    steps: int
    before: list[dict[str, Any]]
    last: dict[str, Any]
    watched: list[str]

    @staticmethod
    def read(path: Path, overrides: list[str]) -> Recipe:
        config = load(path, overrides)
        policy: Any = config.policy.config
        environment: Any = config.environment.config
        watched = [reward.name for reward in environment.rewards if not reward.weight]
        *before, last = plain(config)["stages"]
        if not before or any(stage["data"] is None for stage in before) or last["collect"] is None:
            raise SystemExit(f"{path}: needs stages of imitation and then one that learns from rewards")
        return Recipe(path, overrides, policy.steps, before, last, watched)

    @property
    def window(self) -> int:
        """A quarter of the steps."""
        return max(1, self.steps // 4)

    @property
    def places(self) -> int:
        """Of the window; the last step is never in it."""
        return self.steps - self.window

    def algorithm(self, fields: dict[str, Any]) -> str:
        return f"stages.{self.last['name']}.algorithm={json.dumps(fields)}"

    def shared(self, *names: str) -> dict[str, Any]:
        """Fields of the config's own algorithm."""
        return {name: self.last["algorithm"][name] for name in names}


Overrides = Callable[[Recipe], list[str]]


def trained_steps(**fields: Any) -> str:
    """All fields of it: overrides are merged with what the config has."""
    return f"policy.trained_steps={json.dumps(asdict(TrainedSteps()) | fields)}"


def fast(recipe: Recipe) -> list[str]:
    """Anywhere in the first half, placed anew in each iteration."""
    stop = max(recipe.steps // 2, recipe.window)
    return [trained_steps(which="window", size=recipe.window, stop=stop, order="random", shared_prefix=True)]


def mix(recipe: Recipe) -> list[str]:
    """From the first steps to the last, once in the run."""
    every = max(1, math.ceil(recipe.last["iterations"] / recipe.places))
    return [trained_steps(which="window", size=recipe.window, every=every, shared_prefix=True)]


def cps(recipe: Recipe) -> list[str]:
    """Clipped at a tenth, as published."""
    clips = {name: value / 10 for name, value in recipe.shared("clip_low", "clip_high").items()}
    return ["policy.sampler=cps", "policy.noise_level=0.8", recipe.algorithm({"log_ratio": "unscaled", **clips})]


def guard(recipe: Recipe) -> list[str]:
    return [recipe.algorithm({"log_ratio": "guard"})]


def nft(recipe: Recipe) -> list[str]:
    """A point for each step that Flow-GRPO trains."""
    fields = {"target": "mmrl.algorithms.nft:DiffusionNFT", "times": {"count": recipe.steps - 1}}
    fields |= recipe.shared("group_size", "minibatches", "epochs")
    plain = ["policy.sampler=ode", "policy.evaluation_sampler=ode", "policy.noise_level=null"]
    return [*plain, trained_steps(), recipe.algorithm(fields)]


# name -> (what it starts from, its overrides)
VARIANTS: dict[str, tuple[str, Overrides]] = {
    "Flow-GRPO": (IMITATION, lambda recipe: []),
    "Flow-GRPO-Fast": (IMITATION, fast),
    "MixGRPO": (IMITATION, mix),
    "CPS": (IMITATION, cps),
    "GRPO-Guard": (IMITATION, guard),
    "DiffusionNFT": (IMITATION, nft),
    "SOAR, then Flow-GRPO": (SOAR, lambda recipe: []),
}


def imitated(recipe: Recipe, how: str) -> list[dict[str, Any]]:
    """The stages of imitation; with SOAR as their algorithm and all else the same."""
    if how == IMITATION:
        return recipe.before
    target = "mmrl.algorithms.soar:SOAR"
    return [
        {**stage, "algorithm": {"target": target, "batch_size": stage["algorithm"]["batch_size"], "steps": recipe.steps}}
        for stage in recipe.before
    ]


def train(recipe: Recipe, name: str, seed: int, output: Path, settings: Sequence[str]) -> Path:
    run = output / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"
    if not (run / "report.html").is_file():
        mmrl("train", recipe.path, *recipe.overrides, f"name={run.name}", f"output={output}", f"seed={seed}", *settings)
    return run


def train_seed(recipe: Recipe, seed: int, names: Sequence[str], output: Path) -> dict[str, Path]:
    """The runs of one seed, by variant."""
    runs, bases = {}, {}
    for name in names:
        how, overrides = VARIANTS[name]
        if how not in bases:
            bases[how] = train(recipe, how, seed, output, [f"stages={json.dumps(imitated(recipe, how))}"])
        start = [f"policy.checkpoint={bases[how] / 'policy'}", "policy.weights=pretrained"]
        stage = f"stages={json.dumps([recipe.last])}"
        runs[name] = train(recipe, name, seed, output, [*start, stage, *overrides(recipe)])
    return runs


def measured(recipe: Recipe, run: Path) -> dict[str, float]:
    """Rewards and success before and after, seconds of learning."""
    rows = read(run)
    found: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "evaluation" and row["label"] in ("before", "after"):
            found[f"reward {row['label']}"] = row["return"]
            found[f"success {row['label']}"] = row["success"]
            found |= {f"{name} {row['label']}": row["metrics"][f"{SCORE}{name}"] for name in recipe.watched}
    trained = [row for row in rows if row["kind"] == "train"]
    parts = ("seconds/collect", "seconds/reward", "seconds/score", "seconds/update")
    found["seconds"] = sum(row[part] for row in trained for part in parts)
    found["pictures"] = sum(row["rollout/decisions"] for row in trained)
    return found


def interval(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.3f}" if math.isinf(half) else f"{mean:.3f} ± {half:.3f}"


def table(recipe: Recipe, seeds: Sequence[dict[str, Path]]) -> Table:
    made = Table(title="Held-out prompts, mean over seeds (± 95 % t-interval)")
    columns = [f"{name} {when}" for name in ("reward", "success", *recipe.watched) for when in ("before", "after")]
    for column in ("", *columns, "pictures", "seconds"):
        made.add_column(column, justify="left" if not column else "right")
    for name in seeds[0]:
        runs = [measured(recipe, runs[name]) for runs in seeds]
        cells = [interval([run[column] for run in runs]) for column in columns]
        counts = [sum(run[column] for run in runs) / len(runs) for column in ("pictures", "seconds")]
        made.add_row(name, *cells, *(f"{count:,.0f}" for count in counts))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "grpo_sd3_shapes.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs/t2i_algorithms"))
    arguments, overrides = parser.parse_known_args()
    output, started = arguments.output.resolve(), time.perf_counter()
    recipe = Recipe.read(arguments.config, overrides)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seeds = list(pool.map(lambda seed: train_seed(recipe, seed, arguments.only, output), arguments.seeds))
    Console(width=160).print(table(recipe, seeds))
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    main()
