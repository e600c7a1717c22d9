"""How often the scripted experts solve their tasks, and how fast the simulators that run in workers are.

    python benchmarks/experts.py [--episodes 100] [--num-envs 4] [--workers 1] [--control pd_ee_delta_pose] [--render] [TASK ...]

Prints a line for each ManiSkill task: success with its 95 % Wilson interval, mean length, and steps/s over all workers.
"""

from __future__ import annotations

import argparse
import time

import torch

from mmrl.numerics.statistics import wilson_interval
from simulators.maniskill import ManiSkill

TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1", "PlaceSphere-v1")


def main() -> None:
    parser = argparse.ArgumentParser(description="Success of the scripted experts.")
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--control", default="pd_ee_delta_pose")
    parser.add_argument("--render", action="store_true", help="with images of 128 x 128, which the expert does not look at")
    options = parser.parse_args()
    print(f"{'task':<16} {'success':>8} {'95 % interval':>16} {'episodes':>9} {'length':>7} {'steps/s':>8}")
    for task in options.tasks:
        print(measure(task, options), flush=True)


def measure(task: str, options: argparse.Namespace) -> str:
    config = ManiSkill.Config(task=task, control_mode=options.control, render=options.render, workers=options.workers)
    environment = ManiSkill(config, num_envs=options.num_envs, device=torch.device("cpu"))
    solved, steps, seconds, episodes = 0, 0, 0.0, 0
    for tasks in torch.arange(options.episodes).split(options.num_envs):
        kept = len(tasks)
        environment.reset(torch.cat([tasks, tasks[-1:].expand(options.num_envs - kept)]))
        started = time.perf_counter()
        done = False
        while not done:
            step = environment.step(environment.expert_action()[:, None])
            steps += int(step.valid_BC[:kept].sum())
            done = bool(step.done_B.all())
        seconds += time.perf_counter() - started
        solved += int(step.metrics["success"][:kept].sum())
        episodes += kept - int(step.lost_B[:kept].sum())
    environment.close()
    low, high = wilson_interval(solved, episodes)
    rate = f"{solved / episodes:8.1%} [{low:6.1%}, {high:6.1%}]"
    return f"{task:<16} {rate} {episodes:>9} {steps / episodes:7.1f} {steps / seconds:8.1f}"


if __name__ == "__main__":
    main()
