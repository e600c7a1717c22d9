"""What scoring conversations costs side by side, padded, and end to end in lines of several lengths, packed.

    python benchmarks/packing.py [--only imitation groups] [--lines 512 1024 2048 4096] [--width 96] [--layers 4] [--steps 5]

A step scores 32 conversations of mixed lengths, forward and backward, as imitation and RL do (policies/chat_parts/scoring.py), in
float32 with sdpa attention. ``imitation``: nothing in common, 40 to 900 tokens, most of them short. ``groups``: groups of eight
that share a question of 60 to 400 tokens and go on for 20 to 300. Words alone, since pictures cost the same either way; random
weights in the architecture of assets/tiny_qwen_vl_architecture, which ``--width`` and ``--layers`` make larger.

Each way is a process of its own, forked from this one. They take turns, step by step, so that what else the machine does hits all
alike. CPU seconds are processor time of the process, the median after a step that is not counted. Memory is what the process had
at most (ru_maxrss) beyond what it had before its first step: activations, gradients and masks. Tokens are those that are read,
padding included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText

from mmrl.registry import ROOT
from policies.chat_parts.engine import Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Line, Piece, Rows, Said
from policies.chat_parts.qwen import QwenNetwork
from policies.chat_parts.scoring import score
from policies.shared.vision_language import fan_in_init

ARCHITECTURE = ROOT / "assets" / "tiny_qwen_vl_architecture"
CONVERSATIONS, GROUP, HEAD = 32, 8, 32  # HEAD: width of an attention head
_FORK: Any = multiprocessing.get_context("fork")
Conversations = list[tuple[Piece, ...]]


def network(width: int, layers: int) -> Network:
    config: Any = AutoConfig.from_pretrained(ARCHITECTURE)
    text = config.text_config
    text.hidden_size, text.intermediate_size = width, 3 * width
    text.num_attention_heads = text.num_key_value_heads = width // HEAD
    text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    config.vision_config.out_hidden_size = width
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    fan_in_init(model)
    return QwenNetwork(model.eval(), 0, None)


def heard(dice: random.Random, count: int) -> Heard:
    return Heard(torch.tensor([dice.randrange(7, 500) for _ in range(count)]), torch.arange(count).expand(3, -1), count)


def said(dice: random.Random, count: int) -> Said:
    return Said(torch.tensor([dice.randrange(7, 500) for _ in range(count)]))


def imitation(dice: random.Random) -> Conversations:
    """Two turns each."""
    rows: Conversations = []
    for _ in range(CONVERSATIONS):
        length = min(900, max(40, int(dice.lognormvariate(5.0, 0.8))))
        quarter = length // 4
        rows.append((heard(dice, length - 3 * quarter), said(dice, quarter), heard(dice, quarter), said(dice, quarter)))
    return rows


def groups(dice: random.Random) -> Conversations:
    questions = [heard(dice, dice.randint(60, 400)) for _ in range(CONVERSATIONS // GROUP)]
    return [(question, said(dice, dice.randint(20, 300))) for question in questions for _ in range(GROUP)]


CASES = {"imitation": imitation, "groups": groups}


class Way:
    """A process that scores ``rows``: side by side, or in lines of ``pack`` tokens."""

    def __init__(self, chosen: Network, rows: Conversations, pack: int | None, threads: int) -> None:
        self.pack = pack
        self._here, there = _FORK.Pipe()
        self._process = _FORK.Process(target=serve, args=(chosen, rows, pack, threads, there), daemon=True)
        self._process.start()
        self.steps: list[tuple[float, int, int, float]] = []

    def step(self) -> None:
        self._here.send(True)
        self.steps.append(self._here.recv())

    def close(self) -> None:
        self._here.send(False)
        self._process.join()


def serve(chosen: Network, rows: Conversations, pack: int | None, threads: int, there: Any) -> None:
    """Steps as long as they are asked for: CPU seconds, passes, tokens read, and MiB beyond those at first."""
    torch.set_num_threads(threads)
    passes = counted(chosen)
    before = memory()
    while there.recv():
        passes.clear()
        began = time.process_time()
        scores = score(chosen, rows, Sampling(1.0, None, ()), 1024, pack)
        chosen.model.zero_grad()
        (scores.log_probs_M.mean() + 0.01 * scores.entropy_M.mean()).backward()
        there.send((time.process_time() - began, len(passes), sum(passes), memory() - before))


def counted(chosen: Network) -> list[int]:
    """Tokens of each pass from now on, padding included."""
    passes: list[int] = []
    hidden, hidden_of_line = chosen.hidden, chosen.hidden_of_line

    def side_by_side(rows: Rows, **options: Any) -> torch.Tensor:
        passes.append(rows.ids_NL.numel())
        return hidden(rows, **options)

    def end_to_end(line: Line) -> torch.Tensor:
        passes.append(len(line.ids_T))
        return hidden_of_line(line)

    chosen.hidden, chosen.hidden_of_line = side_by_side, end_to_end  # type: ignore[method-assign]
    return passes


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(chosen: Network, rows: Conversations, packs: Sequence[int | None], steps: int, threads: int, name: str) -> list[Way]:
    ways = [Way(chosen, rows, pack, threads) for pack in packs]
    for _ in track(range(1 + steps), name, transient=True):
        for way in ways:
            way.step()
    for way in ways:
        way.close()
    return ways


def table(ways: Sequence[Way]) -> Table:
    made = Table("", box=MARKDOWN)
    for column in ("CPU s", "of padded", "MiB", "passes", "tokens read"):
        made.add_column(column, justify="right")
    padded = median(seconds for seconds, *_ in ways[0].steps[1:])
    for way in ways:
        seconds = median(step[0] for step in way.steps[1:])
        _, passes, tokens, most = way.steps[-1]
        label = "side by side, padded" if way.pack is None else f"lines of {way.pack}"
        made.add_row(label, f"{seconds:.2f}", f"{seconds / padded:.2f}x", f"{most:.0f}", str(passes), f"{tokens:,}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--lines", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="tokens of a line")
    parser.add_argument("--width", type=int, default=96, help=f"of hidden states, a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before processes are forked: threads do not come along
    chosen, console = network(arguments.width, arguments.layers), Console(width=110)
    parameters = sum(p.numel() for p in chosen.model.parameters())
    for name in arguments.only:
        rows = CASES[name](random.Random(0))
        tokens = sum(len(piece) for row in rows for piece in row)
        ways = measure(chosen, rows, [None, *arguments.lines], arguments.steps, arguments.threads, name)
        console.print(
            f"{name}: {len(rows)} conversations, {tokens:,} tokens, {parameters:,} parameters; "
            f"{arguments.threads} thread(s), median of {arguments.steps} steps"
        )
        console.print(table(ways))


if __name__ == "__main__":
    main()
