"""Episodes of the tabletop: what determines them, how they end, what they pay."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.protocols import Environment, ExpertEnvironment, RenderEnvironment
from mmrl.types import Step
from simulators.tabletop import Tabletop
from simulators.tabletop_parts.language import COLOURS, SHAPES, TEMPLATES
from simulators.tabletop_parts.scene import FAMILIES, HELD_OUT_COMBINATIONS

DOMAINS = ("sim", "real")


def make(num_envs: int, **fields: object) -> Tabletop:
    return Tabletop(Tabletop.Config(**fields), num_envs=num_envs)


def actions_for(task_B: Tensor, steps: int) -> Tensor:
    """Wild actions that depend on the task id alone: [B, steps, 4]."""
    rows = [torch.rand(steps, 4, generator=torch.Generator().manual_seed(int(i))) * 2.4 - 1.2 for i in task_B]
    return torch.stack(rows)


def assert_same(a: Step, b: Step, rows_a: Tensor, rows_b: Tensor) -> None:
    left, right = a.observation.select(rows_a), b.observation.select(rows_b)
    assert left.instructions == right.instructions
    assert torch.equal(left.state, right.state)
    for name, image in left.images.items():
        assert torch.equal(image, right.images[name]), name
    for name in ("rewards_BC", "valid_BC", "terminated_B", "truncated_B"):
        assert torch.equal(getattr(a, name)[rows_a], getattr(b, name)[rows_b]), name
    for name, value in a.metrics.items():
        assert torch.equal(value[rows_a], b.metrics[name][rows_b]), name


def test_keeps_the_protocols() -> None:
    env = make(2)
    assert isinstance(env, Environment) and isinstance(env, ExpertEnvironment) and isinstance(env, RenderEnvironment)


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_episode_is_the_same_in_any_slot_of_any_batch(domain: str) -> None:
    fields = {"domain": domain, "reward": "dense", "expert_noise": 0.3, "wrist_camera": True}
    ids_small = torch.tensor([11, 5, 900, 42, 7])
    ids_large = torch.cat([torch.arange(1000, 1028), ids_small.flip(0)])
    rows_small, rows_large = torch.arange(5), torch.arange(32, 27, -1)
    small, large = make(5, **fields), make(33, **fields)
    small.reset(ids_small)
    large.reset(ids_large)
    for step in range(10):
        mine, theirs = small.expert_action(), large.expert_action()
        assert torch.equal(mine, theirs[rows_large])
        if step % 3 == 0:
            mine, theirs = (actions_for(ids, step + 1)[:, -1] for ids in (ids_small, ids_large))
        assert_same(small.step(mine[:, None]), large.step(theirs[:, None]), rows_small, rows_large)


def test_twice_the_same_bit_for_bit_and_another_seed_differs() -> None:
    ids = torch.arange(16)
    steps = [make(16, domain="real", seed=seed) for seed in (3, 3, 4)]
    for env in steps:
        env.reset(ids)
    first, again, other = (env.step(actions_for(ids, 6)) for env in steps)
    assert_same(first, again, ids, ids)
    assert not torch.equal(first.observation.state, other.observation.state)


def test_partial_reset_leaves_the_other_slots_alone() -> None:
    ids = torch.arange(8)
    env, untouched = make(8), make(8)
    env.reset(ids)
    untouched.reset(ids)
    env.step(actions_for(ids, 3))
    untouched.step(actions_for(ids, 3))
    where = torch.tensor([True, False] * 4)
    fresh = env.reset(ids + 100, where)
    reference = make(8).reset(ids + 100)
    new, old = where.nonzero()[:, 0], (~where).nonzero()[:, 0]
    assert torch.equal(fresh.images["front"][new], reference.images["front"][new])
    assert [fresh.instructions[i] for i in new] == [reference.instructions[i] for i in new]
    assert_same(env.step(actions_for(ids, 2)), untouched.step(actions_for(ids, 2)), old, old)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_chunk_equals_its_actions_one_by_one(domain: str) -> None:
    ids = torch.arange(48)
    chunked, single = (make(48, domain=domain, max_steps=dict.fromkeys(FAMILIES, 6), reward="dense") for _ in range(2))
    chunked.reset(ids)
    single.reset(ids)
    actions = torch.stack([single.expert_action()] * 2, 1)
    actions = torch.cat([actions, actions_for(ids, 6)], 1)
    whole = chunked.step(actions)
    parts = [single.step(actions[:, c : c + 1]) for c in range(8)]
    assert torch.equal(whole.observation.images["front"], parts[-1].observation.images["front"])
    assert torch.equal(whole.observation.state, parts[-1].observation.state)
    assert torch.equal(whole.rewards_BC, torch.cat([p.rewards_BC for p in parts], 1))
    assert torch.equal(whole.valid_BC, torch.cat([p.valid_BC for p in parts], 1))


def test_truncates_at_each_familys_limit_and_freezes() -> None:
    limits = {"reach": 3, "push": 5, "pick_place": 4, "sort": 6}
    ids = torch.arange(64)
    env = make(64, max_steps=limits)
    env.reset(ids)
    still = torch.zeros(64, 9, 4)
    still[..., 2] = 1.0  # straight up solves nothing
    step = env.step(still)
    lengths = step.valid_BC.sum(1).tolist()
    assert lengths == [limits[family] for family in env.family_of(ids)]
    assert step.truncated_B.all() and not step.terminated_B.any()
    assert env.max_steps == 6
    after = env.step(torch.ones(64, 2, 4))
    assert not after.valid_BC.any() and not after.rewards_BC.any()
    assert torch.equal(after.observation.state, step.observation.state)
    assert after.truncated_B.all()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_expert_solves_97_percent_and_ends_terminated(domain: str, family: str, split: str) -> None:
    env = make(256, families=(family,), domain=domain, split=split, render=False, reward="dense")
    env.reset(torch.arange(256))
    returns = torch.zeros(256)
    for _ in range(env.max_steps):
        step = env.step(env.expert_action()[:, None])
        returns += step.rewards_BC[:, 0]
        assert not (step.terminated_B & step.truncated_B).any()
    assert step.done_B.all()
    assert torch.equal(step.terminated_B, step.metrics["success"].bool())
    assert step.terminated_B.float().mean() >= 0.97
    assert (returns[step.terminated_B] - 2).abs().max() < 0.35  # 1 for success and about 1 of progress


def test_sparse_pays_success_once_and_dense_adds_the_progress_made() -> None:
    ids = torch.arange(64)
    sparse, dense = make(64, render=False), make(64, render=False, reward="dense")
    sparse.reset(ids)
    dense.reset(ids)
    sums = torch.zeros(2, 64)
    for _ in range(sparse.max_steps):
        action = sparse.expert_action()[:, None]
        steps = sparse.step(action), dense.step(action)
        sums += torch.stack([s.rewards_BC[:, 0] for s in steps])
    assert torch.equal(sums[0], steps[0].terminated_B.float())
    torch.testing.assert_close(sums[1], sums[0] + steps[1].metrics["progress"], atol=1e-5, rtol=0)


def test_the_batch_axis_stays_last_in_memory() -> None:
    """Otherwise kernels run along two or three numbers at a time, and a step takes a third longer."""
    ids = torch.arange(16)
    env = make(16, render=False)
    for where in (None, ids < 5):
        env.reset(ids, where)
        env.step(actions_for(ids, 2))
        tensors = {**vars(env._layout), **vars(env._state), "goal": env._verdict.goal_32B}
        assert not [name for name, tensor in tensors.items() if tensor.shape[-1] != 16 or not tensor.is_contiguous()]


def named_pairs(instruction: str) -> set[tuple[str, str]]:
    words = instruction.split()
    return {(a, b) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES}


def test_held_out_objects_and_sentences_never_occur_in_training() -> None:
    ids = torch.arange(5000)
    held_pairs = {(COLOURS[i // len(SHAPES)], SHAPES[i % len(SHAPES)]) for i in HELD_OUT_COMBINATIONS}
    train, held = (make(5000, split=split, render=False).reset(ids).instructions for split in ("train", "held_out"))
    train_pairs = set().union(*(named_pairs(s) for s in train))
    assert not train_pairs & held_pairs
    assert len(train_pairs) == 15
    assert {colour for colour, _ in train_pairs} == set(COLOURS) and {shape for _, shape in train_pairs} == set(SHAPES)
    assert all(named_pairs(s) & held_pairs for s in held)
    assert not set(train) & set(held)
    vocabulary = set(Tabletop.vocabulary())
    assert {word for s in train for word in s.split()} == {word for s in (*train, *held) for word in s.split()} == vocabulary


def test_held_out_sentences_are_other_sentences() -> None:
    for family, templates in TEMPLATES.items():
        assert not set(templates.train) & set(templates.held_out), family


def test_splits_have_other_layouts_and_language_switches_alone() -> None:
    ids = torch.arange(32)
    train, held = make(32).reset(ids), make(32, split="held_out").reset(ids)
    assert not torch.equal(train.state, held.state)
    spoken = make(32, held_out_language=True).reset(ids)
    assert torch.equal(train.images["front"], spoken.images["front"])
    assert all(a != b for a, b in zip(train.instructions, spoken.instructions, strict=True))


def test_a_named_block_is_never_ambiguous_and_objects_never_overlap() -> None:
    env = make(2000, distractors=(2, 5), render=False)
    env.reset(torch.arange(2000))
    layout, state = env._layout, env._state
    k = layout.combination_BK.shape[1]
    same = (layout.combination_BK[:, :, None] == layout.combination_BK[:, None]) & ~torch.eye(k, dtype=torch.bool)
    assert not same.any()
    both = layout.present_BK[:, :, None] & layout.present_BK[:, None] & ~torch.eye(k, dtype=torch.bool)
    xy = state.blocks_BK3[..., :2]
    assert torch.cdist(xy, xy)[both].min() > 0.15
    assert torch.cdist(xy, layout.zone_B23[..., :2])[layout.present_BK].min() > 0.12 + 0.075
    assert layout.present_BK[:, 2:].sum(1).unique().tolist() == [2, 3, 4, 5]


def test_families_follow_the_task_id_uniformly() -> None:
    env = make(1, families=("push", "sort"), render=False)
    families = env.family_of(torch.arange(4000))
    assert set(families) == {"push", "sort"}
    assert abs(families.count("push") / 4000 - 0.5) < 0.03


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"families": ("reach", "juggle")}, "families must be distinct names"),
        ({"distractors": (2, 9)}, "distractors must be"),
        ({"max_steps": {"juggle": 3}}, "max_steps must map"),
        ({"image_sise": 64}, "image_sise"),
    ],
)
def test_refuses_impossible_configs_in_a_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Tabletop.Config(**fields)


def test_refuses_wrong_shapes_in_a_sentence() -> None:
    env = make(4, render=False)
    with pytest.raises(ValueError, match="one task id per environment"):
        env.reset(torch.arange(3))
    with pytest.raises(ValueError, match=r"actions of shape \(4, C, 4\)"):
        env.step(torch.zeros(4, 1, 3))
