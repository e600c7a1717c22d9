"""This framework's side of benchmarks/t2i_step.py: PictureEnvironment, Collector, FlowGRPO and RolloutUpdate around Diffusion."""

from __future__ import annotations

from typing import Any

import torch
from sides import Stopwatch, serve

from mmrl.algorithms.flow_grpo import FlowGRPO
from mmrl.columns import Column
from mmrl.component import Component
from mmrl.messages import Message
from mmrl.optim import Optimization, OptimizerConfig
from mmrl.rollout import Collector
from mmrl.updates import RolloutUpdate
from policies.diffusion import Diffusion
from policies.diffusion_parts.prompts import prompts_of
from t2i_step_parts.task import Task, begin, stir

_ENVIRONMENT = {
    "target": "mmrl.picturing:PictureEnvironment",
    "prompts": {"target": "simulators.image_prompts:ShapePrompts"},
    "rewards": [{"target": "mmrl.rewards.brightness:Brightness"}],
}


class Ours:
    """See the module."""

    def __init__(self, task: Task) -> None:
        self.task, self.iteration = task, 0
        device = torch.device(task.device)
        fields: dict[str, Any] = {
            "checkpoint": task.checkpoint,
            "weights": task.weights,
            "dtype": task.dtype,
            "height": task.size,
            "width": task.size,
            "steps": task.steps,
            "guidance": task.guidance,
            "guidance_detached": True,
            "noise_level": task.noise,
            "trained_steps": task.trained_steps,
            "train": task.train,
            "lora": task.lora,
            "max_text_tokens": task.max_text_tokens,
        }
        self.policy = Diffusion(Diffusion.Config(**fields), device=device)
        stir(self.policy.network)
        algorithm = FlowGRPO(FlowGRPO.Config(group_size=task.group, clip_low=task.clip, clip_high=task.clip))
        environments: list[Any] = [
            Component.parse(_ENVIRONMENT).build(num_envs=size, device=device) for size in self._parts(task)
        ]
        self.collector = Collector(environments, decisions=1, seed=0, device=device, group_size=task.group, auto_reset=False)
        optimizer = OptimizerConfig(lr=task.lr, betas=(0.9, 0.999), weight_decay=task.weight_decay, clip_norm=1.0)
        optimization = Optimization(optimizer, self.policy.trainable(), 1000, max_skipped=1)
        dice = torch.Generator(device).manual_seed(0)
        self.update = RolloutUpdate(self.policy, algorithm, optimization, dice, dice, 1000, micro_batch=task.batch)

    @staticmethod
    def _parts(task: Task) -> list[int]:
        """As many pictures at a time as the network sees, in whole groups."""
        size = max(task.batch // task.group, 1) * task.group
        return [min(size, task.pictures - first) for first in range(0, task.pictures, size)]

    def step(self) -> dict[str, float]:
        with Stopwatch() as whole:
            with Stopwatch() as sampling:
                self.policy.at_iteration(self.iteration)
                rollout = self.collector.collect(self.policy)
            batch, _ = self.update.prepare(rollout)
            metrics = self.update.run(batch, self.iteration)
        assert metrics["updates"] == 1 and len(batch) == self.task.pictures
        self.iteration += 1
        return {"wall": whole.wall, "cpu": whole.cpu, "sample_wall": sampling.wall, "sample_cpu": sampling.cpu}

    @torch.no_grad()
    def probe(self) -> list[float]:
        task = self.task
        before, after, k = task.probe(self.policy.family.latent_shape)
        prompts = prompts_of([(Message("user", (text,)),) for text in task.texts(0)[: task.group]])
        trace = {"clean": before, "prompt": Column.of(prompts), "x_before": before[:, None], "x_after": after[:, None]}
        trace["step"] = torch.full((len(before), 1), k, device=before.device)
        with self.policy.compute_mode(train=False):
            return self.policy.evaluate(trace).log_probs_NK[:, 0].tolist()


def main() -> None:
    side = Ours(begin())
    trained = sum(p.numel() for group in side.policy.trainable().values() for p in group)
    parameters = sum(p.numel() for p in side.policy.network.parameters())
    serve(side.step, {"probe": side.probe(), "parameters": parameters, "trained": trained})


if __name__ == "__main__":
    main()
