"""Does simulation help in the world, and does an anchor in the world's demonstrations help simulation's RL? (RL-Co)

    python benchmarks/sim_real.py [--recipe sim_real_slow] [--seeds 0 1 2] [--weights 0 0.05 0.2 1] [--jobs 2] [key=value ...]

Some ways to use a few demonstrations from the world (the tabletop's domain ``real``) and a free simulation, each judged in both:
imitation of the world's demonstrations alone, imitation of those and of simulated ones, and from the latter PPO in simulation
with an imitation loss on the world's demonstrations of weight 0 (no anchor) or more. Every run is ``mmrl train`` of a config in
configs/RECIPE/ in a process of its own, so the table can be had by hand too. In sim_real (the default) the world's demonstrations
show what is wanted and those of simulation are slow; in sim_real_slow all of them are too slow for the world's time limit.
Finished runs are kept under --output and not repeated. Further arguments are overrides for all runs.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch import ROOT, mmrl
from rich.console import Console
from rich.table import Table

from mmrl.metrics import read
from mmrl.numerics.statistics import percent

DOMAINS = ("real", "sim")
RECIPES = ("sim_real", "sim_real_slow")  # folders of configs


def success(run: Path, domain: str) -> float:
    """Success in ``domain`` at the end of the run."""
    rows = [row for row in read(run) if row["kind"] == "evaluation"]
    if domain == "real":
        return next(row["success"] for row in rows if row["label"] == "after")
    return next(row["success"] for row in reversed(rows) if row["label"] == "evaluate")


def run_once(name: str, config: Path, seed: int, output: Path, settings: list[str]) -> Path:
    """The folder of a finished run that was judged in both domains."""
    run = output / f"{name}-{seed}"
    if not (run / "report.html").is_file():
        mmrl("train", config, f"name={run.name}", f"output={output}", f"seed={seed}", *settings)
    if not any(row["kind"] == "evaluation" and row["label"] == "evaluate" for row in read(run)):
        mmrl("evaluate", run, "evaluation.environment.domain=sim", "evaluation.videos=0")
    return run


def train_seed(configs: Path, seed: int, weights: list[float], output: Path, overrides: list[str]) -> dict[str, Path]:
    """The runs of one seed, by the label of their row."""
    runs = {"imitation, world only": run_once("real_only", configs / "real_only.yaml", seed, output, overrides)}
    co_trained = run_once("co_trained", configs / "co_trained.yaml", seed, output, overrides)
    runs["imitation, world and simulation"] = co_trained
    for weight in weights:
        settings = [f"policy.checkpoint={co_trained / 'policy'}", f"stages.improve.supervised.weight={weight}", *overrides]
        label = f"then PPO in simulation, {f'anchor {weight:g}' if weight else 'no anchor'}"
        runs[label] = run_once(f"rl_{weight:g}", configs / "rl_co.yaml", seed, output, settings)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help="folder of configs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.05, 0.2, 1.0])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each on one thread")
    parser.add_argument("--output", type=Path, help="folder of runs (runs/RECIPE)")
    arguments, overrides = parser.parse_known_args()
    configs, started = ROOT / "configs" / arguments.recipe, time.perf_counter()
    output = (arguments.output or Path("runs", arguments.recipe)).resolve()
    weights, settings = arguments.weights, ["threads=1", *overrides]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seeds = list(pool.map(lambda seed: train_seed(configs, seed, weights, output, settings), arguments.seeds))
    table = Table(title=f"{arguments.recipe}: success on held-out layouts, mean over seeds (± 95 % t-interval)")
    for column in ("training", "in the world", "in simulation", "minutes", "seeds"):
        table.add_column(column)
    for label in seeds[0]:
        runs = [by_label[label] for by_label in seeds]
        cells = [percent([success(run, domain) for run in runs]) for domain in DOMAINS]
        minutes = sum(max(row["seconds"] for row in read(run)) for run in runs) / len(runs) / 60
        table.add_row(label, *cells, f"{minutes:.1f}", str(len(runs)))
    Console(width=140).print(table)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    main()
