"""Does it learn? PPO and GRPO with Flow-SDE and Flow-Noise, per task family, over seeds: success before and after RL.

    python benchmarks/learning.py [--families reach push] [--algorithms ppo_flow_sde] [--seeds 0 1 2] [key=value ...]

Every run is ``mmrl train`` of a config in configs/tabletop/ in a process of its own, so the table can be had by hand too.
Finished runs are kept under --output and not repeated. Further arguments are overrides for all runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmrl.metrics import read
from mmrl.numerics.statistics import percent

ROOT = Path(__file__).parent.parent
ALGORITHMS = ("ppo_flow_sde", "ppo_flow_noise", "grpo_flow_sde", "grpo_flow_noise")


def run_once(algorithm: str, family: str, seed: int, output: Path, overrides: list[str]) -> Path:
    """The folder of a finished run."""
    name = f"{algorithm}-{family}-{seed}"
    folder = output / name
    if (folder / "report.html").is_file():
        return folder
    config = ROOT / "configs" / "tabletop" / f"{algorithm}.yaml"
    settings = [f"name={name}", f"output={output}", f"seed={seed}", f"environment.families=[{family}]", *overrides]
    subprocess.run(
        [sys.executable, "-m", "mmrl", "train", str(config), *settings], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
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
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    arguments, overrides = parser.parse_known_args()
    table = Table(title="Success on held-out episodes, mean over seeds (± 95 % t-interval)")
    for column in ("family", "algorithm", "after SFT", "after RL", "gain", "decisions", "RL minutes", "seeds"):
        table.add_column(column)
    started = time.perf_counter()
    for family in arguments.families:
        for algorithm in arguments.algorithms:
            runs = [summary(run_once(algorithm, family, seed, arguments.output.resolve(), overrides)) for seed in arguments.seeds]
            cells = [percent([run[key] for run in runs]) for key in ("sft", "rl")]
            gain = percent([run["rl"] - run["sft"] for run in runs])
            decisions, minutes = (sum(run[key] for run in runs) / len(runs) for key in ("decisions", "minutes"))
            table.add_row(family, algorithm, *cells, gain, f"{decisions:,.0f}", f"{minutes:.1f}", str(len(runs)))
    Console(width=140).print(table)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    main()
