"""Does it learn? PPO and GRPO with Flow-SDE and Flow-Noise, per task family, over seeds: success before and after RL.

    python benchmarks/learning.py [--families reach push] [--algorithms ppo_flow_sde] [--seeds 0 1 2] [--jobs 2] [key=value ...]

Every run is ``mmrl train`` of a config in configs/tabletop/ in a process of its own, so the table can be had by hand too.
Episodes of the families take different numbers of decisions, so each family gets as many environments as make an iteration of
PER_ITERATION decisions, and as many iterations as --decisions allows. Finished runs are kept under --output and not repeated.
Further arguments are overrides for all runs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from launch import ROOT, mmrl
from rich.console import Console
from rich.table import Table

from mmrl.metrics import read
from mmrl.numerics.statistics import percent
from simulators.tabletop import DEFAULT_MAX_STEPS

PER_ITERATION = 1152  # decisions: what the 384 environments of configs/quickstart.yaml take to reach
CHUNK, GROUP = 5, 8  # of configs/tabletop/: actions per decision, and episodes that GRPO compares
ALGORITHMS = ("ppo_flow_sde", "ppo_flow_noise", "grpo_flow_sde", "grpo_flow_noise")


def budget(family: str, decisions: int) -> tuple[int, int]:
    """Environments, a multiple of GROUP, and iterations of whole episodes that take at most so many decisions."""
    longest = -(-DEFAULT_MAX_STEPS[family] // CHUNK)
    num_envs = PER_ITERATION // longest // GROUP * GROUP
    return num_envs, max(1, decisions // (num_envs * longest))


def run_once(algorithm: str, family: str, seed: int, output: Path, overrides: list[str]) -> Path:
    """The folder of a finished run."""
    name = f"{algorithm}-{family}-{seed}"
    folder = output / name
    if (folder / "report.html").is_file():
        return folder
    config = ROOT / "configs" / "tabletop" / f"{algorithm}.yaml"
    settings = [f"name={name}", f"output={output}", f"seed={seed}", f"environment.families=[{family}]", *overrides]
    mmrl("train", config, *settings)
    return folder


def summary(folder: Path) -> dict[str, float]:
    """Success after imitation and after RL, decisions and minutes of RL."""
    rows = read(folder)
    after = {row["stage"]: row for row in rows if row["kind"] == "evaluation" and row["label"] == "after"}
    rl = [row for row in rows if row["kind"] == "train" and row["stage"] == "improve"]
    return {
        "sft": after["warm_start"]["success"],
        "rl": after["improve"]["success"],
        "decisions": sum(row["rollout/decisions"] for row in rl),
        "minutes": sum(row["seconds/collect"] + row["seconds/score"] + row["seconds/update"] for row in rl) / 60,
        "episodes": after["improve"]["episodes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["reach", "push", "pick_place", "sort"])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--decisions", type=int, default=40_000, help="of each run, about")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    arguments, overrides = parser.parse_known_args()
    output, started = arguments.output.resolve(), time.perf_counter()
    table = Table(title="Success on held-out layouts, mean over seeds (± 95 % t-interval)")
    for column in ("family", "algorithm", "after SFT", "after RL", "gain", "decisions", "RL minutes", "seeds"):
        table.add_column(column)
    cells = [(family, algorithm) for family in arguments.families for algorithm in arguments.algorithms]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs: dict[tuple[str, str, int], Future[Path]] = {}
        for family, algorithm, seed in itertools.product(arguments.families, arguments.algorithms, arguments.seeds):
            num_envs, iterations = budget(family, arguments.decisions)
            size = [f"stages.improve.collect.num_envs={num_envs}", f"stages.improve.iterations={iterations}"]
            settings = ["threads=1", "evaluation.every=0", *size, *overrides]
            jobs[family, algorithm, seed] = pool.submit(run_once, algorithm, family, seed, output, settings)
        for family, algorithm in cells:
            runs = [summary(jobs[family, algorithm, seed].result()) for seed in arguments.seeds]
            success = [percent([run[key] for run in runs]) for key in ("sft", "rl")]
            gain = percent([run["rl"] - run["sft"] for run in runs])
            decisions, minutes = (sum(run[key] for run in runs) / len(runs) for key in ("decisions", "minutes"))
            table.add_row(family, algorithm, *success, gain, f"{decisions:,.0f}", f"{minutes:.1f}", str(len(runs)))
    Console(width=140).print(table)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    main()
