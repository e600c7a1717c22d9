"""How fast the tabletop is, where its time goes, and how that grows with the number of environments.

    python benchmarks/simulator.py [--device cpu] [--seconds 1.5] [--threads 2]

Every row steps random actions, one action per observation, and resets everything each 20 steps. The parts are timed alone:
physics (laws, judging, bookkeeping), paint (sprites onto the label map), colour (labels to pixels). "cpu" is processor time
over wall time: well below the number of threads, it says that other programs had the processor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from simulators.tabletop import Tabletop

SIZES = (64, 256, 1024, 4096)


def seconds_per_call(run: Callable[[], object], budget: float, device: torch.device) -> tuple[float, float]:
    """Mean wall time of one call over about ``budget`` seconds after a warm-up, and processor time per wall time."""
    for _ in range(3):
        run()
    synchronise(device)
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < budget:
        run()
        synchronise(device)
        calls += 1
    wall = time.perf_counter() - start
    return wall / calls, (time.process_time() - cpu) / wall


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


def measure(num_envs: int, budget: float, device: torch.device) -> list[float]:
    """One row: env steps/s rendered and on state alone, then milliseconds of physics, paint, colour, reset; cpu share."""
    rendered = Tabletop(Tabletop.Config(), num_envs=num_envs, device=device)
    state_only = Tabletop(Tabletop.Config(render=False), num_envs=num_envs, device=device)
    ids = torch.arange(num_envs, device=device)
    with_images, share = seconds_per_call(stepper(rendered), budget, device)
    without, _ = seconds_per_call(stepper(state_only), budget, device)
    rendered.reset(ids)
    camera, background = rendered._cameras["front"], rendered._backgrounds["front"]
    canvas = camera.labels(background, rendered._layout, rendered._state)
    action, alive = torch.zeros(num_envs, 4, device=device), torch.ones(num_envs, dtype=torch.bool, device=device)
    parts = (
        lambda: rendered._advance(action, alive),
        lambda: camera.labels(background, rendered._layout, rendered._state),
        lambda: camera.colour(canvas, rendered._palette_BP),
        lambda: rendered.reset(ids),
    )
    milliseconds = [1000 * seconds_per_call(part, budget / 3, device)[0] for part in parts]
    return [num_envs / with_images, num_envs / without, *milliseconds, share]


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
    print("   envs  rendered/s  state only/s  physics ms  paint ms  colour ms  reset ms   cpu")
    for num_envs in SIZES:
        rendered, state_only, physics, paint, colour, reset, share = measure(num_envs, arguments.seconds, device)
        row = f"{physics:11.2f} {paint:9.2f} {colour:10.2f} {reset:9.2f} {share:5.2f}"
        print(f"{num_envs:7d} {rendered:11,.0f} {state_only:13,.0f} {row}", flush=True)


if __name__ == "__main__":
    main()
