"""The loop that one would write first around diffusers' pipeline: the other side of benchmarks/t2i_step.py.

Prompts are encoded for every picture. Each denoising step is one pass of both branches of guidance, the step and its likelihood
are written out, a batch of pictures is decoded by the VAE. Training goes through the steps that were drawn at random, both
branches in one pass, the one without prompt detached as in Flow-GRPO's program, and a backward pass for each step and batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from sides import Stopwatch, serve
from torch import Tensor

from t2i_step_parts.task import Task, begin, reward


class Sample(NamedTuple):
    """A batch of pictures: what the network was told, and of each drawn step the state before and after and its likelihood."""

    embeds: Tensor
    pooled: Tensor
    states: list[tuple[int, Tensor, Tensor, Tensor]]
    images: list[Any]


class Plain:
    """See the module."""

    def __init__(self, task: Task) -> None:
        self.task, self.iteration = task, 0
        self.pipeline = task.pipeline()
        self.transformer = self.pipeline.transformer
        if task.train == "lora":
            lora = task.lora
            self.transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.modules))
        else:
            self.transformer.requires_grad_(True)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=task.lr, weight_decay=task.weight_decay)
        self.pipeline.scheduler.set_timesteps(task.steps, device=task.device)

    def step(self) -> dict[str, float]:
        task, texts = self.task, self.task.texts(self.iteration)
        chosen = task.trained(self.iteration)
        with Stopwatch() as whole:
            with Stopwatch() as sampling, torch.no_grad():
                noises = self._noises()
                batches = [
                    self.sample(texts[first : first + task.batch], noises[first : first + task.batch], chosen)
                    for first in range(0, task.pictures, task.batch)
                ]
                rewards = torch.tensor([reward(image) for batch in batches for image in batch.images], device=task.device)
            self.train(batches, rewards)
        self.iteration += 1
        return {"wall": whole.wall, "cpu": whole.cpu, "sample_wall": sampling.wall, "sample_cpu": sampling.cpu}

    def _noises(self) -> Tensor:
        """A picture's own; with a window, that of its prompt."""
        task, factor = self.task, self.pipeline.vae_scale_factor
        shape = (self.transformer.config.in_channels, task.size // factor, task.size // factor)
        count = task.prompts if task.window else task.pictures
        noises = torch.randn(count, *shape, device=task.device, dtype=self.transformer.dtype)
        return noises.repeat_interleave(task.group, 0) if task.window else noises

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Both branches', the one without prompt first."""
        longest = {} if self.task.max_text_tokens is None else {"max_sequence_length": self.task.max_text_tokens}
        embeds, no_embeds, pooled, no_pooled = self.pipeline.encode_prompt(
            texts, None, None, negative_prompt="", do_classifier_free_guidance=True, device=self.task.device, **longest
        )
        return torch.cat([no_embeds, embeds]), torch.cat([no_pooled, pooled])

    def sample(self, texts: list[str], noise: Tensor, chosen: list[int]) -> Sample:
        embeds, pooled = self.encode(texts)
        x, states = noise, []
        for k in range(self.task.steps):
            mean, std = self.gaussian(x, k, embeds, pooled, random=k in chosen)
            if k not in chosen:
                x = mean.to(x.dtype)
                continue
            after = (mean + std * torch.randn_like(mean)).to(x.dtype)
            states.append((k, x, after, self.log_prob(after, mean, std)))
            x = after
        vae = self.pipeline.vae
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return Sample(embeds, pooled, states, self.pipeline.image_processor.postprocess(decoded.float(), output_type="pil"))

    def gaussian(self, x: Tensor, k: int, embeds: Tensor, pooled: Tensor, *, random: bool) -> tuple[Tensor, Tensor]:
        """Flow-GRPO's step: mean and std; std 0 and Euler's step where it is not ``random``."""
        task, sigmas = self.task, self.pipeline.scheduler.sigmas
        time = self.pipeline.scheduler.timesteps[k].expand(2 * len(x))
        said = self.transformer(
            hidden_states=torch.cat([x, x]),
            timestep=time,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        without, conditional = said.chunk(2)
        v = (without.detach() + task.guidance * (conditional - without.detach())).float()
        x, sigma, dt = x.float(), sigmas[k], sigmas[k + 1] - sigmas[k]
        if not random:
            return x + v * dt, torch.zeros_like(dt)
        level = task.noise * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma)))
        drift = level**2 / (2 * sigma)
        return x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt, level * torch.sqrt(-dt)

    @staticmethod
    def log_prob(after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        density = -((after.float() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(1)

    def train(self, batches: list[Sample], rewards: Tensor) -> None:
        task = self.task
        centred = rewards.view(-1, task.group) - rewards.view(-1, task.group).mean(1, keepdim=True)
        advantages = (centred / (rewards.std() + 1e-4)).clamp(-5, 5).flatten().split(task.batch)
        count = sum(len(batch.states) for batch in batches)
        self.optimizer.zero_grad()
        for batch, advantage in zip(batches, advantages, strict=True):
            for k, before, after, old in batch.states:
                mean, std = self.gaussian(before, k, batch.embeds, batch.pooled, random=True)
                ratio = torch.exp(self.log_prob(after, mean, std) - old)
                bounded = ratio.clamp(1 - task.clip, 1 + task.clip)
                loss = torch.maximum(-advantage * ratio, -advantage * bounded).mean() / count
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def probe(self) -> list[float]:
        factor, task = self.pipeline.vae_scale_factor, self.task
        before, after, k = task.probe((self.transformer.config.in_channels, task.size // factor, task.size // factor))
        embeds, pooled = self.encode(task.texts(0)[: task.group])
        return self.log_prob(after, *self.gaussian(before, k, embeds, pooled, random=True)).tolist()


def main() -> None:
    side = Plain(begin())
    serve(side.step, {"probe": side.probe()})


if __name__ == "__main__":
    main()
