"""How fast the tabletop is, where its time goes, and how that grows with the number of environments.

    python benchmarks/simulator.py [--device cpu] [--seconds 1.5] [--threads 2]

Every row steps random actions, one action per observation, and resets everything each 20 steps. The parts are timed alone:
physics (laws, judging, bookkeeping), paint (sprites onto the label map), colour (labels to pixels), and reset of all episodes.

On a machine that does other work too, the wall clock measures that work. So beside each rate stands the one per second of
processor time ("per cpu s"), which other programs hardly touch as long as torch has one thread (--threads 1); with more, threads
that wait for one another count as busy. Milliseconds of the parts are processor time too. "cpu" is processor time over wall time
of both loops together: where it is below 1, other programs had the processor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simulators.tabletop import Tabletop

SIZES = (64, 256, 1024, 4096)


@dataclass(frozen=True)
class Cost:
    """What one call takes: seconds on the wall clock, and of processor time over all threads."""

    wall: float
    cpu: float


def cost_per_call(run: Callable[[], object], budget: float, device: torch.device) -> Cost:
    """Mean over about ``budget`` seconds, after a warm-up."""
    for _ in range(3):
        run()
    synchronise(device)
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < budget:
        run()
        synchronise(device)
        calls += 1
    return Cost((time.perf_counter() - start) / calls, (time.process_time() - cpu) / calls)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stepper(env: Tabletop) -> Callable[[], object]:
    """A function that takes one step with random actions, and resets all episodes every 20 steps."""
    generator = torch.Generator().manual_seed(0)
    actions = (torch.rand(20, env.num_envs, 1, 4, generator=generator) * 2 - 1).to(env.device)
    ids = torch.arange(env.num_envs, device=env.device)
    count = 0

    def run() -> None:
        nonlocal count
        if count % 20 == 0:
            env.reset(ids + count)
        env.step(actions[count % 20])
        count += 1

    return run


def measure(num_envs: int, budget: float, device: torch.device) -> str:
    """One row of the table."""
    rendered = Tabletop(Tabletop.Config(), num_envs=num_envs, device=device)
    state_only = Tabletop(Tabletop.Config(render=False), num_envs=num_envs, device=device)
    ids = torch.arange(num_envs, device=device)
    seeing, blind = (cost_per_call(stepper(env), budget, device) for env in (rendered, state_only))
    rendered.reset(ids)
    camera, background = rendered._cameras["front"], rendered._backgrounds["front"]
    canvas = camera.labels(background, rendered._layout, rendered._state)
    action, alive = torch.zeros(4, num_envs, device=device), torch.ones(num_envs, dtype=torch.bool, device=device)
    parts = (
        lambda: rendered._advance(action, alive),
        lambda: camera.labels(background, rendered._layout, rendered._state),
        lambda: camera.colour(canvas, rendered._palette_BP),
        lambda: rendered.reset(ids),
    )
    rates = "".join(f"{num_envs / rate:11,.0f}" for cost in (seeing, blind) for rate in (cost.wall, cost.cpu))
    milliseconds = "".join(f"{1000 * cost_per_call(part, budget / 3, device).cpu:9.2f}" for part in parts)
    share = (seeing.cpu + blind.cpu) / (seeing.wall + blind.wall)
    return f"{num_envs:7d}{rates}{milliseconds}{share:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of simulators/tabletop.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.5, help="per measurement")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(
        f"{device}, {arguments.threads} threads, torch {torch.__version__}; targets at 256: 10,000 rendered, 100,000 state only"
    )
    print("          rendered            state only            processor ms of")
    print("   envs     per s  per cpu s      per s  per cpu s  physics    paint   colour    reset    cpu")
    for num_envs in SIZES:
        print(measure(num_envs, arguments.seconds, device), flush=True)


if __name__ == "__main__":
    main()
