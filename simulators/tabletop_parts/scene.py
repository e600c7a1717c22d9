"""What an episode is: its fixed layout and its changing state, drawn from the hash of its task id.

Axes: B environments, K block slots (0 and 1 can be named, the others are distractors), 2 zone slots, 3 for (x, y, z).
Layout and State keep the batch axis last, so that elementwise kernels run along it, and have views with the batch axis first.
The workspace is [0, 1] x [0, 1], heights go up to CEILING. Absent objects stand at ABSENT, outside every camera.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from mmrl.numerics.hashing import salt
from simulators.tabletop_parts.hashing import uniform
from simulators.tabletop_parts.language import COLOURS, SHAPES, TEMPLATES, block_name
from simulators.tabletop_parts.vectors import batch_last, constant

BLOCK_RADIUS = 0.075
BLOCK_HEIGHT = 0.06
ZONE_RADIUS = 0.12
CEILING = 0.3
ABSENT = -9.0
ZONES = 2
NAMED = 2
FAMILIES = tuple(TEMPLATES)  # a family's number is its place here
REACH, PUSH, PICK_PLACE, SORT = range(4)
COMBINATIONS = len(COLOURS) * len(SHAPES)  # combination = colour * len(SHAPES) + shape
# Three of the eighteen, chosen so that each of their colours and shapes still occurs in training with other partners.
HELD_OUT_COMBINATIONS = tuple(c * len(SHAPES) + s for c in range(6) for s in range(3) if (c + 2 * s) % 6 == 0)
_GRID = (0.21, 0.5, 0.79)  # object centres before jitter, in x and y: nine cells, one object each
MAX_DISTRACTORS = len(_GRID) ** 2 - ZONES - NAMED
_BLOCK_JITTER, _ZONE_JITTER, _SHIFT = 0.06, 0.03, 0.02
_LAYOUT_KEY, _CHOICE_KEY = 1, 2


def _unset() -> Tensor:
    return torch.empty(0)


@dataclass
class Layout:
    """What stays the same through an episode."""

    task_B: Tensor  # int64
    family_B: Tensor  # int64, index into FAMILIES
    combination_KB: Tensor  # int64
    present_KB: Tensor  # bool
    zone_colour_2B: Tensor  # int64
    zone_32B: Tensor
    stacked_B: Tensor  # bool: the goal is block 1, not zone 0
    template_B: Tensor  # int64, index into the family's templates
    light_B: Tensor  # in [-1, 1]: how bright this episode is
    drift_B: Tensor  # in [-1, 1]: how pushed blocks slip
    # What judging needs at every step and no step changes; tasks.measure_start fills these in.
    reach_B: Tensor = field(default_factory=_unset)  # bool: the family is reach
    alone_B: Tensor = field(default_factory=_unset)  # bool: block 0 alone counts, as in every family but sort
    onto_2B: Tensor = field(default_factory=_unset)  # bool: the goal of block 0 / 1 is on top of block 1
    radius_B: Tensor = field(default_factory=_unset)  # how near to its goal a block must lie
    weight_3B: Tensor = field(default_factory=_unset)  # share of each stage in the progress
    start_22B: Tensor = field(default_factory=_unset)  # distance of blocks 0 and 1 to their goals, and of the gripper to them

    @property
    def combination_BK(self) -> Tensor:
        return self.combination_KB.t()

    @property
    def colour_BK(self) -> Tensor:
        return self.combination_BK // len(SHAPES)

    @property
    def shape_BK(self) -> Tensor:
        return self.combination_BK % len(SHAPES)

    @property
    def present_BK(self) -> Tensor:
        return self.present_KB.t()

    @property
    def zone_B23(self) -> Tensor:
        return self.zone_32B.permute(2, 1, 0)


@dataclass
class State:
    """What changes with every action."""

    gripper_3B: Tensor
    open_B: Tensor  # 1 open, 0 closed
    blocks_3KB: Tensor  # z is the height of the block's underside
    held_B: Tensor  # int64: the slot in the gripper, or -1
    queued_AB: Tensor  # the last command, which a delayed domain executes next
    step_B: Tensor  # int64

    @property
    def gripper_B3(self) -> Tensor:
        return self.gripper_3B.t()

    @property
    def blocks_BK3(self) -> Tensor:
        return self.blocks_3KB.permute(2, 1, 0)


Rows = TypeVar("Rows", Layout, State)


def choose(condition_B: Tensor, new: State, old: State) -> State:
    """``new`` where the condition holds, ``old`` elsewhere."""
    return State(*(torch.where(condition_B, getattr(new, f.name), getattr(old, f.name)) for f in fields(State)))


def write_rows(target: Layout | State, source: Layout | State, index_M: Tensor) -> None:
    """Overwrite the environments ``index_M`` in every tensor of ``target`` with ``source``'s."""
    for f in fields(target):
        getattr(target, f.name)[..., index_M] = getattr(source, f.name)


def take_rows(source: Rows, index_M: Tensor) -> Rows:
    """The environments ``index_M`` alone."""
    return type(source)(*(getattr(source, f.name)[..., index_M] for f in fields(source)))


@dataclass(frozen=True)
class Sampler:
    """Draws episodes. ``families`` are indices into FAMILIES; ``templates`` the sentences per family index."""

    seed: int
    families: tuple[int, ...]
    templates: tuple[tuple[str, ...], ...]
    layout_split: int
    held_out_objects: bool
    distractors: tuple[int, int]

    @property
    def block_slots(self) -> int:
        return NAMED + self.distractors[1]

    def family(self, task_M: Tensor) -> Tensor:
        """The family of each task: int64 [M]."""
        u_M = uniform(salt(self.seed, self.layout_split, _CHOICE_KEY), task_M, 1)[:, 0]
        return constant(self.families, task_M.device)[_pick(u_M, len(self.families))]

    def sample(self, task_B: Tensor) -> tuple[Layout, State]:
        """The episodes of these tasks at their first moment."""
        b, k = task_B.shape[0], self.block_slots
        key = salt(self.seed, self.layout_split, _LAYOUT_KEY)
        objects_BN, extra_BN = uniform(key, task_B, 9 + 2 * (k + ZONES) + 20).split([9 + 2 * (k + ZONES), 20], dim=1)
        order_BN = uniform(salt(key, 1), task_B, COMBINATIONS)
        family_B = self.family(task_B)
        stacked_B = (family_B == PICK_PLACE) & (extra_BN[:, 0] < 0.5)
        combination_BK = self._combinations(order_BN)
        present_BK = self._present(family_B, stacked_B, extra_BN[:, 1])
        zone_xy_B22, block_xy_BK2 = _place(objects_BN, extra_BN[:, 2:4], k)
        has_zones_B = (family_B != REACH) & ~stacked_B
        zone_B23 = _on_the_table(torch.where(has_zones_B[:, None, None], zone_xy_B22, ABSENT))
        blocks_BK3 = torch.where(present_BK[..., None], _on_the_table(block_xy_BK2), ABSENT)
        layout = Layout(
            task_B=task_B.clone(),
            family_B=family_B,
            combination_KB=batch_last(combination_BK),
            present_KB=batch_last(present_BK),
            zone_colour_2B=batch_last(_zone_colours(family_B, combination_BK // len(SHAPES), extra_BN[:, 4:6])),
            zone_32B=batch_last(zone_B23.mT),
            stacked_B=stacked_B,
            template_B=self._template(family_B, extra_BN[:, 6]),
            light_B=extra_BN[:, 7] * 2 - 1,
            drift_B=extra_BN[:, 8] * 2 - 1,
        )
        low_3, size_3 = constant(((0.2, 0.2, 0.15), (0.6, 0.6, 0.1)), task_B.device)
        state = State(
            gripper_3B=batch_last(low_3 + extra_BN[:, 9:12] * size_3),
            open_B=torch.ones(b, device=task_B.device),
            blocks_3KB=batch_last(blocks_BK3.mT),
            held_B=torch.full_like(task_B, -1),
            queued_AB=constant(((0.0,), (0.0,), (0.0,), (-1.0,)), task_B.device).repeat(1, b),
            step_B=torch.zeros_like(task_B),
        )
        return layout, state

    def _combinations(self, order_BN: Tensor) -> Tensor:
        """Distinct (colour, shape) per slot: the named ones from the split's list, slot 1 never in slot 0's colour."""
        held_out = torch.zeros(COMBINATIONS, dtype=torch.bool, device=order_BN.device)
        held_out[list(HELD_OUT_COMBINATIONS)] = True
        barred = ~held_out if self.held_out_objects else held_out
        first_B = torch.where(barred, 2.0, order_BN).argmin(1)
        colour_N = torch.arange(COMBINATIONS, device=order_BN.device) // len(SHAPES)
        barred_BN = colour_N == (first_B // len(SHAPES))[:, None]
        if not self.held_out_objects:
            barred_BN = barred_BN | held_out
        second_B = torch.where(barred_BN, 2.0, order_BN).argmin(1)
        taken_BN = torch.zeros_like(order_BN).scatter_(1, torch.stack([first_B, second_B], 1), 2.0)
        rest_BN = (order_BN + taken_BN).argsort(dim=1, stable=True)[:, : self.distractors[1]]
        return torch.cat([first_B[:, None], second_B[:, None], rest_BN], dim=1)

    def _present(self, family_B: Tensor, stacked_B: Tensor, u_B: Tensor) -> Tensor:
        low, high = self.distractors
        count_B = low + _pick(u_B, high - low + 1)
        others_BK = torch.arange(high, device=u_B.device) < count_B[:, None]
        second_B = stacked_B | (family_B == SORT)
        return torch.cat([torch.ones_like(second_B)[:, None], second_B[:, None], others_BK], dim=1)

    def _template(self, family_B: Tensor, u_B: Tensor) -> Tensor:
        counts_F = constant(tuple(len(t) for t in self.templates), u_B.device)
        return (u_B * counts_F[family_B]).long()

    def instructions(self, layout: Layout) -> list[str]:
        """The sentence of each episode."""
        columns: Sequence[list[int]] = [
            t.tolist()
            for t in (
                layout.family_B,
                layout.template_B,
                layout.stacked_B.long(),
                layout.zone_colour_2B[0],
                *layout.combination_KB[:NAMED],
            )
        ]
        return [
            _sentence(self.templates[family][template], family, *row) for family, template, *row in zip(*columns, strict=True)
        ]


@functools.cache
def _sentence(template: str, family: int, stacked: int, zone_colour: int, first: int, second: int) -> str:
    a, b = (block_name(*divmod(combination, len(SHAPES))) for combination in (first, second))
    z = COLOURS[zone_colour]
    return template.format(a=a, b=f"{z} tray" if family == PICK_PLACE and not stacked else b, z=z)


def _on_the_table(xy: Tensor) -> Tensor:
    """Places in the plane as points of height 0."""
    return torch.cat([xy, torch.zeros_like(xy[..., :1])], dim=-1)


def _pick(u_B: Tensor, count: int) -> Tensor:
    """A uniform number in [0, 1) as one of ``count`` integers."""
    return (u_B * count).long()


def _place(u_BN: Tensor, shift_B2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions of zones [B, 2, 2] and blocks [B, K, 2]: distinct grid cells, jittered so that nothing overlaps."""
    cells_BN = u_BN[:, :9].argsort(dim=1, stable=True)[:, : ZONES + k]
    grid = constant(_GRID, u_BN.device)
    centre_BN2 = torch.stack([grid[cells_BN % 3], grid[cells_BN // 3]], dim=-1)
    jitter_N1 = constant((_ZONE_JITTER,) * ZONES + (_BLOCK_JITTER,) * k, u_BN.device)[:, None]
    offset_BN2 = (u_BN[:, 9:].unflatten(1, (ZONES + k, 2)) * 2 - 1) * jitter_N1
    place_BN2 = centre_BN2 + offset_BN2 + ((shift_B2 * 2 - 1) * _SHIFT)[:, None]
    return place_BN2[:, :ZONES], place_BN2[:, ZONES:]


def _zone_colours(family_B: Tensor, colour_BK: Tensor, u_B2: Tensor) -> Tensor:
    """Two different colours per episode; when sorting, those of blocks 0 and 1."""
    first_B = _pick(u_B2[:, 0], len(COLOURS))
    second_B = (first_B + 1 + _pick(u_B2[:, 1], len(COLOURS) - 1)) % len(COLOURS)
    return torch.where((family_B == SORT)[:, None], colour_BK[:, :NAMED], torch.stack([first_B, second_B], 1))
