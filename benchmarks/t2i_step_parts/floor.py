"""The floor of benchmarks/t2i_step.py: a step's passes through the transformer, and nothing else.

Sampling is both branches of guidance at every step, of which those before a window are made once for a prompt. Learning is, for
each trained step, the branch with the prompt, backward, and AdamW: what the other one says is known since it was sampled, as long
as nothing was learned. States and embeddings are random. Adapters are added to the weights, as they are here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from sides import Stopwatch, serve
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from policies.shared.adapters import add_adapters
from t2i_step_parts.task import DTYPES, Task, begin


class Floor:
    """See the module."""

    def __init__(self, task: Task) -> None:
        self.task, self.iteration = task, 0
        pipeline: Any = task.pipeline()
        self.transformer = pipeline.transformer
        if task.train == "lora":
            lora = task.lora
            add_adapters(self.transformer, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, seed=2, whole=True)
        else:
            self.transformer.requires_grad_(True)
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=task.lr)
        longest = {} if task.max_text_tokens is None else {"max_sequence_length": task.max_text_tokens}
        with torch.no_grad():
            self.embeds, _, self.pooled, _ = pipeline.encode_prompt(
                [""], None, None, do_classifier_free_guidance=False, device=task.device, **longest
            )
        factor, channels = pipeline.vae_scale_factor, self.transformer.config.in_channels
        self.shape = (channels, task.size // factor, task.size // factor)

    def step(self) -> dict[str, float]:
        task, chosen = self.task, self.task.trained(self.iteration)
        shared = chosen[0] if task.window else 0
        with Stopwatch() as whole:
            with Stopwatch() as sampling, torch.no_grad():
                for k in range(task.steps):
                    for size in _split(task.prompts if k < shared else task.pictures, task.batch):
                        self._ask(2 * size)
            self.optimizer.zero_grad()
            for _ in chosen:
                for size in _split(task.pictures, task.batch):
                    self._ask(size).pow(2).mean().backward()
            self.optimizer.step()
        self.iteration += 1
        return {"wall": whole.wall, "cpu": whole.cpu, "sample_wall": sampling.wall, "sample_cpu": sampling.cpu}

    def _ask(self, size: int) -> Tensor:
        x = torch.randn(size, *self.shape, device=self.task.device, dtype=self.transformer.dtype)
        return self.transformer(
            hidden_states=x,
            timestep=torch.full((size,), 500.0, device=x.device),
            encoder_hidden_states=self.embeds.expand(size, -1, -1),
            pooled_projections=self.pooled.expand(size, -1),
            return_dict=False,
        )[0]

    def passes(self) -> float:
        """Floating-point operations of a step; with a window in its second place, which is the median of ten steps' three."""
        self.iteration = 1
        with FlopCounterMode(display=False) as counter:
            self.step()
        self.iteration = 0
        return float(counter.get_total_flops())


def _split(count: int, size: int) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]


def matrix_rate(task: Task) -> float:
    """Floating-point operations a second in products of large matrices of the network's type."""
    n = 8192 if task.device.startswith("cuda") else 768
    a, b = (torch.randn(n, n, device=task.device, dtype=DTYPES[task.dtype]) for _ in range(2))
    best = 0.0
    for _ in range(8):
        with Stopwatch() as watch:
            started, count = time.perf_counter(), 0
            while count < 3 or time.perf_counter() - started < 0.05:
                torch.mm(a, b)
                count += 1
        seconds = watch.wall if task.device.startswith("cuda") else watch.cpu
        best = max(best, 2 * n**3 * count / seconds)
    return best


def main() -> None:
    task = begin()
    side = Floor(task)
    serve(side.step, {"flops": side.passes(), "matrix_rate": matrix_rate(task)})


if __name__ == "__main__":
    main()
