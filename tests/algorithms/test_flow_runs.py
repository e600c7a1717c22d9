"""Runs with a flow model of a few weights: every algorithm learns, resumes bit for bit, and is refused where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl import component, config
from mmrl.config import load
from mmrl.errors import ConfigError
from mmrl.progress import Quiet
from mmrl.snapshots import Snapshot
from mmrl.trainer import resume, train
from mmrl.types import Batch
from mmrl.updates import RolloutUpdate, SupervisedUpdate
from tests.algorithms.flows import Aim, Examples, Field, Prompted
from tests.core import tiny_run

FAKES = {"fake:Field": Field, "fake:Aim": Aim, "fake:Prompted": Prompted, "fake:Examples": Examples}
REAL = component.resolve


class Mute:
    """A policy that can be scored and imitated, but is no flow model."""

    act = evaluate = pack = supervised_loss = None
    Config = Field.Config


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**FAKES, "fake:Mute": Mute}
    monkeypatch.setattr(component, "resolve", lambda target: known.get(target) or REAL(target))


BASE = """
name: flows
threads: 1
tensorboard: false
policy: {{target: "fake:Field"{policy}}}
environment: {{target: "{environment}"}}
evaluation: {{episodes: 2, num_envs: 2, videos: 0}}
checkpoint: {{every: 1}}
stages:
  - name: improve
    algorithm: {{target: "mmrl.algorithms.{algorithm}}}
    iterations: {iterations}
    collect: {{num_envs: 16}}
    keep_conversations: 0
    optimizer: {{lr: 0.02}}
    micro_batch: 6
"""
SOAR = """
name: flows
threads: 1
tensorboard: false
policy: {target: "fake:Field", sampler: ode}
environment: {target: "fake:Aim"}
evaluation: {episodes: 2, num_envs: 2, videos: 0}
checkpoint: {every: 1}
stages:
  - name: warm_start
    algorithm: {target: "mmrl.algorithms.soar:SOAR", batch_size: 8, paths: 2, points: 2}
    data: {target: "fake:Examples"}
    iterations: 4
    optimizer: {lr: 0.02}
"""
ODE = ", sampler: ode"
ALGORITHMS = {
    "flow_grpo": ('flow_grpo:FlowGRPO", group_size: 8, clip_low: 0.2, clip_high: 0.2, kl_weight: 0.01, log_ratio: guard', ""),
    "nft": ('nft:DiffusionNFT", group_size: 8, minibatches: 2, behaviour: {rate: 0.3, limit: 0.6}, kl_weight: 0.01', ODE),
    "awm": (
        'awm:AWM", group_size: 8, clip_low: 0.2, clip_high: 0.2, kl_weight: 0.1, kl_to: average, '
        "average: {rate: 1, limit: 0.5}, times: {count: 2}",
        ODE,
    ),
    "dpo": ('diffusion_dpo:DiffusionDPO", group_size: 4, beta: 20, times: {count: 2}', ODE),
}
PROMPTS = 'flow_grpo:FlowGRPO", group_size: 1, compare: prompt, baseline: none, scale: none, history: 8, min_history: 4'


def write(folder: Path, algorithm: str, policy: str = "", iterations: int = 4, environment: str = "fake:Aim") -> Path:
    path = folder / "flows.yaml"
    path.write_text(BASE.format(algorithm=algorithm, policy=policy, iterations=iterations, environment=environment))
    return path


def stopping(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """The third update fails once, before it is made."""
    calls, run = list[int](), kind.run  # type: ignore[attr-defined]

    def broken(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the power is gone")
        return run(self, *arguments)

    monkeypatch.setattr(kind, "run", broken)


def assert_resumes(path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> list[dict[str, Any]]:
    whole, broken = path.parent / "whole", path.parent / "broken"
    train(load(path), whole, Quiet())
    stopping(monkeypatch, kind)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(load(path), broken, Quiet())
    resume(broken, Quiet())
    assert tiny_run.rows(broken) == tiny_run.rows(whole)
    assert tiny_run.weights(broken) == tiny_run.weights(whole)
    tensors, meta = tiny_run.newest(whole)
    again, same = tiny_run.newest(broken)
    assert meta == same and tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    return [row for row in tiny_run.rows(whole) if row["kind"] == "train"]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_resumed_run_is_the_unbroken_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, policy = ALGORITHMS[name]
    rows = assert_resumes(write(tmp_path, algorithm, policy), monkeypatch, RolloutUpdate)
    assert len(rows) == 4 and all(row["update/grad_norm"] > 0 for row in rows)
    if name == "flow_grpo":
        assert all(row["policy/log_prob_mismatch_max"] < 1e-12 for row in rows)
        assert rows[0]["policy/kl_reference"] == 0 < rows[1]["policy/kl_reference"]


def test_a_resumed_run_remembers_what_prompts_earned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, PROMPTS, environment="fake:Prompted")
    assert_resumes(path, monkeypatch, RolloutUpdate)
    tensors, _ = tiny_run.newest(tmp_path / "whole")
    assert tensors["algorithm/counts"].tolist() == [8, 8, 8]


def test_a_resumed_soar_is_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flows.yaml"
    path.write_text(SOAR)
    rows = assert_resumes(path, monkeypatch, SupervisedUpdate)
    assert all(row["loss/auxiliary_loss"] > 0 for row in rows)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_it_learns(name: str, tmp_path: Path) -> None:
    algorithm, policy = ALGORITHMS[name]
    path = write(tmp_path, algorithm, policy, iterations=25)
    run = train(load(path, ["checkpoint.every=100", "stages.improve.collect.num_envs=32", "stages.improve.micro_batch=null"]),
                tmp_path / "run", Quiet())  # fmt: skip
    returns = [row["rollout/return"] for row in tiny_run.rows(run) if row["kind"] == "train"]
    assert sum(returns[-5:]) / 5 > sum(returns[:5]) / 5 + 0.5


def test_nft_collects_with_an_average_of_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected, trained, told = list[Tensor](), list[Tensor](), list[int]()
    act, run = Field.act, RolloutUpdate.run

    def acting(self: Field, *arguments: Any, explore: bool) -> Any:
        if explore:
            collected.append(self.net.weight.detach().clone())
        return act(self, *arguments, explore=explore)

    def updating(self: RolloutUpdate, batch: Batch, iteration: int) -> Any:
        trained.append(self.policy.net.weight.detach().clone())
        return run(self, batch, iteration)

    monkeypatch.setattr(Field, "act", acting)
    monkeypatch.setattr(RolloutUpdate, "run", updating)
    monkeypatch.setattr(Field, "at_iteration", lambda self, iteration: told.append(iteration))
    train(load(write(tmp_path, *ALGORITHMS["nft"])), tmp_path / "run", Quiet())
    average = trained[0]
    for n, (collecting, now) in enumerate(zip(collected, trained, strict=True)):
        decay = min(0.3 * n, 0.6)
        average = decay * average + (1 - decay) * now
        torch.testing.assert_close(collecting, average, rtol=1e-12, atol=1e-12)
        assert n == 0 or not torch.allclose(collecting, now)
    assert told == [0, 1, 2, 3] and len(collected) == 4


def test_a_snapshot_is_put_on_and_off_without_a_trace() -> None:
    field = Field()
    snapshot = Snapshot(field, lambda iteration: 0.25)
    first = field.net.weight.detach().clone()
    trace = {"prompt": torch.randn(2, 2, dtype=torch.float64)}
    x_t, t_N = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    said = field.velocity(trace, x_t, t_N).detach()
    with torch.no_grad():
        field.net.weight += 1
    loss = field.velocity(trace, x_t, t_N).sum()
    assert torch.equal(snapshot.velocity(trace, x_t, t_N), said)  # between forward and backward, too
    loss.backward()
    assert field.net.weight.grad is not None and torch.equal(field.net.weight.detach(), first + 1)
    snapshot.follow(7)
    with snapshot.worn():
        torch.testing.assert_close(field.net.weight.detach(), first + 0.75)
    saved = {name: tensor.clone() for name, tensor in snapshot.state_dict().items()}
    snapshot.follow(8)
    snapshot.load_state_dict(saved)
    with pytest.raises(ZeroDivisionError), snapshot.worn():
        torch.testing.assert_close(field.net.weight.detach(), first + 0.75)
        raise ZeroDivisionError
    assert torch.equal(field.net.weight.detach(), first + 1)


class Single(Field):
    """In float32, under autocast while it acts and trains, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.net.float()

    def velocity(self, trace: Any, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        return self.net(torch.cat([x_t, t_N[:, None], trace["prompt"]], 1))

    @contextmanager
    def compute_mode(self, *, train: bool) -> Any:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
            yield


def test_autocast_mixes_up_no_weights() -> None:
    """It keeps what it cast of a parameter: of the trained weights while the old ones are worn, and without gradients."""
    field = Single()
    snapshot = Snapshot(field, lambda iteration: 0.0)
    trace, x_t, t_N = {"prompt": torch.randn(4, 2)}, torch.randn(4, 3), torch.rand(4)
    with field.compute_mode(train=False):
        old = field.velocity(trace, x_t, t_N)
    with torch.no_grad():
        field.net.weight += 1
    with field.compute_mode(train=True):
        before = field.velocity(trace, x_t, t_N)
        assert torch.equal(snapshot.velocity(trace, x_t, t_N), old)
        after = field.velocity(trace, x_t, t_N)
    assert torch.equal(before, after) and not torch.allclose(before, old)
    after.float().sum().backward()
    assert field.net.weight.grad is not None and field.net.weight.grad.any()


# ---------------------------------------------------------------- refusals


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        config.load(path, overrides)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["nft", "awm", "dpo"])
def test_a_policy_without_a_velocity_is_refused_by_both_keys(name: str, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name][0]
    sentence = refusal(write(tmp_path, algorithm), "policy={target: 'fake:Mute'}")
    target = algorithm.split('"')[0]
    assert sentence == (
        f"'stages.improve.algorithm' (mmrl.algorithms.{target}) needs a policy with velocity and clean and examine, "
        "which 'policy.target' (fake:Mute) lacks"
    )


def test_soar_needs_a_velocity_and_examples(tmp_path: Path) -> None:
    path = tmp_path / "flows.yaml"
    path.write_text(SOAR)
    assert "needs a policy with velocity" in refusal(path, "policy={target: 'fake:Mute'}")
    assert "needs 'stages.warm_start.data'" in refusal(path, "stages.warm_start.data=null")


def test_flow_grpo_needs_means_only_where_it_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, ALGORITHMS["flow_grpo"][0])
    config.load(path)
    monkeypatch.delattr(Field, "gives_means")
    assert "needs a policy with gives_means, which 'policy.target' (fake:Field) lacks" in refusal(path)
    config.load(path, ["stages.improve.algorithm.log_ratio=likelihood", "stages.improve.algorithm.kl_form=estimate"])


def test_where_a_field_takes_the_means_away_both_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks: Callable[[Any], Any] = lambda given: {"means": ("reduction", "is 'sum'; use 'mean'")}  # noqa: E731
    monkeypatch.setattr(Field, "lacks", staticmethod(lacks))
    needed = "needs denoising steps with means, and log-probabilities that are means over a step's numbers"
    assert f"{needed}, but 'policy.reduction' is 'sum'; use 'mean'" in refusal(write(tmp_path, ALGORITHMS["flow_grpo"][0]))


def test_an_ode_sampler_has_no_likelihood_for_flow_grpo(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, ALGORITHMS["flow_grpo"][0], ODE))
    assert "needs log-probabilities, but 'policy.sampler' is 'ode'; use 'flow_sde'" in sentence
