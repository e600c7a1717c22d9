"""Write the architecture and tokenizer of a tiny pi0 for robots (no weights): ``python assets/make_tiny_robot_pi0.py [FOLDER]``.

As ``assets/make_tiny_pi0.py`` has it, but for states of 8 numbers and actions of 7, chunks of 10, and the words of ManiSkill's
and LIBERO's instructions (which needs the extra libero). ``configs/ppo_pi0_maniskill.yaml`` and ``ppo_pi0_libero.yaml`` train it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
from libero.libero import benchmark

from assets.make_tiny_pi0 import build_config, build_tokenizer
from simulators.libero_parts.options import LIMITS
from simulators.maniskill_parts.options import INSTRUCTIONS


def sentences() -> Iterator[str]:
    for of_task in INSTRUCTIONS.values():
        yield from of_task
    for name in LIMITS:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces the order of its tasks
            suite = benchmark.get_benchmark_dict()[name]()
        yield from (suite.get_task(task).language for task in range(suite.n_tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "tiny_robot_pi0_architecture")
    folder = parser.parse_args().folder
    tokenizer = build_tokenizer(word for sentence in sentences() for word in sentence.split())
    build_config(len(tokenizer), chunk_size=10, max_state_dim=8, max_action_dim=7).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
