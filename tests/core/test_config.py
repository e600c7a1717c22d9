"""Configuration: what is accepted, and the sentence that refuses what is not."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl import component, config
from mmrl.collecting import CollectionConfig
from mmrl.component import Component
from mmrl.describe import describe
from mmrl.errors import ConfigError, RegistryError
from mmrl.measuring import MeasurementConfig
from mmrl.registry import ROOT
from mmrl.serving import ServingConfig

STRICT = ConfigDict(extra="forbid")


class Head:
    @dataclass(frozen=True, config=STRICT)
    class Config:
        width: int = 8


class Robot:
    """A policy that has everything, unless its sampler is 'ode'."""

    act = evaluate = pack = value = supervised_loss = None

    @dataclass(frozen=True, config=STRICT)
    class Config:
        sampler: Literal["ode", "sde"] = "sde"
        """How actions are drawn."""
        cameras: tuple[str, ...] = ("front",)
        folder: Path = Path("weights")
        head: Component | None = None
        limit: float = float("inf")
        extras: dict[str, float] = field(default_factory=dict)

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device

    @staticmethod
    def lacks(config: Config) -> dict[str, tuple[str, str]]:
        return {"likelihood": ("sampler", "is 'ode'; use 'sde'")} if config.sampler == "ode" else {}


class Imitator:
    """A policy without likelihood or critic."""

    act = supervised_loss = None
    Config = Head.Config


class World:
    reset = None

    @dataclass(frozen=True, config=STRICT)
    class Config:
        split: str = "train"


class Data:
    batch = None

    @dataclass(frozen=True, config=STRICT)
    class Config:
        episodes: int


FAKES = {"fake:Head": Head, "fake:Robot": Robot, "fake:Imitator": Imitator, "fake:World": World, "fake:Data": Data}
REAL = component.resolve

BASE = """
name: run
policy: {target: "fake:Robot"}
environment: {target: "fake:World"}
stages:
  - name: warm
    algorithm: {target: "mmrl.algorithms.sft:SFT"}
    iterations: 3
    data: {target: "fake:Data", episodes: 4}
  - name: improve
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 4}
    iterations: 5
    collect: {num_envs: 8, decisions: 2}
    supervised: {data: {target: "fake:Data", episodes: 4}, batch_size: 2}
"""


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "resolve", lambda target: FAKES.get(target) or REAL(target))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(BASE)
    return file


def refusal(path: Path, *overrides: str) -> str:
    """The sentence(s) that refuse ``path`` under ``overrides``, without the file's name, which each must start with."""
    with pytest.raises(ConfigError) as error:
        config.load(path, overrides)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


def test_defaults_and_values_arrive(path: Path) -> None:
    run = config.load(path)
    assert run.stages[1].algorithm.config.group_size == 4
    assert run.stages[1].algorithm.config.clip_low == 0.2
    assert run.policy.cls is Robot
    assert run.policy.build("cpu").config is run.policy.config
    assert run.evaluation.first_task == 1_000_000


def test_overrides_reach_stages_by_name_and_by_index(path: Path) -> None:
    run = config.load(path, ["stages.improve.optimizer.lr=1e-4", "stages.0.optimizer.lr=2", "policy.cameras=[a, b]"])
    assert [stage.optimizer.lr for stage in run.stages] == [2.0, 1e-4]
    assert run.policy.config.cameras == ("a", "b")


def test_exponent_without_a_point_is_a_number_in_the_file_too(path: Path) -> None:
    path.write_text(BASE.replace("iterations: 3", "iterations: 3\n    optimizer: {lr: 1e-4}"))
    assert config.load(path).stages[0].optimizer.lr == 1e-4


def test_interpolations_are_resolved(path: Path) -> None:
    assert config.load(path, ["seed=7", "output='out/${seed}'"]).output == "out/7"


def test_another_target_drops_the_fields_of_the_old_one(path: Path) -> None:
    run = config.load(path, ["stages.improve.algorithm.target=mmrl.algorithms.ppo:PPO", "stages.improve.algorithm.lam=0.5"])
    assert run.stages[1].algorithm.config.lam == 0.5
    assert "group_size" not in run.stages[1].algorithm.dump()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.improve.optimizer.lrr=1", "unknown key 'stages.improve.optimizer.lrr'; did you mean 'lr'?"),
        (
            "stages.improve.optimizer.groups.actor.lrr=1",
            "unknown key 'stages.improve.optimizer.groups.actor.lrr'; did you mean 'lr'?",
        ),
        (
            "stages.improve.algorithm.group_sise=2",
            "unknown key 'stages.improve.algorithm.group_sise'; did you mean 'group_size'?",
        ),
        ("policy.head={target: 'fake:Head', widht: 2}", "unknown key 'policy.head.widht'; did you mean 'width'?"),
        (
            "save={every: 3}",
            "unknown key 'save'; known are checkpoint, device, environment, evaluation, name, output, policy, seed, stages, "
            "tensorboard, threads",
        ),
        ("polic.x=1", "unknown key 'polic'; did you mean 'policy'?"),
        ("stages.improv.iterations=1", "unknown key 'stages.improv'; did you mean 'improve'?"),
        ("stages.2.iterations=1", "unknown key 'stages.2'; known are improve, warm"),
        ("evaluation.environment.splitt=x", "unknown key 'evaluation.environment.splitt'; did you mean 'split'?"),
        ("stages.warm.policy.sampl=sde", "unknown key 'stages.warm.policy.sampl'; did you mean 'sampler'?"),
        ("stages.improve.optimizer.lr='1'", "'stages.improve.optimizer.lr' must be a number, got '1'"),
        ("stages.improve.collect.num_envs=8.0", "'stages.improve.collect.num_envs' must be an integer, got 8.0"),
        ("tensorboard=1", "'tensorboard' must be a boolean, got 1"),
        ("stages.improve.iterations=0", "'stages.improve.iterations' must be greater than 0, got 0"),
        ("policy.sampler=od", "'policy.sampler' must be 'ode' or 'sde', got 'od'"),
        ("policy.head=3", "'policy.head' must be a mapping with a 'target', got 3"),
        ("policy.head={width: 3}", "'policy.head.target' is missing; it names a class, such as 'policies.pi0:Pi0'"),
        ("policy.head={target: 'fake:Data'}", "'policy.head.episodes' is missing"),
        (
            "stages.improve.supervised.weight=x",
            "'stages.improve.supervised.weight' must be a number or a list, got 'x'",
        ),
        (
            "stages.improve.supervised.weight=-1",
            "'stages.improve.supervised.weight' must be greater than or equal to 0 or a list, got -1",
        ),
        ("name=a b", r"'name' must match pattern '^[A-Za-z0-9_][\w.-]*$', got 'a b'"),
        ("policy={target: 'fake:Head'}", "'policy.target' is fake:Head, which is no policy (it has no 'act')"),
        (
            "environment={target: 'fake:Data', episodes: 1}",
            "'environment.target' is fake:Data, which is no environment (it has no 'reset')",
        ),
        (
            "stages.improve.algorithm={target: 'fake:World'}",
            "'stages.improve.algorithm.target' is fake:World, which is no algorithm (it has no 'needs')",
        ),
        (
            "stages.warm.data={target: 'fake:World'}",
            "'stages.warm.data.target' is fake:World, which is no source of examples (it has no 'batch')",
        ),
        (
            "stages.improve.supervised.data={target: 'fake:World'}",
            "'stages.improve.supervised.data.target' is fake:World, which is no source of examples (it has no 'batch')",
        ),
        ("device=cdua", "'device': 'cdua' is no torch device; write auto, cpu, cuda or cuda:1"),
        ("name=???", "'name' is '???', which asks for a value; give one with name=..."),
        ("lr", "override 'lr' is not of the form 'key=value', such as 'stages.improve.optimizer.lr=1e-4'"),
        ("stages.warm.name=improve", "'stages' has 2 stages called 'improve'; each needs a name of its own"),
    ],
)
def test_each_mistake_has_its_sentence(path: Path, override: str, sentence: str) -> None:
    assert refusal(path, override) == sentence


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("stages.improve.algorithm.group_size=3", ["stages.improve.algorithm.group_size", "stages.improve.collect.num_envs"]),
        ("stages.improve.collect.parts=3", ["'stages.improve.collect.parts' is 3", "'stages.improve.collect.num_envs' (8)"]),
        (
            "stages.improve={algorithm: {group_size: 4}, collect: {num_envs: 8, parts: 4}}",
            [
                "'stages.improve.algorithm.group_size' is 4",
                "'stages.improve.collect.num_envs' (8)",
                "'stages.improve.collect.parts' (4)",
            ],
        ),
        ("stages.improve.collect=null", ["stages.improve.algorithm", "needs 'stages.improve.collect'"]),
        ("stages.warm.collect={num_envs: 1, decisions: 1}", ["unused key 'stages.warm.collect'", "'stages.warm.algorithm'"]),
        ("stages.warm.data=null", ["'stages.warm.algorithm'", "needs 'stages.warm.data'"]),
        (
            "stages.improve.data={target: 'fake:Data', episodes: 1}",
            ["unused key 'stages.improve.data'", "'stages.improve.algorithm'"],
        ),
        (
            "stages.warm.supervised={data: {target: 'fake:Data', episodes: 1}, batch_size: 1}",
            ["unused key 'stages.warm.supervised'", "'stages.warm.algorithm'"],
        ),
        (
            "policy={target: 'fake:Imitator'}",
            ["'stages.improve.algorithm'", "needs a policy with evaluate and pack", "'policy.target'"],
        ),
        ("policy.sampler=ode", ["'stages.improve.algorithm'", "needs log-probabilities", "'policy.sampler' is 'ode'; use 'sde'"]),
        (
            "stages.improve.policy.sampler=ode",
            ["'stages.improve.algorithm'", "'stages.improve.policy.sampler' is 'ode'; use 'sde'"],
        ),
    ],
)
def test_two_keys_that_do_not_fit_are_both_named(path: Path, override: str, keys: list[str]) -> None:
    sentence = refusal(path, override)
    assert "\n" not in sentence
    assert all(key in sentence for key in keys), sentence


def test_the_first_five_mistakes_are_reported_at_once(path: Path) -> None:
    lines = refusal(path, *[f"wrong{i}=1" for i in range(7)]).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 2 more"


def test_unknown_class_names_the_nearest(path: Path) -> None:
    sentence = refusal(path, "stages.improve.algorithm.target=mmrl.algorithms.grpo:GRP")
    assert sentence.startswith("'stages.improve.algorithm.target': target 'mmrl.algorithms.grpo:GRP'")
    assert sentence.endswith("mmrl.algorithms.grpo has no 'GRP'; did you mean 'GRPO'?")


def test_dump_then_load_is_the_same_run(path: Path, tmp_path: Path) -> None:
    run = config.load(
        path, ["policy.head={target: 'fake:Head', width: 3}", "policy.limit=.inf", "stages.improve.optimizer.lr=1e-5"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(run))
    assert config.load(again) == run
    assert yaml.safe_load(config.dump(run))["policy"]["head"] == {"target": "fake:Head", "width": 3}
    assert config.load(path) != run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(
    lr=st.floats(0, 1e3),
    folder=st.text("ab/ -:#1e", min_size=1),
    extras=st.dictionaries(st.text("abc.", min_size=1), st.floats(allow_nan=False)),
)
def test_any_value_survives_dump_and_load(path: Path, lr: float, folder: str, extras: dict[str, float]) -> None:
    data: dict[str, Any] = yaml.safe_load(BASE)
    data["policy"] |= {"folder": folder, "extras": extras}
    data["stages"][0]["optimizer"] = {"lr": lr}
    path.write_text(yaml.safe_dump(data))
    run = config.load(path)
    path.write_text(config.dump(run))
    assert config.load(path) == run
    assert run.stages[0].optimizer.lr == lr and run.policy.config.extras == extras


@pytest.mark.parametrize(
    "text", ["1e5", "+12e-3", "1.e3", "1_0E3", "a ${seed} b", r"\${seed}", r"\\${x", "1.5", "null", "0x1f", "on", "x"]
)
def test_a_text_that_looks_like_something_else_survives_dump_and_load(path: Path, text: str) -> None:
    run = config.load(path).model_copy(update={"output": text})
    for written in (config.dump(run), describe(run)):
        path.write_text(written)
        assert config.load(path).output == text


REWARDS = """
rewards:
  - {target: "mmrl.rewards.pick_score:PickScore", weight: 1}
  - {target: "mmrl.rewards.clip_score:ClipScore", name: watch, weight: 0}
  - {target: "mmrl.rewards.form:Form"}
  - {target: "mmrl.rewards.form:Form"}
"""


def test_an_item_of_a_list_is_addressed_by_its_name_or_its_class_or_its_place() -> None:
    blocks = yaml.safe_load(REWARDS)
    changes = {"pick_score": {"weight": 2}, "watch": {"weight": 3}, "3": {"weight": 4}}
    changed = component.merge(blocks, {"rewards": changes})["rewards"]
    assert [block.get("weight") for block in changed] == [2, 3, None, 4]
    assert [block["target"] for block in changed] == [block["target"] for block in blocks["rewards"]]
    with pytest.raises(ConfigError, match=r"unknown key 'rewards\.clip_score'; known are form, pick_score, watch$"):
        component.merge(blocks, {"rewards": {"clip_score": {"weight": 1}}})
    with pytest.raises(ConfigError, match=r"'rewards\.form' may mean any of 2 items; address one by its place, 2, 3$"):
        component.merge(blocks, {"rewards": {"form": {"weight": 1}}})


def test_base_is_read_first_and_stages_may_be_named(path: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: x.yaml\nname: child\nstages: {improve: {iterations: 9}}\n")
    run = config.load(child)
    assert (run.name, run.stages[0].iterations, run.stages[1].iterations) == ("child", 3, 9)


def test_base_errors_name_the_file(tmp_path: Path) -> None:
    loop, lost = tmp_path / "loop.yaml", tmp_path / "lost.yaml"
    loop.write_text("base: loop.yaml\n")
    lost.write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"loop\.yaml: 'base' leads back"):
        config.load(loop)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        config.load(lost)
    with pytest.raises(ConfigError, match=r": is a folder; name a YAML file in it$"):
        config.load(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2\n", "- 1\n", "\x00"])
def test_what_is_no_yaml_mapping_is_refused_in_a_line(path: Path, text: str) -> None:
    path.write_text(text)
    assert "\n" not in refusal(path)


def test_override_revalidates_and_changes_nothing_else(path: Path) -> None:
    policy = config.load(path, ["policy.cameras=[wrist]"]).policy
    changed = policy.override({"sampler": "ode"}, where="stages.improve.policy")
    assert (changed.config.sampler, changed.config.cameras, policy.config.sampler) == ("ode", ("wrist",), "sde")
    with pytest.raises(ConfigError, match=r"unknown key 'stages\.improve\.policy\.samplr'; did you mean 'sampler'\?"):
        policy.override({"samplr": "ode"}, where="stages.improve.policy")


def test_a_run_config_is_frozen(path: Path) -> None:
    run = config.load(path)
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


def test_a_class_without_config_is_no_component() -> None:
    with pytest.raises(component.Problems, match="has no Config"):
        Component.parse({"target": "mmrl.types:Batch"})
    with pytest.raises(RegistryError):
        REAL("mmrl.types")


def test_describe_is_the_same_yaml_with_a_comment_per_field(path: Path) -> None:
    run = config.load(path)
    text = describe(run)
    assert yaml.safe_load(text) == yaml.safe_load(config.dump(run))
    lines = {line.split(":")[0].strip(" -"): line for line in text.splitlines()}
    assert "# Episodes per task (G); must divide the stage's ``collect.num_envs``." in lines["group_size"]
    assert "# Ratios below 1 - clip_low earn nothing further" in lines["clip_low"]
    assert lines["sampler"].endswith("# How actions are drawn.")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_config_of_this_project_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kinds: dict[str, Any] = {"collect": CollectionConfig, "evaluate": MeasurementConfig, "serve": ServingConfig}
    kind = kinds.get(file.parent.name)
    loaded = config.load(file) if kind is None else config.load_as(kind, file)
    assert kind is ServingConfig or loaded.name
