"""What a Flow-GRPO step of an image generator costs here and in the loop that one would write first around diffusers' pipeline.

    python benchmarks/t2i_step.py [--train all lora] [--window 0 3] [--sweep] [--repeats 6] [--threads 1] [--size 32]
    python benchmarks/t2i_step.py --preset sd35 --device cuda --dtype bfloat16 --train lora --size 512 --batch 4

The same weights (by default assets/tiny_sd3_architecture, fresh), prompts, groups, steps, guidance, loss (the branch without
prompt detached, as published), AdamW and clipping; one update from every rollout. ``plain`` encodes the prompt of every picture,
makes every step of every picture, asks for both branches at once, and goes back after each step (t2i_step_parts/plain.py).
``mmrl`` goes back after each step, too, but encodes a prompt once, makes what a group shares once (with ``--window``), puts the
branch that is detached through no backward pass, and takes what it said in the rollout as long as the weights are those (here
always; of several updates of a rollout, in the first). Adapters it adds to the weights (policies/shared/whole_adapters.py). The
floor is the bare passes of the transformer that are left (floor.py), counted for the share of the matrix rate.

``--window 0`` trains all steps but the last (Flow-GRPO), ``--window 3`` three in a row whose place moves (MixGRPO, Fast), behind
a prefix that pictures of a prompt share; ``plain`` begins from the same noise there but knows no sharing.
Before anything is measured, both must find the same step equally likely.

Each side is a process; they take turns, step by step. Costs are medians after ``--warm`` steps, by the clock and in processor
time of the process, which other programs disturb less (on a GPU only the clock counts). Memory is the most that the process had
(ru_maxrss, libraries included), or had on the GPU. ``--sweep`` varies size, steps and group one at a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import ROOT, Process
from t2i_step_parts.task import Task

ARCHITECTURE = ROOT / "assets" / "tiny_sd3_architecture"
PRESETS = ("sd35",)  # of t2i_step_parts/presets.py
SIDES = {"mmrl": "ours", "plain": "plain", "floor": "floor"}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of the log-probabilities of both sides, relative
SWEEP = {"size": (16, 32, 64), "steps": (5, 10, 20), "group": (2, 4, 8, 16)}


@dataclass(frozen=True)
class Measured:
    """A task's costs: sides by name, clock: what ratios are of (cpu or wall)."""

    task: Task
    sides: dict[str, Process]

    @property
    def clock(self) -> str:
        return "wall" if self.task.device.startswith("cuda") else "cpu"

    def cost(self, side: str, name: str) -> float:
        return median(self.sides[side].of(name))

    def ratio(self, side: str, clock: str) -> float:
        """How many times as long the plain loop takes."""
        return self.cost("plain", clock) / self.cost(side, clock)

    def share(self, side: str) -> float:
        """Of the matrix rate: what the floor's passes would take at it, by what the side took."""
        about = self.sides["floor"].about
        return about["flops"] / about["matrix_rate"] / self.cost(side, self.clock)


def measure(task: Task, repeats: int, warm: int, label: str) -> Measured:
    with tempfile.TemporaryDirectory() as logs:
        sides = {
            name: Process(name, f"t2i_step_parts.{module}", task.written(), task.threads, Path(logs) / f"{name}.log")
            for name, module in SIDES.items()
        }
        try:
            for side in sides.values():
                side.wait()
            _agree(sides, TOLERANCE[task.dtype])
            for _ in track(range(warm + repeats), label, transient=True):
                for side in sides.values():
                    side.step()
        finally:
            for side in sides.values():
                side.close()
    for side in sides.values():
        side.steps = side.steps[warm:]
    return Measured(task, sides)


def _agree(sides: dict[str, Process], tolerance: float) -> None:
    ours, theirs = sides["mmrl"].about["probe"], sides["plain"].about["probe"]
    if any(abs(a - b) > tolerance * max(abs(a), abs(b)) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"the sides compute different things: the same steps have log-probabilities {ours} and {theirs}")


def table(measured: Measured) -> Table:
    task, about = measured.task, measured.sides["mmrl"].about
    kind = f"window of {task.window}" if task.window else "all steps but the last"
    title = (
        f"{task.train}, {kind}: {task.pictures} pictures of {task.size} x {task.size} in groups of {task.group}, "
        f"{task.steps} steps, {task.batch} at a time, {about['trained']:,} of {about['parameters']:,} parameters, "
        f"{task.dtype} on {task.device}, {task.threads} thread(s); median of {len(measured.sides['mmrl'].steps)} steps"
    )
    made = Table("", title=title, title_justify="left", box=MARKDOWN)
    columns = ("CPU s", "sampling", "training", "s by the clock", "images/s sampled", "trained", "in all")
    for column in (*columns, "plain's CPU s / its", "by the clock", "of the matrix rate", "MiB"):
        made.add_column(column, justify="right")
    clock = measured.clock
    for name, side in measured.sides.items():
        cpu, sampling = measured.cost(name, "cpu"), measured.cost(name, "sample_cpu")
        whole, part = measured.cost(name, clock), measured.cost(name, f"sample_{clock}")
        made.add_row(
            name,
            *(f"{seconds:.2f}" for seconds in (cpu, sampling, cpu - sampling, measured.cost(name, "wall"))),
            *(f"{task.pictures / seconds:.2f}" for seconds in (part, whole - part, whole)),
            *(f"{measured.ratio(name, each):.2f}x" for each in ("cpu", "wall")),
            f"{measured.share(name):.0%}",
            f"{max(side.of('memory')):.0f}",
        )
    return made


def sweep(task: Task, repeats: int, warm: int) -> Table:
    """One thing at a time is varied."""
    made = Table("", title=f"{task.train}, seconds a step (images/s, MiB)", title_justify="left", box=MARKDOWN)
    for column in ("mmrl", "plain", "plain's / its", "MiB", "plain's MiB"):
        made.add_column(column, justify="right")
    for field, values in SWEEP.items():
        for value in values:
            changed = replace(task, **{field: value})
            if changed.pictures % changed.group or (changed.window and changed.window >= changed.steps):
                continue
            measured = measure(changed, repeats, warm, f"{field} {value}")
            cells = [measured.cost(name, measured.clock) for name in ("mmrl", "plain")]
            made.add_row(
                f"{field} {value}",
                *(f"{seconds:.2f} ({task.pictures / seconds:.2f})" for seconds in cells),
                f"{measured.ratio('mmrl', measured.clock):.2f}x",
                *(f"{max(measured.sides[name].of('memory')):.0f}" for name in ("mmrl", "plain")),
            )
    return made


def tasks(arguments: argparse.Namespace, checkpoint: str) -> Sequence[Task]:
    """One for each kind of training and window."""
    return [
        Task(
            checkpoint=checkpoint,
            weights=arguments.weights,
            device=arguments.device,
            dtype=arguments.dtype,
            train=train,
            size=arguments.size,
            steps=arguments.steps,
            window=window,
            pictures=arguments.pictures,
            group=arguments.group,
            batch=arguments.batch,
            threads=arguments.threads,
            max_text_tokens=arguments.max_text_tokens,
        )
        for train in arguments.train
        for window in arguments.window
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ARCHITECTURE), help="folder or hub id of a Stable Diffusion 3 or 3.5")
    parser.add_argument("--preset", choices=PRESETS, help="an architecture at its true size, in place of --checkpoint")
    parser.add_argument("--weights", choices=["random", "pretrained"], default="random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--train", nargs="+", choices=["all", "lora"], default=["all", "lora"])
    parser.add_argument("--window", nargs="+", type=int, default=[0, 3], help="steps that are trained; 0: all but the last")
    parser.add_argument("--size", type=int, default=32, help="of the pictures' sides, in pixels")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--pictures", type=int, default=32, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt")
    parser.add_argument("--batch", type=int, default=32, help="pictures that the network sees at a time")
    parser.add_argument(
        "--max-text-tokens", type=int, help="of T5; default: 0 for the tiny architecture, else the pipeline's own"
    )
    parser.add_argument("--repeats", type=int, default=6, help="steps that are measured")
    parser.add_argument("--warm", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--sweep", action="store_true", help="vary size, steps and group instead")
    arguments = parser.parse_args()
    if arguments.max_text_tokens is None and arguments.checkpoint == str(ARCHITECTURE) and not arguments.preset:
        arguments.max_text_tokens = 0  # it has no T5
    return arguments


def written(preset: str, folder: str) -> str:
    """A folder with the architecture; in a process of its own, which finds assets/."""
    surroundings = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-m", "t2i_step_parts.presets", preset, folder]
    subprocess.run(command, cwd=ROOT, env=surroundings, check=True)
    return folder


def main() -> None:
    arguments, console = parse(), Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = written(arguments.preset, folder) if arguments.preset else arguments.checkpoint
        for task in tasks(arguments, checkpoint):
            if arguments.sweep:
                console.print(sweep(task, arguments.repeats, arguments.warm))
            else:
                console.print(table(measure(task, arguments.repeats, arguments.warm, f"{task.train}, window {task.window}")))


if __name__ == "__main__":
    main()
