"""The optimizer step against plain torch, a loop twin of the average, and itself across a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import get_scheduler

from mmrl.errors import CheckpointError, ConfigError, TrainingError
from mmrl.optim import SCHEDULES, GroupConfig, Optimization, OptimizerConfig

TOTAL = 10


class Policy(nn.Module):
    """Two groups, one of two layers; ``unused`` never has a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.actor = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
            self.critic = nn.Linear(3, 1).to(dtype)
            self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        return {"critic": [*self.critic.parameters(), self.unused], "actor": list(self.actor.parameters())}

    def backward(self, update: int, scale: float = 1.0) -> None:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(update)).to(self.unused.dtype)
        loss = (self.actor(x) - x[:, :2]).square().mean() + (self.critic(x) - x.sum(1, keepdim=True)).square().mean()
        (loss * scale).backward()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters()}


def config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.05, "clip_norm": 0.5, **changes})


FULL = config(
    groups={"critic": GroupConfig(lr=0.2, weight_decay=0.3)}, schedule="cosine_with_min_lr", min_lr_ratio=0.1, warmup=3, ema=0.7
)

MUON = config(groups={"actor": GroupConfig(lr=0.02, method="muon")}, schedule="cosine", warmup=2, ema=0.7)


def build(settings: OptimizerConfig, max_skipped: int = 10) -> tuple[Policy, Optimization]:
    policy = Policy()
    return policy, Optimization(settings, policy.trainable(), TOTAL, max_skipped=max_skipped)


def train(policy: Policy, optimization: Optimization, updates: range) -> None:
    for update in updates:
        optimization.zero_grad()
        policy.backward(update)
        optimization.step()


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def snapshot(optimization: Optimization) -> tuple[dict[str, Tensor], Any]:
    """The state as a checkpoint keeps it: copies, and meta through json."""
    tensors, meta = optimization.state()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(meta))


@pytest.mark.parametrize("settings", [config(), FULL, config(clip_norm=None, schedule="cosine", warmup=2)])
def test_equals_plain_torch(settings: OptimizerConfig) -> None:
    """The reference: AdamW on unnamed groups, clip_grad_norm_ over all parameters, the library's schedule."""
    policy, optimization = build(settings)
    twin = Policy()
    groups = twin.trainable()
    own = settings.groups.get("critic", GroupConfig(settings.lr, settings.weight_decay))
    reference = torch.optim.AdamW(
        [
            {"params": groups["critic"], "lr": own.lr, "weight_decay": own.weight_decay},
            {"params": groups["actor"], "lr": settings.lr, "weight_decay": settings.weight_decay},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    extra = {"min_lr_rate": 0.1} if settings.min_lr_ratio else {}
    schedule = get_scheduler(settings.schedule, reference, settings.warmup, TOTAL, extra)
    for update in range(TOTAL):
        policy.backward(update)
        report = optimization.step()
        reference.zero_grad()
        twin.backward(update)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), settings.clip_norm or math.inf)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert report.lr == pytest.approx({"critic": reference.param_groups[0]["lr"], "actor": reference.param_groups[1]["lr"]})
        reference.step()
        schedule.step()
        assert not report.skipped
    for name, value in twin.weights().items():
        torch.testing.assert_close(policy.weights()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_clipping_is_of_the_whole_gradient() -> None:
    """Both groups shrink by the factor clip_norm / norm; seen through the first moment, which is (1 - beta1) * gradient."""
    policy, optimization = build(config())
    policy.backward(0, scale=100)
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert optimization.step().grad_norm == pytest.approx(norm, rel=1e-5)
    tensors, _ = optimization.state()
    expected = 0.1 * gradients["critic.weight"] * 0.5 / norm
    torch.testing.assert_close(tensors["critic/0/exp_avg"], expected, rtol=1e-4, atol=0)
    moments = [value.double() for name, value in tensors.items() if name.endswith("/exp_avg")]
    assert math.sqrt(sum(float(m.square().sum()) for m in moments)) == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize(
    "settings", [config(), FULL, MUON, *(config(schedule=s, warmup=2) for s in ("linear", "inverse_sqrt", "polynomial"))]
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(settings: OptimizerConfig) -> None:
    unbroken, optimization = build(settings)
    train(unbroken, optimization, range(TOTAL))

    first, before = build(settings)
    train(first, before, range(5))
    weights, state = first.weights(), snapshot(before)
    train(first, before, range(50, 53))  # what was lost with the kill

    second, after = build(settings)
    train(second, after, range(90, 92))  # loading replaces whatever was there
    second.load_state_dict(weights)
    after.load(*state)
    assert_equal(snapshot(after)[0], state[0])
    kept = {name: tensor.clone() for name, tensor in state[0].items()}
    train(second, after, range(5, TOTAL))
    assert_equal(state[0], kept)  # what was loaded from is not written to

    assert_equal(second.weights(), unbroken.weights())
    assert_equal(after.state()[0], optimization.state()[0])
    assert after.state()[1] == optimization.state()[1]
    assert after.lr == optimization.lr


def test_the_state_names_moments_by_group_and_index() -> None:
    policy, optimization = build(FULL)
    train(policy, optimization, range(1))
    tensors, meta = optimization.state()
    trained = [f"actor/{i}" for i in range(4)] + ["critic/0", "critic/1"]
    moments = {f"{name}/{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == moments | {f"{name}/ema" for name in [*trained, "critic/2"]}
    assert tensors["critic/1/exp_avg"].shape == policy.critic.bias.shape
    assert meta == {"updates": 1, "skipped_in_a_row": 0, "skipped_total": 0}


def test_muon_takes_the_matrices_of_its_group_and_adamw_the_rest() -> None:
    policy, optimization = build(MUON)
    train(policy, optimization, range(3))
    tensors, _ = optimization.state()
    adamw, muon = {"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum_buffer"}
    kept = {name: {key.rpartition("/")[2] for key in tensors if key.startswith(f"{name}/")} - {"ema"} for name in sorted_names()}
    assert kept == {"actor/0": muon, "actor/1": adamw, "actor/2": muon, "actor/3": adamw, "critic/0": adamw, "critic/1": adamw}
    assert optimization.lr.keys() == {"actor", "critic"}
    # Vectors of the group move at the optimizer's rate, as they do without Muon as long as the gradients are the same.
    first, second = build(config()), build(config(groups={"actor": GroupConfig(lr=0.02, method="muon")}))
    for twin, steps in (first, second):
        train(twin, steps, range(1))
    assert torch.equal(first[0].actor[0].bias, second[0].actor[0].bias)
    assert not torch.equal(first[0].actor[0].weight, second[0].actor[0].weight)


def sorted_names() -> list[str]:
    return [f"actor/{i}" for i in range(4)] + ["critic/0", "critic/1"]


def test_a_changed_learning_rate_takes_effect_on_resume() -> None:
    policy, optimization = build(config(schedule="linear"))
    train(policy, optimization, range(5))
    _, resumed = build(config(schedule="linear", lr=0.5))
    resumed.load(*snapshot(optimization))
    assert resumed.lr == pytest.approx({"actor": 0.25, "critic": 0.25})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss", "loss flag"])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, where: str) -> None:
    policy, optimization = build(FULL)
    train(policy, optimization, range(4))
    weights, (tensors, _), lr = policy.weights(), snapshot(optimization), optimization.lr
    policy.backward(4)
    if where == "gradient":
        assert policy.critic.bias.grad is not None
        policy.critic.bias.grad[0] = bad
    arguments = {"gradient": {}, "loss": {"loss": bad}, "loss flag": {"loss_is_finite": False}}[where]
    report = optimization.step(**arguments)
    assert report.skipped
    assert math.isfinite(report.grad_norm) == (where != "gradient")
    assert_equal(policy.weights(), weights)
    assert_equal(optimization.state()[0], tensors)
    assert optimization.lr == lr
    assert optimization.updates == 4
    assert all(p.grad is None for p in policy.parameters())

    train(policy, optimization, range(4, TOTAL))
    unbroken, reference = build(FULL)
    train(unbroken, reference, range(TOTAL))
    assert_equal(policy.weights(), unbroken.weights())


def test_the_run_stops_after_so_many_skipped_in_a_row() -> None:
    policy, optimization = build(config(), max_skipped=3)
    for _ in range(2):
        assert optimization.step(loss=math.nan).skipped
    train(policy, optimization, range(1))  # a good one in between starts the count again
    assert (optimization.skipped_in_a_row, optimization.skipped_total) == (0, 2)
    for _ in range(2):
        assert optimization.step(loss=math.nan).skipped
    with pytest.raises(TrainingError, match=r"3 updates in a row .*last loss: nan.* after 1 good ones; lower optimizer\.lr"):
        optimization.step(loss=math.nan)
    assert optimization.skipped_total == 5


def test_the_count_of_skipped_survives_a_resume() -> None:
    _, optimization = build(config(), max_skipped=2)
    optimization.step(loss_is_finite=False)
    _, resumed = build(config(), max_skipped=2)
    resumed.load(*snapshot(optimization))
    with pytest.raises(TrainingError, match=r"2 updates in a row .*last loss: not finite"):
        resumed.step(loss_is_finite=False)


def test_the_average_equals_a_loop() -> None:
    policy, optimization = build(FULL)
    expected = {name: value.double() for name, value in policy.weights().items()}
    for update in range(6):
        train(policy, optimization, range(update, update + 1))
        expected = {name: 0.7 * expected[name] + 0.3 * value.double() for name, value in policy.weights().items()}
    trained = policy.weights()
    with optimization.ema_scope():
        for name, value in policy.weights().items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
            assert name == "unused" or not torch.equal(value, trained[name])
        with pytest.raises(RuntimeError, match="nest"), optimization.ema_scope():
            pass
        with pytest.raises(RuntimeError, match="ema_scope"):
            optimization.step()
    assert_equal(policy.weights(), trained)


def test_the_average_of_bfloat16_weights_keeps_small_steps() -> None:
    policy = Policy(torch.bfloat16)
    optimization = Optimization(config(ema=0.999), policy.trainable(), TOTAL, max_skipped=10)
    start = policy.critic.weight.detach().double()
    train(policy, optimization, range(1))
    moved = optimization.state()[0]["critic/0/ema"].double() - start
    torch.testing.assert_close(moved, 0.001 * (policy.critic.weight.detach().double() - start), rtol=1e-2, atol=1e-7)


def test_the_trained_weights_come_back_after_an_error_and_without_average_nothing_happens() -> None:
    policy, optimization = build(FULL)
    train(policy, optimization, range(3))
    trained = policy.weights()
    with pytest.raises(KeyError), optimization.ema_scope():
        raise KeyError
    assert_equal(policy.weights(), trained)
    optimization.step()  # the scope was left

    policy, optimization = build(config())
    train(policy, optimization, range(3))
    trained = policy.weights()
    with optimization.ema_scope():
        assert_equal(policy.weights(), trained)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_listed_schedule_runs_to_its_end(schedule: str) -> None:
    settings = config(schedule=schedule, min_lr_ratio=0.1 if "min_lr" in schedule else None)
    policy, optimization = build(settings)
    assert optimization.lr["actor"] == pytest.approx(0.05)
    train(policy, optimization, range(TOTAL))
    ends_at = {"constant": 1, "constant_with_warmup": 1, "cosine_with_min_lr": 0.1}
    if schedule in ends_at:
        assert optimization.lr["actor"] == pytest.approx(0.05 * ends_at[schedule])
    else:
        assert optimization.lr["actor"] < 0.05


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin'; known schedules: constant, constant_with_warmup, linear"),
        ({"schedule": "cosine_warmup_with_min_lr"}, "known schedules"),
        ({"warmup": 5}, "schedule 'constant' has no warm-up; use 'constant_with_warmup'"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio is 0.1 with schedule 'constant'"),
        ({"schedule": "cosine_with_min_lr"}, "min_lr_ratio is None with schedule 'cosine_with_min_lr'"),
        ({"schedule": "cosine_with_min_lr", "min_lr_ratio": 2.0}, "min_lr_ratio is 2.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"groups": {"actor": {"lr": -1.0}}}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"groups": {"actor": {"momentum": 1.0}}}, "momentum"),
        ({"groups": {"actor": {"method": "muon"}}}, "lr is missing: with method 'muon'"),
    ],
)
def test_a_wrong_config_is_refused_in_a_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(OptimizerConfig).validate_python(wrong)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("kind", [OptimizerConfig, GroupConfig])
def test_every_field_says_what_it_is(kind: type) -> None:
    properties = TypeAdapter(kind).json_schema(mode="validation")["properties"]
    assert {f.name for f in fields(kind)} == properties.keys()
    assert all(entry.get("description") for entry in properties.values())


def test_groups_must_be_the_policys() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.noise_head .* it trains: actor, critic"):
        build(config(groups={"noise_head": GroupConfig()}))
    with pytest.raises(ConfigError, match="trains no parameters"):
        Optimization(config(), {"actor": []}, TOTAL, max_skipped=10)
    shared = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="groups 'actor' and 'critic'"):
        Optimization(config(), {"actor": [shared], "critic": [shared]}, TOTAL, max_skipped=10)


def test_the_order_of_groups_in_the_policy_does_not_matter() -> None:
    policy, optimization = build(FULL)
    twin = Policy()
    other = Optimization(FULL, dict(reversed(twin.trainable().items())), TOTAL, max_skipped=10)
    train(policy, optimization, range(3))
    train(twin, other, range(3))
    assert_equal(policy.weights(), twin.weights())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"noise_head/0/exp_avg": torch.zeros(1)},
            r"holds 'noise_head/0/exp_avg', .* trained groups actor \(4 parameters\), critic \(3",
        ),
        ({"critic/1/ema": None}, "lacks 'critic/1/ema'"),
        ({"critic/1/step": None}, "lacks 'critic/1/step'"),
        ({"critic/1/exp_avg": torch.zeros(3)}, r"critic/1/exp_avg has shape \(3,\), the parameter has \(1,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change: dict[str, Tensor | None], sentence: str) -> None:
    policy, optimization = build(FULL)
    train(policy, optimization, range(2))
    tensors, meta = snapshot(optimization)
    train(policy, optimization, range(2, 4))
    before = snapshot(optimization)
    wrong = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=sentence):
        optimization.load(wrong, meta)
    assert_equal(optimization.state()[0], before[0])
    assert optimization.state()[1] == before[1]


def test_a_group_set_to_null_has_nothing_of_its_own_and_need_not_exist() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    config = OptimizerConfig(lr=0.1, groups={"actor": None, "critic": None})
    assert Optimization(config, {"actor": [weight]}, total_updates=1, max_skipped=1).lr == {"actor": 0.1}
