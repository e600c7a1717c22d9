"""Is this PPO as good as published ones? CartPole-v1 and Pendulum-v1 over seeds, beside the figures of CleanRL and SB3.

    python benchmarks/ppo_reference.py [--tasks cartpole pendulum] [--seeds 0 1 2] [--jobs 2] [key=value ...]

Prints a Markdown table: mean return of the deterministic policy over held-out episodes, per seed. Every run is ``mmrl train`` of
a config in configs/gymnasium/ in a process of its own. Finished runs are kept under --output and not repeated. Further arguments
are overrides for all runs.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch import ROOT, mmrl

from mmrl.metrics import read

# task -> what others report
PUBLISHED = {
    "cartpole": "CleanRL ppo.py, 500,000 steps: 488.75 ± 18.40 (docs/rl-algorithms/ppo.md); gymnasium calls 475 solved",
    "pendulum": "RL Baselines3 Zoo ppo, 100,000 steps: -172.2 ± 104.2 over 750 episodes of one run (benchmark.md)",
}


def run_once(task: str, seed: int, output: Path, overrides: list[str]) -> Path:
    """The folder of a finished run."""
    name = f"ppo_{task}-{seed}"
    folder = output / name
    if (folder / "report.html").is_file():
        return folder
    config = ROOT / "configs" / "gymnasium" / f"ppo_{task}.yaml"
    mmrl("train", config, f"name={name}", f"output={output}", f"seed={seed}", *overrides)
    return folder


def row(task: str, seed: int, folder: Path) -> str:
    rows = read(folder)
    evaluations = {r["label"]: r for r in rows if r["kind"] == "evaluation"}
    training = [r for r in rows if r["kind"] == "train"]
    steps, seconds = (sum(r[name] for r in training) for name in ("rollout/env_steps", "seconds/collect"))
    seconds += sum(r["seconds/update"] + r["seconds/score"] for r in training)
    before, after = evaluations["before"], evaluations["after"]
    cells = (
        task,
        str(seed),
        f"{before['return']:.1f}",
        f"{after['return']:.1f} ± {after['return_std']:.1f}",
        str(after["episodes"]),
        f"{steps:,.0f}",
        f"{seconds / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/ppo_reference"))
    arguments, overrides = parser.parse_known_args()
    print(
        "| task | seed | return before | return after (± std) | episodes | env steps | minutes |\n|---|---|---|---|---|---|---|"
    )
    output, runs = arguments.output.resolve(), [(task, seed) for task in arguments.tasks for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(run_once, task, seed, output, overrides) for task, seed in runs]
        for (task, seed), job in zip(runs, jobs, strict=True):
            print(row(task, seed, job.result()), flush=True)
    for task in arguments.tasks:
        print(f"\n{task}, published: {PUBLISHED[task]}")


if __name__ == "__main__":
    main()
