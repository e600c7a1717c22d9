"""What a GRPO step of a vision-language model costs here and in TRL's GRPOTrainer.

    python benchmarks/vlm_grpo.py [--only one_turn three_turns] [--steps 15] [--threads 1] [--completions 32] [--group 8]

The same random weights (assets/tiny_qwen_vl_architecture, 0.8 million parameters), questions with a picture each, reward, group,
loss (GRPO's clipped surrogate, mean over tokens, no KL), AdamW, clipping and float32; one update from every rollout. Nothing but
temperature 1 shapes what is drawn, and TRL's gradient checkpointing is off. Every turn has exactly ``--tokens`` tokens: the end
of a turn is never drawn (here it is forbidden, there ``min_new_tokens`` forbids it).

``one_turn`` answers a question. ``three_turns`` goes on twice: a tool crops the picture (tools/crop.py) and shows the part. TRL's
own tool loop does that too, but a random model calls nothing, so that its parser is told to find a call; it reads the whole
conversation again in every turn. ``cache dropped`` does so here.

Each side is a process. They take turns, step by step, so that what else the machine does hits all alike. Costs are medians after
``--warm`` steps, by the clock and in processor time of the process, which other programs disturb less. Memory is the largest
that the process had (ru_maxrss), libraries included, and how much of that came after model and optimizer stood. The floor is the
passes of the step alone, bare: see vlm_grpo_parts/floor.py. Needs ``pip install trl``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import ROOT, Process
from vlm_grpo_parts.task import Task

from policies.qwen_vl import QwenVL

ARCHITECTURE = ROOT / "assets" / "tiny_qwen_vl_architecture"
TURNS = {"one_turn": 1, "three_turns": 3}


@dataclass(frozen=True)
class Side:
    """name: in the table. module: what runs. task: what it does."""

    name: str
    module: str
    task: Task


def sides(task: Task) -> list[Side]:
    chosen = [Side("mmrl", "ours", task)]
    if task.turns > 1:
        chosen.append(Side("mmrl, cache dropped", "ours", replace(task, keep=False)))
    return [*chosen, Side("TRL", "trl_side", task), Side("floor", "floor", task)]


def measure(task: Task, steps: int, warm: int) -> list[Process]:
    logs = Path(task.checkpoint)
    processes = [
        Process(side.name, f"vlm_grpo_parts.{side.module}", side.task.written(), side.task.threads, logs / f"{number}.log")
        for number, side in enumerate(sides(task))
    ]
    try:
        for process in processes:
            process.wait()
        for _ in track(range(warm + steps), f"{task.turns} turn(s)", transient=True):
            for process in processes:
                process.step()
    finally:
        for process in processes:
            process.close()
    for process in processes:
        process.steps = process.steps[warm:]
    return processes


def table(title: str, processes: Sequence[Process]) -> Table:
    made = Table("", title=title, title_justify="left", box=MARKDOWN)
    columns = (
        "CPU s",
        "of them generating",
        "learning",
        "s by the clock",
        "MiB",
        "of them for steps",
        "TRL's CPU s / its",
        "by the clock",
    )
    for column in columns:
        made.add_column(column, justify="right")
    theirs = next(process for process in processes if process.name == "TRL")
    for process in processes:
        memory = max(process.of("memory"))
        cpu, generating = process.of("cpu"), process.of("generate_cpu")
        learning = [whole - part for whole, part in zip(cpu, generating, strict=True)]
        made.add_row(
            process.name,
            *(f"{median(seconds):.3f}" for seconds in (cpu, generating, learning, process.of("wall"))),
            f"{memory:.0f}",
            f"{memory - process.about['memory']:.0f}",
            *(f"{median(theirs.of(clock)) / median(process.of(clock)):.2f}x" for clock in ("cpu", "wall")),
        )
    return made


def weights(folder: Path, seed: int = 0) -> None:
    config = QwenVL.Config(checkpoint=str(ARCHITECTURE), weights="random", seed=seed)
    QwenVL(config, device=torch.device("cpu")).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TURNS), default=list(TURNS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--completions", type=int, default=32, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a question")
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    arguments = parser.parse_args()
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        weights(Path(folder))
        for name in arguments.only:
            task = Task(folder, arguments.completions, arguments.group, arguments.tokens, TURNS[name], arguments.threads)
            processes = measure(task, arguments.steps, arguments.warm)
            about, said = processes[0].about, {int(tokens) for process in processes for tokens in process.of("tokens")}
            assert said == {task.completions * task.tokens * task.turns}, f"{name}: sides said {said} tokens"
            title = (
                f"{name}: {task.completions} completions in groups of {task.group}, {task.turns} x {task.tokens} tokens, "
                f"{about['parameters']:,} parameters, {about['prompt_tokens'] / task.prompts:.0f} tokens of prompt; "
                f"{task.threads} thread(s), median of {arguments.steps} steps"
            )
            console.print(table(title, processes))


if __name__ == "__main__":
    main()
