"""What it is worth to act for one part of the environments while the other simulates (``collect.parts: 2``).

    python benchmarks/overlap.py [--only waiting quickstart tabletop maniskill] [--rounds 5] [--parts 2] [--free]

Serial is one environment that is stepped, then acted for. Pipelined are ``--parts`` of equal size, each of which simulates in a
process of its own (ManiSkill: in its share of the serial one's workers). Both collect the same rollouts by turns, so that they
see the same load of other programs. Serial seconds are split into simulation (within the environment) and policy (all else),
and the bound is max(simulation, policy) / (simulation + policy): where one dwarfs the other, there is little to gain.

Overlap pays only where simulation and policy do not want the same processors: on two processors, not where either side keeps
both busy by itself. So that nothing but the overlap is gained, the processes that simulate are kept on one half of the
processors and the policy on the other, on one thread (``--free``: all on all). Two halves of a batch also take a policy longer
than the whole (a small one on small batches, much longer) or shorter (smaller tensors, no simulation in the same process); then
pipelined may be faster than the bound, and says nothing about the pipeline.

"cpu" is processor time over wall time, of all processes: 1 where serial was alone on the machine, between 1 and 2 where
pipelined was. Where it is lower, other programs had the processors, and the figures say little. ``waiting`` is the control:
there both sides only wait, as if each had a machine of its own, so what it lacks is what the pipeline itself loses. Of 20
decisions that is half of one, 2.5 %: nobody acts while the last part simulates for the last time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from assets.make_tiny_pi0 import build_config, build_tokenizer
from mmrl.component import Component
from mmrl.config import load
from mmrl.numerics.draws import Draws
from mmrl.protocols import Environment
from mmrl.rollout import Collector
from mmrl.types import ActionSpec, Decision, Examples, Observation, Step
from mmrl.workers.remote import RemoteEnvironment

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
_TICK = os.sysconf("SC_CLK_TCK")


# -- a simulator and a policy that wait --------------------------------------------------------------------------------


class Waiting:
    """Every slot takes 2 ms of waiting, and shows a camera image."""

    max_steps, action_spec = 1_000_000, ActionSpec(1, (-1.0,), (1.0,))

    def __init__(self, config: None, *, num_envs: int, device: torch.device) -> None:
        self.num_envs = num_envs

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        return self._observe()

    def step(self, actions_BCA: Tensor) -> Step:
        time.sleep(0.002 * self.num_envs)
        zeros_B = torch.zeros(self.num_envs)
        no_B = zeros_B > 0
        return Step(self._observe(), zeros_B[:, None], ~no_B[:, None], no_B, no_B, {"success": zeros_B})

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("waiting",) * len(task_ids_M)

    def close(self) -> None: ...

    def _observe(self) -> Observation:
        image = torch.zeros(self.num_envs, 64, 64, 3, dtype=torch.uint8)
        return Observation({"front": image}, torch.zeros(self.num_envs, 4), ("wait",) * self.num_envs)


class Patient:
    """Decides after 2 ms a row."""

    version = 0

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        time.sleep(0.002 * len(draws))
        zeros_B1 = torch.zeros(len(draws), 1)
        return Decision(zeros_B1[:, None], {**observation.images}, zeros_B1, zeros_B1 == 0, None)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Clocked:
    """A serial environment and the seconds spent in it."""

    def __init__(self, inner: Environment) -> None:
        self.inner, self.seconds = inner, 0.0
        self.num_envs, self.action_spec, self.max_steps = inner.num_envs, inner.action_spec, inner.max_steps

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        return self._timed(lambda: self.inner.reset(task_ids_B, where_B))

    def step(self, actions_BCA: Tensor) -> Step:
        return self._timed(lambda: self.inner.step(actions_BCA))

    def _timed(self, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return run()
        finally:
            self.seconds += time.perf_counter() - start

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return self.inner.family_of(task_ids_M)

    def close(self) -> None:
        self.inner.close()


@dataclass
class Case:
    """What is measured: ``make(size)`` is an environment in this process, or one with workers."""

    title: str
    num_envs: int
    decisions: int
    make: Callable[[int], Environment]
    make_part: Callable[[int], Environment]
    make_policy: Callable[[Environment], Any]


@dataclass
class Times:
    """Seconds per 1,000 decisions, one entry a round, and processor time over wall time."""

    serial: list[float] = field(default_factory=list)
    simulation: list[float] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)
    pipelined: list[float] = field(default_factory=list)
    serial_cpu: list[float] = field(default_factory=list)
    pipelined_cpu: list[float] = field(default_factory=list)


def pids_of(environments: Sequence[Any]) -> list[int]:
    """Of the processes that simulate."""
    inner = [getattr(environment, "inner", environment) for environment in environments]
    pools = [getattr(environment, "pool", getattr(getattr(environment, "_inner", None), "pool", None)) for environment in inner]
    return [pid for pool in pools if pool is not None for pid in pool.pids]


def processor_seconds(pids: Sequence[int]) -> float:
    """Of this process and those."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return time.process_time() + sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICK


def collect(collector: Collector, policy: Any) -> tuple[float, float, int]:
    """Seconds, processor time over wall time, and decisions of one rollout; of the same tasks every time."""
    collector.next_task = 1000
    pids = pids_of(collector.environments)
    start, cpu = time.perf_counter(), processor_seconds(pids)
    rollout = collector.collect(policy)
    wall = time.perf_counter() - start
    return wall, (processor_seconds(pids) - cpu) / wall, rollout.decisions


def measure(case: Case, parts: int, rounds: int, place: Callable[[bool], None]) -> Times:
    place(True)  # the processes that simulate are started here
    whole = Clocked(case.make(case.num_envs))
    pieces = [case.make_part(case.num_envs // parts) for _ in range(parts)]
    place(False)
    policy, times = case.make_policy(whole), Times()
    options: Any = {"decisions": case.decisions, "seed": 0, "device": CPU, "auto_reset": False}
    serial, pipelined = Collector([whole], **options), Collector(pieces, **options)
    for warm in (serial, pipelined):
        collect(warm, policy)

    def serially() -> None:
        whole.seconds = 0.0
        wall, cpu, decisions = collect(serial, policy)
        times.serial.append(1000 * wall / decisions)
        times.simulation.append(1000 * whole.seconds / decisions)
        times.policy.append(times.serial[-1] - times.simulation[-1])
        times.serial_cpu.append(cpu)

    def in_parts() -> None:
        wall, cpu, decisions = collect(pipelined, policy)
        times.pipelined.append(1000 * wall / decisions)
        times.pipelined_cpu.append(cpu)

    for number in range(rounds):
        for run in (serially, in_parts) if number % 2 == 0 else (in_parts, serially):
            run()
    for environment in (whole, *pieces):
        environment.close()
    return times


def report(case: Case, times: Times) -> None:
    print(f"\n{case.title}: {case.num_envs} environments, {case.decisions} decisions each; seconds per 1,000 decisions")
    print("   serial = simulation + policy    cpu   pipelined    cpu")
    rows = zip(times.serial, times.simulation, times.policy, times.serial_cpu, times.pipelined, times.pipelined_cpu, strict=True)
    for serial, simulation, policy, serial_cpu, pipelined, pipelined_cpu in rows:
        print(f"{serial:9.2f} {simulation:12.2f} {policy:8.2f} {serial_cpu:6.2f} {pipelined:11.2f} {pipelined_cpu:6.2f}")
    for name, choose in (("best", min), ("median", median)):
        simulation, policy, pipelined = choose(times.simulation), choose(times.policy), choose(times.pipelined)
        serial, floor = simulation + policy, max(simulation, policy)
        gain = f"{serial / pipelined:.2f}x of at most {serial / floor:.2f}x"
        shares = f"{floor / pipelined:.0%} of that speed, {(serial - pipelined) / (serial - floor):.0%} of that saving"
        print(f"{name}: {simulation:.2f} + {policy:.2f} = {serial:.2f} serial, {pipelined:.2f} pipelined,", end=" ")
        print(f"bound {floor / serial:.2f}: {gain} ({shares})", flush=True)


# -- what is measured --------------------------------------------------------------------------------------------------


def remote(component: Component, size: int) -> Environment:
    return RemoteEnvironment(component.target, component.config, num_envs=size, device=CPU)


def waiting() -> Case:
    module = __spec__.name if __spec__ else Path(__file__).stem  # as a process that simulates can import it
    part = partial(RemoteEnvironment, f"{module}:Waiting", None, device=CPU)
    return Case(
        "waiting, without processors",
        32,
        20,
        lambda size: Waiting(None, num_envs=size, device=CPU),
        lambda size: part(num_envs=size),
        lambda _: Patient(),
    )


def tabletop(title: str, num_envs: int, policy: dict[str, Any], **fields: Any) -> Case:
    config = load(ROOT / "configs/quickstart.yaml", [f"policy.checkpoint={ROOT / 'assets/tiny_pi0'}"])
    environment = config.environment.override({"families": ["sort"], **fields})

    def make(size: int) -> Environment:
        return environment.build(num_envs=size, device=CPU)

    return Case(
        title, num_envs, 12, make, partial(remote, environment), lambda _: config.policy.override(policy).build(device=CPU)
    )


def maniskill() -> Case:
    block = {"target": "simulators.maniskill:ManiSkill", "task": "PushCube-v1", "image_size": 64, "backend": "cpu"}

    def make(size: int) -> Environment:
        component = Component.parse({**block, "max_steps": 1000, "workers": size // 4})
        return component.build(num_envs=size, device=CPU)

    return Case("ManiSkill PushCube-v1, four environments a worker", 8, 10, make, make, large_pi0)


def large_pi0(environment: Environment) -> Any:
    """A pi0 with random weights that takes about as long as ManiSkill does on a processor."""
    observation = environment.reset(torch.arange(environment.num_envs))
    assert observation.state is not None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer()
        config: Any = build_config(len(tokenizer), width=240, layers=6, vision_layers=4, patch=8)
        config.max_state_dim, config.max_action_dim = observation.state.shape[1], environment.action_spec.dim
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        fields = {"weights": "random", "action_dim": environment.action_spec.dim, "cameras": list(observation.images)}
        noise = {"sampler": "flow_sde", "noise_level": 0.5, "denoising_steps": 4, "max_text_tokens": 16, "attention": "eager"}
        policy = Component.parse({"target": "policies.pi0:Pi0", "checkpoint": folder, **fields, **noise}).build(device=CPU)
    rows = len(observation.instructions)
    generator = torch.Generator().manual_seed(0)
    actions_BHA = torch.rand(rows, policy.horizon, environment.action_spec.dim, generator=generator) - 0.5
    policy.fit_statistics(Examples(observation, actions_BHA, torch.ones(rows, policy.horizon, dtype=torch.bool)))
    return policy


CASES: dict[str, Callable[[], Case]] = {
    "waiting": waiting,
    "quickstart": partial(tabletop, "tabletop as in the quickstart, tiny pi0", 256, {}),
    "tabletop": partial(
        tabletop, "tabletop with two cameras of 192x192, tiny pi0", 64, {"denoising_steps": 2}, image_size=192, wrist_camera=True
    ),
    "maniskill": maniskill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The gain from acting while the environments simulate")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--free", action="store_true", help="let every process run on every processor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    pinned = half > 0 and not arguments.free

    def place(simulating: bool) -> None:
        if pinned:
            os.sched_setaffinity(0, cores[half:] if simulating else cores[:half])

    how = f"policy on {half}, simulation on {len(cores) - half} of them" if pinned else "shared"
    print(f"{len(cores)} processors ({how}), {arguments.parts} parts, torch {torch.__version__}")
    for name in arguments.only:
        case = CASES[name]()
        report(case, measure(case, arguments.parts, arguments.rounds, place))


if __name__ == "__main__":
    main()
