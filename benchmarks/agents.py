"""Does reinforcement learning teach a model to use its tools, and what does the process reward do?

    python benchmarks/agents.py [--config configs/grpo_qwen_vl_tools.yaml] [--seeds 0 1 2] [--jobs 1] [key=value ...]

For each seed: imitation and GRPO as the config has them; from the same imitation GRPO with the answer's mark as its only reward;
and the same questions without tools, imitated and learned as long. Success and faithful rate (of the right answers, those whose
evidence some tool has shown) on held-out questions. Every run is ``mmrl train`` in a process of its own, so the table can be had
by hand too. Finished runs are kept under --output and not repeated. Further arguments are overrides for all runs.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch import ROOT, mmrl
from rich.console import Console
from rich.table import Table

from mmrl.metrics import read
from mmrl.numerics.statistics import percent

OUTCOME = ("stages.improve.rewards=[{target: 'mmrl.rewards.answers:Correct'}]",)
NO_TOOLS = ("environment.tools=[]", "environment.max_turns=1", *OUTCOME)
VARIANTS = {"as configured": (), "the answer's mark alone": OUTCOME, "no tools": NO_TOOLS}


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Before, after imitation, after reinforcement learning."""
    return [row for row in read(run) if row["kind"] == "evaluation" and row["label"] != "during"]


def train(config: Path, name: str, seed: int, output: Path, settings: list[str]) -> Path:
    run = output / f"{name}-{seed}"
    if not (run / "report.html").is_file():
        mmrl("train", config, f"name={run.name}", f"output={output}", f"seed={seed}", *settings)
    return run


def train_seed(seed: int, config: Path, output: Path, overrides: list[str]) -> dict[str, Path]:
    """The runs of one seed, by the label of their row."""
    runs = {}
    for label, settings in VARIANTS.items():
        runs[label] = train(config, label.replace(" ", "_").replace("'", ""), seed, output, [*settings, *overrides])
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "grpo_qwen_vl_tools.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/agents"))
    arguments, overrides = parser.parse_known_args()
    output, started = arguments.output.resolve(), time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seeds = list(pool.map(lambda s: train_seed(s, arguments.config, output, overrides), arguments.seeds))
    table = Table(title="Held-out questions, mean over seeds (± 95 % t-interval)")
    for column in ("reward", "stage", "success", "tool rate", "faithful rate", "calls", "minutes"):
        table.add_column(column)
    for label in seeds[0]:
        runs = [by_label[label] for by_label in seeds]
        for place, stage in enumerate(("base", "after imitation", "after GRPO")):
            rows = [evaluations(run)[place] for run in runs]
            cells = [percent([row.get(name, 0.0) for row in rows]) for name in ("success", "tool_rate", "faithful_rate")]
            calls = sum(row.get("calls", 0.0) for row in rows) / len(rows)
            minutes = sum(row["seconds"] for row in rows) / len(rows) / 60
            table.add_row(label if place == 0 else "", stage, *cells, f"{calls:.2f}", f"{minutes:.1f}")
    Console(width=140).print(table)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    main()
