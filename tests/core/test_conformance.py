"""``mmrl check-policy``: tiny policies of every kind hold, and what is broken on purpose is found by the check for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmrl.cli import app
from mmrl.conformance import checks
from policies.language_model import LanguageModel
from policies.mlp import MLP
from tests.policies import tiny_chat, tiny_diffusion

ALL = ("the same draws", "rows beside it", "log-probs of acting", "finite", "gradient")
TALKING = (
    "prefix preservation",
    "drift",
    "image count",
    "truncation",
    "position ids",
    "padding",
    "packing",
    "log-probs of turns",
    "log-probs of the model",
    "kept keys and values",
)
PAINTING = ("scores of steps", "steps without noise", "batches", "saved and opened", "guidance", "window", "noise")


def failed(policy: Any) -> set[str]:
    return {check.name for check in checks(policy) if not check.ok}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    written: dict[tuple[str, str], Path] = {}

    def write(family: str = "qwen2_5_vl", template: str = "any_role") -> Path:
        if (family, template) not in written:
            written[family, template] = tiny_chat.write(tmp_path_factory.mktemp("tiny"), family, template)
        return written[family, template]

    return write


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_models_with_eyes_hold(folder: Callable[..., Path], family: str) -> None:
    found = list(checks(tiny_chat.build(folder(family, "drops_pictures" if family == "qwen3_vl" else "any_role"))))
    assert [check for check in found if not check.ok] == []
    assert tuple(check.name for check in found) == ALL + TALKING


def test_models_without_eyes_hold(folder: Callable[..., Path]) -> None:
    config = LanguageModel.Config(checkpoint=str(folder("llama", "strings")), critic={"hidden": (8,)})  # type: ignore[arg-type]
    found = list(checks(LanguageModel(config, device=tiny_chat.CPU)))
    assert [check for check in found if not check.ok] == []
    assert tuple(check.name for check in found) == (*ALL[:4], "values of acting", ALL[4], *TALKING)


def test_policies_that_do_not_talk_hold() -> None:
    found = list(checks(MLP(MLP.Config(state_dim=4, hidden=(8,), action_dim=2), device=tiny_chat.CPU)))
    assert [check for check in found if not check.ok] == []
    assert {check.name for check in found} == {*ALL, "values of acting"}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_diffusion.write_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.mark.parametrize(
    "fields",
    [
        {"trained_steps": {"which": "window", "size": 2, "shared_prefix": True}},
        {"sampler": "cps", "dtype": "bfloat16", "train": "lora", "guidance_detached": True},
        {"sampler": "ode", "guidance": 1.0},
    ],
    ids=lambda fields: fields.get("sampler", "window"),
)
def test_image_generators_hold(sd3: str, fields: dict[str, Any]) -> None:
    found = list(checks(tiny_diffusion.build(sd3, **fields)))
    assert [check for check in found if not check.ok] == []
    tried = ALL if fields.get("sampler") != "ode" else ALL[:2]
    assert tuple(check.name for check in found) == tried + PAINTING


def _jitter(policy: Any) -> None:
    """The network says something else each time."""
    predict, calls = policy.family.predict, []
    policy.family.predict = lambda *inputs: (calls.append(1), predict(*inputs) * (1 + 1e-3 * len(calls)))[1]


def _drift(policy: Any) -> None:
    transition = policy.family.schedule.transition

    def other(*inputs: Any, rule: str, level: Any) -> Any:
        moved, delta = transition(*inputs, rule=rule, level=level)
        return (moved if rule == "ode" else moved._replace(mean=moved.mean + 0.01)), delta

    policy.family.schedule.transition = other


def _mix(policy: Any) -> None:
    """Pictures see what stands beside them."""
    predict = policy.family.predict
    policy.family.predict = lambda *inputs: predict(*inputs) + 0.1 * predict(*inputs).mean(0, keepdim=True)


def _forget(policy: Any) -> None:
    save, weight = policy.save, policy.network.proj_out.weight.data

    def scaled(folder: Path) -> None:
        weight.mul_(1.5)
        save(folder)
        weight.div_(1.5)

    policy.save = scaled


def _swap(policy: Any) -> None:
    """Where both branches are asked at once, they change places."""
    predict = policy.family.predict
    policy.family.predict = lambda x, *rest: predict(x, *rest).roll(4, 0) if len(x) == 8 else predict(x, *rest)


def _exchange(policy: Any) -> None:
    walk = policy._sampler.walk_from_one_point
    policy._sampler.walk_from_one_point = lambda network, noise, *rest: walk(network, noise.flip(0), *rest)


def _randomise(policy: Any) -> None:
    policy._noise = lambda draws: torch.randn(len(draws), *policy.family.latent_shape)


BROKEN: dict[str, Callable[[Any], None]] = {
    "scores of steps": _jitter,
    "steps without noise": _drift,
    "batches": _mix,
    "saved and opened": _forget,
    "guidance": _swap,
    "window": _exchange,
    "noise": _randomise,
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_part_of_an_image_generator_fails_its_check(sd3: str, name: str) -> None:
    policy = tiny_diffusion.build(sd3, dtype="float64")
    BROKEN[name](policy)
    assert name in {check.name for check in policy.checks() if not check.ok}


def test_a_template_that_counts_turns_drifts(folder: Callable[..., Path], tmp_path: Path) -> None:
    tiny_chat.build(folder()).save(tmp_path)
    broken = tiny_chat.TEMPLATES["any_role"].replace("{{ m['role'] }}", "{{ m['role'] }} {{ loop.index }}")
    (tmp_path / "chat_template.jinja").write_text(broken)
    assert failed(tiny_chat.build(tmp_path)) == {"drift"}


def test_a_template_that_loses_a_second_picture_is_found(folder: Callable[..., Path], tmp_path: Path) -> None:
    tiny_chat.build(folder()).save(tmp_path)
    one = (
        "{% set ns = namespace(n=0) %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}{% set ns.n = ns.n + 1 %}{% endif %}"
    )
    shown = "{% if p['type'] != 'image' or ns.n < 2 %}"
    broken = tiny_chat.TEMPLATES["any_role"].replace("{% for p in m['content'] %}", one + shown, 1)
    broken = broken.replace("{% endfor %}<|im_end|>", "{% endif %}{% endfor %}<|im_end|>", 1)
    (tmp_path / "chat_template.jinja").write_text(broken)
    assert "image count" in failed(tiny_chat.build(tmp_path))


def test_each_broken_part_fails_its_check(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(change: Callable[[Any], None]) -> set[str]:
        policy = tiny_chat.build(folder())
        change(policy)
        return failed(policy)

    def positions(policy: Any) -> None:
        place = policy.network.place
        policy.network.place = lambda seen: (place(seen)[0], place(seen)[1] + 1)

    def kept(policy: Any) -> None:
        keep = policy.engine.keep

        def forgetful(messages: Any) -> None:
            if policy.engine._last is not None:
                policy.engine._last.next_B = [place + 1 for place in policy.engine._last.next_B]
            keep(messages)

        policy.engine.keep = forgetful

    def temperature(policy: Any) -> None:
        policy.network.model.get_input_embeddings().weight.data *= 1.0
        inner = policy.engine._choose
        policy.engine._choose = lambda hidden, draws: inner(hidden * 1.5, draws)

    assert {"position ids", "log-probs of the model"} <= broken(positions)
    assert {"kept keys and values", "log-probs of turns"} <= broken(kept)
    assert {"log-probs of acting", "log-probs of turns"} <= broken(temperature)


def test_the_command_prints_a_table_and_fails_where_something_fails(folder: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "check.yaml"
    config.write_text(f"policy: {{target: 'policies.qwen_vl:QwenVL', checkpoint: '{folder()}', dtype: float64}}\ndevice: cpu\n")
    good = CliRunner().invoke(app, ["check-policy", str(config)])
    assert good.exit_code == 0, good.output
    assert all(name in good.output for name in (*ALL, *TALKING)) and "NO" not in good.output
    tiny_chat.build(folder()).save(tmp_path / "broken")
    template = tiny_chat.TEMPLATES["any_role"].replace("{{ m['role'] }}", "{{ m['role'] }} {{ loop.index }}")
    (tmp_path / "broken" / "chat_template.jinja").write_text(template)
    bad = CliRunner().invoke(app, ["check-policy", str(config), f"policy.checkpoint={tmp_path / 'broken'}"])
    assert bad.exit_code == 1 and "NO" in bad.output and "from token" in bad.output
    wrong = CliRunner().invoke(app, ["check-policy", str(config), "policy.temprature=1"])
    assert wrong.exit_code == 2 and "temperature" in wrong.output


def test_the_policy_of_a_run_is_checked() -> None:
    result = CliRunner().invoke(app, ["check-policy", "configs/quickstart.yaml"])
    assert result.exit_code == 0, result.output
    assert torch.is_grad_enabled() and "log-probs of acting" in result.output
