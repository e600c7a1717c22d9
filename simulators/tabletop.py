"""A batched tabletop for language-conditioned manipulation: a gripper, coloured blocks, coloured zones, all in torch.

Four task families run mixed within one batch: reach a named block, push it to a named zone, pick it up and place it on
another object, sort two blocks into the zones of their colours. Actions are (dx, dy, dz, grip) in [-1, 1]; grip > 0 closes.
An episode is a pure function of its task id and the config: every draw is a hash, see ``tabletop_parts/hashing.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.errors import refuse_other_actions
from mmrl.numerics.hashing import salt
from mmrl.types import ActionSpec, Observation, Step
from simulators.tabletop_parts.domains import DOMAINS
from simulators.tabletop_parts.expert import expert_action
from simulators.tabletop_parts.hashing import normal
from simulators.tabletop_parts.language import TEMPLATES, vocabulary
from simulators.tabletop_parts.physics import ACTION_DIM, Physics
from simulators.tabletop_parts.render import Painter, palette
from simulators.tabletop_parts.scene import FAMILIES, MAX_DISTRACTORS, Sampler, State, choose, take_rows, write_rows
from simulators.tabletop_parts.tasks import Verdict, judge, measure_start

# The expert needs about half of them.
DEFAULT_MAX_STEPS = {"reach": 12, "push": 28, "pick_place": 32, "sort": 60}
_ACTION_NOISE_KEY, _EXPERT_NOISE_KEY = 101, 102
_WRIST_ZOOM = 2.2


class Tabletop:
    """The environment. Built as ``Tabletop(config, num_envs=256, device=torch.device("cpu"))``.

    State: float32 [B, 4], the gripper's x, y, z and openness. Metrics: success, distance (to what the task asks for, in
    workspace units) and progress (0 at the start, about 1 when solved).
    """

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``simulators.tabletop:Tabletop`` block."""

        families: tuple[str, ...] = FAMILIES
        """The task families in the mixture, uniformly; of reach, push, pick_place, sort."""
        seed: int = 0
        """Another seed gives other episodes for the same task ids."""
        split: Literal["train", "held_out"] = "train"
        """Which layouts; and, unless the next two fields say otherwise, which sentences and named objects."""
        held_out_language: bool | None = None
        """Whether instructions are the paraphrases that never occur in training (None: as ``split``)."""
        held_out_objects: bool | None = None
        """Whether the block to act on is a (colour, shape) pair that training never names (None: as ``split``)."""
        domain: Literal["sim", "real"] = "sim"
        """``real`` has another camera, light and table, slipping blocks, delayed and noisy actions."""
        distractors: tuple[int, int] = (1, 2)
        """Fewest and most further blocks on the table."""
        tolerance: float = Field(default=0.05, gt=0)
        """How near the gripper must come in the plane for the reach family, in workspace units (a block's radius is 0.075)."""
        max_steps: dict[str, int] | None = None
        """Actions until truncation per family; others keep their default (half as many again in ``real``)."""
        speed: float = Field(default=0.08, gt=0, le=0.15)
        """How far an action of size one moves the gripper along an axis, in workspace units."""
        reward: Literal["sparse", "dense"] = "sparse"
        """sparse: 1 on success. dense: also the change of progress, which sums to about 1 over a solved episode."""
        expert_speed: float = Field(default=1.0, gt=0, le=1)
        """Largest action the scripted expert takes along an axis."""
        expert_noise: float = Field(default=0.0, ge=0)
        """Standard deviation added to the expert's motion, as an unsteady human operator would."""
        render: bool = True
        """Whether observations have images; without, only state and instructions."""
        image_size: int = Field(default=64, ge=32)
        """Side of the camera images, in pixels."""
        wrist_camera: bool = False
        """Whether to add a camera that follows the gripper, as image ``wrist``."""

        @field_validator("families")
        @classmethod
        def _known_families(cls, value: tuple[str, ...]) -> tuple[str, ...]:
            if not value or len(set(value)) != len(value) or set(value) - set(FAMILIES):
                raise ValueError(f"families must be distinct names out of {', '.join(FAMILIES)}, at least one; got {list(value)}")
            return value

        @field_validator("distractors")
        @classmethod
        def _possible_distractors(cls, value: tuple[int, int]) -> tuple[int, int]:
            if not 0 <= value[0] <= value[1] <= MAX_DISTRACTORS:
                raise ValueError(f"distractors must be [fewest, most] between 0 and {MAX_DISTRACTORS}; got {list(value)}")
            return value

        @field_validator("max_steps")
        @classmethod
        def _known_limits(cls, value: dict[str, int] | None) -> dict[str, int] | None:
            if value is not None and (set(value) - set(FAMILIES) or min(value.values(), default=1) < 1):
                raise ValueError(f"max_steps must map names out of {', '.join(FAMILIES)} to positive numbers; got {value}")
            return value

    def __init__(self, config: Config, *, num_envs: int = 256, device: torch.device | None = None) -> None:
        self.config, self.num_envs = config, num_envs
        self.device = device or torch.device("cpu")
        self._domain = DOMAINS[config.domain]
        limits = {name: round(limit * self._domain.patience) for name, limit in DEFAULT_MAX_STEPS.items()}
        limits |= config.max_steps or {}
        self.max_steps = max(limits[name] for name in config.families)
        self.action_spec = ActionSpec(ACTION_DIM, (-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
        self._limit_F = torch.tensor([limits[name] for name in FAMILIES], device=self.device)
        self._sampler = _make_sampler(config)
        self._physics = Physics(self._domain, config.speed, salt(config.seed, _ACTION_NOISE_KEY))
        self._cameras = self._make_cameras() if config.render else {}
        self._video = Painter(self._domain, 192, self.device)
        self._instructions: list[str] = []
        self._restart(torch.zeros(num_envs, dtype=torch.int64, device=self.device))
        self._verdict = self._judge(self._state)
        self._done_B = torch.ones(num_envs, dtype=torch.bool, device=self.device)

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        """Start these episodes in the slots where ``where_B`` is True (None: all); observations of all slots."""
        task_B = task_ids_B.to(self.device, torch.int64)
        if task_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per environment, shape ({self.num_envs},); got {tuple(task_B.shape)}")
        if where_B is None:
            self._restart(task_B)
        else:
            self._restart_some(task_B, where_B.to(self.device).nonzero()[:, 0])
        self._limit_B = self._limit_F[self._layout.family_B]
        self._verdict = self._judge(self._state)
        self._backgrounds = {name: camera.background(self._layout) for name, camera in self._cameras.items()}
        return self._observe()

    def step(self, actions_BCA: Tensor) -> Step:
        """Execute C actions per slot and look once, afterwards. Slots that are done ignore actions."""
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, ACTION_DIM)
        actions_CAB = actions_BCA.detach().to(self.device, torch.float32).permute(1, 2, 0).contiguous()
        rewards, valid = [], []
        for action_AB in actions_CAB:
            alive_B = ~self._done_B
            valid.append(alive_B)
            rewards.append(self._advance(action_AB, alive_B))
        success_B = self._verdict.success_B
        metrics = {"success": success_B.float(), "distance": self._verdict.distance_B, "progress": self._verdict.progress_B}
        return Step(
            observation=self._observe(),
            rewards_BC=torch.stack(rewards, 1),
            valid_BC=torch.stack(valid, 1),
            terminated_B=success_B,
            truncated_B=self._done_B & ~success_B,
            metrics=metrics,
        )

    def expert_action(self) -> Tensor:
        """The scripted expert's next action in each slot, from privileged state: [B, 4]."""
        pace = {"speed": self.config.speed, "expert_speed": self.config.expert_speed}
        action_BA = expert_action(self._layout, self._physics.foresee(self._state), self._verdict, **pace)
        if self.config.expert_noise > 0:
            key = salt(self.config.seed, _EXPERT_NOISE_KEY)
            noise_B3 = normal(key, self._layout.task_B, self._state.step_B, 3) * self.config.expert_noise
            action_BA = torch.cat([(action_BA[:, :3] + noise_B3).clamp(-1, 1), action_BA[:, 3:]], dim=1)
        return action_BA

    def render_video(self, index_M: Tensor) -> Tensor:
        """A large frame of each of the slots ``index_M``: uint8 [M, 192, 192, 3]."""
        index_M = index_M.to(self.device)
        layout = take_rows(self._layout, index_M)
        canvas = self._video.labels(self._video.background(layout), layout, take_rows(self._state, index_M))
        return self._video.colour(canvas, palette(self._domain, layout.light_B)).contiguous()

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        """The family of each task id under this config."""
        return tuple(FAMILIES[i] for i in self._sampler.family(task_ids_M.to(self.device, torch.int64)).tolist())

    @staticmethod
    def vocabulary() -> list[str]:
        """Every word an instruction can contain, in any split."""
        return vocabulary()

    def close(self) -> None:
        """Nothing is held outside memory."""

    def _make_cameras(self) -> dict[str, Painter]:
        cameras = {"front": Painter(self._domain, self.config.image_size, self.device)}
        if self.config.wrist_camera:
            cameras["wrist"] = Painter(self._domain, self.config.image_size, self.device, zoom=_WRIST_ZOOM, following=True)
        return cameras

    def _restart(self, task_B: Tensor) -> None:
        self._layout, self._state = self._sampler.sample(task_B)
        measure_start(self._layout, self._state)
        self._instructions = self._sampler.instructions(self._layout)
        if self._cameras:
            self._palette_BP = palette(self._domain, self._layout.light_B)
        self._done_B = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def _restart_some(self, task_B: Tensor, index_M: Tensor) -> None:
        layout, state = self._sampler.sample(task_B[index_M])
        measure_start(layout, state)
        write_rows(self._layout, layout, index_M)
        write_rows(self._state, state, index_M)
        if self._cameras:
            self._palette_BP[index_M] = palette(self._domain, layout.light_B)
        for slot, sentence in zip(index_M.tolist(), self._sampler.instructions(layout), strict=True):
            self._instructions[slot] = sentence
        self._done_B = self._done_B.index_fill(0, index_M, False)

    def _judge(self, state: State) -> Verdict:
        return judge(self._layout, state, self.config.tolerance)

    def _advance(self, action_AB: Tensor, alive_B: Tensor) -> Tensor:
        """One action in every slot that is not done; the rewards [B]."""
        before = self._verdict
        self._state = choose(alive_B, self._physics.advance(self._state, self._layout, action_AB), self._state)
        self._verdict = self._judge(self._state)
        reward_B = self._verdict.success_B.float()
        if self.config.reward == "dense":
            reward_B = reward_B + (self._verdict.progress_B - before.progress_B)
        late_B = self._state.step_B >= self._limit_B
        self._done_B = self._done_B | self._verdict.success_B | late_B
        return torch.where(alive_B, reward_B, 0.0)

    def _observe(self) -> Observation:
        images = {}
        for name, camera in self._cameras.items():
            canvas = camera.labels(self._backgrounds[name], self._layout, self._state)
            images[name] = camera.colour(canvas, self._palette_BP)
        state_BS = torch.stack([*self._state.gripper_3B, self._state.open_B], dim=1)
        return Observation(images, state_BS, tuple(self._instructions))


def _make_sampler(config: Tabletop.Config) -> Sampler:
    held_out = config.split == "held_out"
    language = held_out if config.held_out_language is None else config.held_out_language
    objects = held_out if config.held_out_objects is None else config.held_out_objects
    return Sampler(
        seed=config.seed,
        families=tuple(FAMILIES.index(name) for name in config.families),
        templates=tuple(TEMPLATES[name].held_out if language else TEMPLATES[name].train for name in FAMILIES),
        layout_split=int(held_out),
        held_out_objects=objects,
        distractors=config.distractors,
    )
