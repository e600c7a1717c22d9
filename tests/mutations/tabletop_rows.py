"""Bugs to plant in the tabletop simulator; rows as in beyond_numerics.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_PARTS = "simulators/tabletop_parts"
_EPISODES = "tests/simulators/test_tabletop_episodes.py"
_PHYSICS = "tests/simulators/test_tabletop_physics.py"

TABLETOP: tuple[Row, ...] = (
    (
        "tabletop: one sorted block is enough",
        f"{_PARTS}/tasks.py",
        "first_B & (second_B | layout.alone_B)",
        "first_B.clone()",
        f"{_EPISODES}::test_the_expert_solves_97_percent_and_ends_terminated",
    ),
    (
        "tabletop: progress measured in workspace units",
        f"{_PARTS}/tasks.py",
        "tolerance=0.0).left_22B.clamp(min=0.05)",
        "tolerance=0.0).left_22B.clamp(min=1.0)",
        f"{_EPISODES}::test_the_expert_solves_97_percent_and_ends_terminated",
    ),
    (
        "tabletop: what is done goes on",
        f"{_PARTS}/scene.py",
        "torch.where(condition_B, getattr(new, f.name), getattr(old, f.name))",
        "getattr(new, f.name)",
        f"{_EPISODES}::test_truncates_at_each_familys_limit_and_freezes",
    ),
    (
        "tabletop: the batch axis first in memory",
        f"{_PARTS}/vectors.py",
        "rows.movedim(0, -1).contiguous()",
        "rows.contiguous().movedim(0, -1)",
        f"{_EPISODES}::test_the_batch_axis_stays_last_in_memory",
    ),
    (
        "tabletop: the farthest block is grasped",
        f"{_PARTS}/physics.py",
        ".argmin(1)",
        ".argmax(1)",
        f"{_PHYSICS}::test_grasp_carry_and_release_onto_another_block",
    ),
    (
        "tabletop: open fingers push",
        f"{_PARTS}/physics.py",
        "met_KB = fist_B & (",
        "met_KB = (",
        f"{_PHYSICS}::test_a_fist_pushes_open_fingers_straddle_and_height_clears",
    ),
    (
        "tabletop: overlapping blocks stay",
        f"{_PARTS}/physics.py",
        "xy_2KB + _sum_in_order(apart_2KKB)",
        "xy_2KB",
        f"{_PHYSICS}::test_a_block_dropped_beside_another_falls_to_the_table_and_they_part",
    ),
    (
        "tabletop: released blocks hang in the air",
        f"{_PARTS}/physics.py",
        "1 - BLOCK_RADIUS), z_KB[None]])",
        "1 - BLOCK_RADIUS), carried_3KB[2:]])",
        f"{_PHYSICS}::test_a_block_dropped_beside_another_falls_to_the_table_and_they_part",
    ),
    (
        "tabletop: the same noise at every step",
        f"{_PARTS}/hashing.py",
        "step_B * (4 * count), 4 * count)",
        "step_B * 0, 4 * count)",
        f"{_PHYSICS}::test_hashed_numbers_have_the_right_moments_and_no_correlation",
    ),
)
