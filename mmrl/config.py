"""A run's configuration: YAML, plus ``a.b=c`` overrides, to a validated and frozen ``RunConfig``.

OmegaConf reads the file and resolves interpolations, pydantic validates. The fields below and the ``Config`` of each component
are the only places where a default stands. Every error is a sentence that names the file and the dotted key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from mmrl.component import Component, Problems, jsonable, merge, validate
from mmrl.errors import ConfigError
from mmrl.optim import OptimizerConfig
from mmrl.protocols import AsyncEnvironment
from mmrl.rewarding import RewardBlock
from mmrl.transcripts import TalkingEnvironment

__all__ = ["Block", "Component", "OptimizerConfig", "RunConfig", "device_name", "dump", "load", "load_as", "resolved"]

Kind = TypeVar("Kind", bound=BaseModel)


def device_name(value: str) -> str:
    if value != "auto":
        try:
            torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"'{value}' is no torch device; write auto, cpu, cuda or cuda:1") from error
    return value


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class CollectConfig(Block):
    """How a stage gathers its own experience."""

    num_envs: PositiveInt
    """Environments that are played at a time."""
    parts: PositiveInt = 1
    """Parts they are split into: the policy acts for one while the others simulate, in processes of their own; 1: no overlap.
    Pictures of one part are decoded and scored while those of the next are drawn, where rewards work apart."""
    decisions: PositiveInt | None = None
    """Decisions of each environment per iteration; null: as many as the longest episode takes."""
    auto_reset: bool | None = None
    """Whether an environment whose episode ended starts another within the iteration; null: unless whole episodes are judged."""


class SupervisedConfig(Block):
    """A supervised term that rides on a stage that learns from its own rollouts."""

    data: Component
    """Where the examples come from."""
    batch_size: PositiveInt
    """Examples per update."""
    weight: NonNegativeFloat | Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)] = 0.2
    """Weight of the term; [from, to] moves linearly over the stage."""


class ScoringConfig(Block):
    """How the rewards of a stage become one."""

    combine: Literal["sum", "normalised"] = "sum"
    """sum: weighted; normalised: each is first put on the scale of its group (see mmrl/rewarding.py)."""
    environment: float = 0.0
    """Weight of the environment's own reward, which ``rewards`` otherwise replace."""


class StageConfig(Block):
    """One stage of a run: an algorithm, what it learns from, and for how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
    """Name in metrics, reports and overrides (``stages.NAME.optimizer.lr=1e-4``)."""
    algorithm: Component
    """What turns experience or examples into a loss."""
    iterations: PositiveInt
    """How often the stage collects (or draws) and updates."""
    collect: CollectConfig | None = None
    """Needed by algorithms that learn from rollouts."""
    data: Component | None = None
    """Needed by algorithms that learn from examples."""
    rewards: list[RewardBlock] = Field(default_factory=list)
    """What conversations are worth, in place of the environment's own reward; each a ``target`` with ``weight`` and ``name``."""
    scoring: ScoringConfig | None = None
    """How ``rewards`` become one; null: their weighted sum."""
    supervised: SupervisedConfig | None = None
    """A supervised term beside the algorithm's own loss."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer, parameter groups and learning-rate schedule."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Fields of the policy that differ in this stage."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Fields of the environment that differ in this stage."""
    keep_conversations: NonNegativeInt = 4
    """Conversations of a rollout kept for the report, of one task: the best, the worst, the second best...; 0 keeps none."""
    keep_every: PositiveInt | None = None
    """Iterations between rollouts of which conversations are kept; null: a tenth of the stage. The last is always among them."""
    max_skipped_updates: PositiveInt = 5
    """Updates in a row with a loss or gradient that is not finite before the run stops."""
    micro_batch: PositiveInt | None = None
    """Samples per forward and backward pass; null takes the whole mini-batch. Of pictures one denoising step at a time."""
    evaluate_every: NonNegativeInt | None = None
    """Iterations between evaluations within this stage; null: ``evaluation.every``."""


class MeasuringConfig(Block):
    """On which episodes a policy is measured."""

    episodes: PositiveInt = 512
    """Episodes to play, each of another task id."""
    per_task: bool = False
    """Whether ``episodes`` are those of each task (family) instead of all together."""
    first_task: NonNegativeInt = 1_000_000
    """Id of the first evaluation task. Training's lie elsewhere: rollouts' above 4 billion, demonstrations' where they say."""
    num_envs: PositiveInt = 256
    """Environments that run in lock-step; the results do not depend on it."""
    act_batch: PositiveInt = 32
    """Observations that the policy is asked about at once, the missing ones filled up: the results depend on it as far as
    rounding does, and fewer are cheaper where few environments run."""
    videos: NonNegativeInt = 8
    """Episodes recorded for the report: always the same tasks, taken from the families in turn."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Fields of the environment that differ when evaluating, such as ``split: held_out``."""


class EvaluationConfig(MeasuringConfig):
    """How the policy of a run is measured, before and after each stage and perhaps within it."""

    every: NonNegativeInt = 0
    """Iterations between evaluations within a stage; 0 evaluates before and after each stage only."""
    episodes_during: PositiveInt | None = None
    """``episodes`` of an evaluation within a stage; null takes the same."""


class CheckpointConfig(Block):
    """When a run is saved."""

    every: PositiveInt = 10
    """Iterations between checkpoints; the end of a stage is always saved."""
    keep: PositiveInt = 2
    """Complete checkpoints kept on disk."""


class RunConfig(Block):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$")]
    """The run's folder under ``output``."""
    seed: NonNegativeInt = 0
    """Source of every random number of the run."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    threads: PositiveInt | None = None
    """Torch's threads within an operation; null leaves torch's choice."""
    output: str = "runs"
    """The folder that holds run folders."""
    tensorboard: bool = True
    """Whether TensorBoard events are written beside metrics.jsonl."""
    policy: Component
    """What is trained."""
    environment: Component
    """Where it acts."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """How it is measured."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When it is saved."""
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    """What happens to it, in order."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, lay ``overrides`` (``stages.improve.optimizer.lr=1e-4``) over it, and validate.

    A top-level ``base: other.yaml`` (relative to the file) is read first and the file laid over it. List items are addressed by
    index, by their name, or by that of their class (``rewards.pick_score.weight=0``); a block that names another ``target``
    replaces the old one whole. Raises ConfigError.
    """
    config = load_as(RunConfig, path, overrides)
    refusals = [f"{path}: {sentence}" for sentence in _refusals(config)]
    if refusals:
        raise ConfigError("\n".join(refusals))
    return config


def load_as(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """``load`` for another kind of configuration, without the checks that are a run's own."""
    data = resolved(Path(path), overrides)
    try:
        return validate(kind, data)
    except Problems as error:
        raise error.as_config_error(data, source=str(path)) from error


def dump(config: RunConfig) -> str:
    """The configuration as YAML with every field spelled out; ``load`` of it gives an equal RunConfig."""
    return written(plain(config), sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes what OmegaConf, unlike YAML 1.1, would read as a number: the name 1e5."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*\.?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def written(value: Any, **options: Any) -> str:
    """Plain data as YAML that OmegaConf reads as just that; ``options`` are yaml.dump's."""
    return yaml.dump(_escaped(value), Dumper=_Dumper, allow_unicode=True, **options)


def _escaped(value: Any) -> Any:
    """With a backslash before what would be an interpolation, and as many again as there are."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries, lists, strings and numbers."""
    return jsonable(config)


# ---------------------------------------------------------------- reading


def resolved(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The file over its base, under the overrides, interpolations replaced, as plain data."""
    data = _read(path, ())
    try:
        for override in overrides:
            data = merge(data, _override(override))
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{path}: '{error.full_key}' is '???', which asks for a value; give one with {error.full_key}=..."
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: '{error.full_key}' cannot be resolved ({_first_line(error)})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"{path}: 'base' leads back to the file itself ({' -> '.join(map(str, seen))})")
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name a YAML file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_one_line(error)})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML ({_one_line(error)})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, got a {type(data).__name__}")
    own = {str(key): value for key, value in data.items()}
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' must be the path of a YAML file, got {base!r}")
    try:
        return merge(_read(path.parent / base, (*seen, path)), own)
    except ConfigError as error:
        raise error if str(path.parent) in str(error) else ConfigError(f"{path}: {error}") from error


def _override(text: str) -> dict[str, Any]:
    """``a.b=c`` as {"a": {"b": c}}; the value is YAML."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{text}' is not of the form 'key=value', such as 'stages.improve.optimizer.lr=1e-4'")
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{text}': the value is not valid YAML ({_one_line(error)})") from error
    nested: Any = parsed["value"]  # type: ignore[index,call-overload]
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------- what does not fit together


def _refusals(config: RunConfig) -> Iterator[str]:
    """A sentence for each pair of keys that do not fit together."""
    names = [stage.name for stage in config.stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"'stages' has {names.count(name)} stages called '{name}'; each needs a name of its own"
    if strangers := [*_strangers(config)]:
        yield from strangers
        return
    for stage in config.stages:
        for check in (_blocks, _capabilities, _sizes, _rewards):
            yield from check(config, stage)
        yield from _overridden(config.policy, stage.policy, f"stages.{stage.name}.policy")
        yield from _overridden(config.environment, stage.environment, f"stages.{stage.name}.environment")
    yield from _overridden(config.environment, config.evaluation.environment, "evaluation.environment")


def _strangers(config: RunConfig) -> Iterator[str]:
    """Classes that are not of the kind that their block asks for."""
    blocks = [("policy", config.policy, "policy", "act"), ("environment", config.environment, "environment", "reset")]
    for stage in config.stages:
        key = f"stages.{stage.name}"
        blocks.append((f"{key}.algorithm", stage.algorithm, "algorithm", "needs"))
        if stage.data is not None:
            blocks.append((f"{key}.data", stage.data, "source of examples", "batch"))
        if stage.supervised is not None:
            blocks.append((f"{key}.supervised.data", stage.supervised.data, "source of examples", "batch"))
    for key, component, kind, needed in blocks:
        if not hasattr(component.cls, needed):
            yield f"'{key}.target' is {component.target}, which is no {kind} (it has no '{needed}')"


# need of an algorithm -> the block of a stage that feeds it
_FEEDS = {"rollout": "collect", "examples": "data"}
# need of an algorithm -> what a policy's class must have
_CAPABILITIES = {
    "likelihood": ("evaluate", "pack"),
    "critic": ("value",),
    "examples": ("supervised_loss",),
    "velocity": ("velocity", "clean", "examine"),
    "means": ("gives_means",),
}
_NOUNS = {
    "likelihood": "log-probabilities",
    "critic": "a critic",
    "examples": "a supervised loss",
    "velocity": "a velocity field",
    "means": "denoising steps with means, and log-probabilities that are means over a step's numbers",
}


def _blocks(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    """Blocks that the stage's algorithm needs and lacks, and those that nothing would read."""
    key, needs = f"stages.{stage.name}", _needs(stage)
    for need, block in _FEEDS.items():
        given = getattr(stage, block) is not None
        if need in needs and not given:
            yield f"'{key}.algorithm' is {stage.algorithm.target}, which needs '{key}.{block}'"
        if need not in needs and given:
            yield f"unused key '{key}.{block}': '{key}.algorithm' is {stage.algorithm.target}, which learns from no {need}"
    if stage.supervised is not None and "rollout" not in needs:
        yield f"unused key '{key}.supervised': '{key}.algorithm' is {stage.algorithm.target}, which is supervised already"


def _capabilities(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    """What the algorithm (or a supervised term) asks of the policy and its class, or its fields in this stage, do not give.

    A policy class may have a static ``lacks(config)``: need -> (field, why it is not met), such as
    {"likelihood": ("sampler", "is 'ode', which draws nothing at random; use 'flow_sde'")}.
    """
    wants = [(f"'stages.{stage.name}.algorithm' ({stage.algorithm.target})", need) for need in sorted(_needs(stage))]
    if stage.supervised is not None:
        wants.append((f"'stages.{stage.name}.supervised'", "examples"))
    lacks = lacks_of(config.policy, stage.policy)
    for who, need in wants:
        missing = [name for name in _CAPABILITIES.get(need, ()) if not hasattr(config.policy.cls, name)]
        if missing:
            yield f"{who} needs a policy with {' and '.join(missing)}, which 'policy.target' ({config.policy.target}) lacks"
        elif need in lacks:
            field, reason = lacks[need]
            key = f"stages.{stage.name}.policy.{field}" if field in stage.policy else f"policy.{field}"
            yield f"{who} needs {_NOUNS[need]}, but '{key}' {reason}"


def lacks_of(policy: Component, changes: dict[str, Any]) -> dict[str, tuple[str, str]]:
    if not hasattr(policy.cls, "lacks"):
        return {}
    try:
        return policy.cls.lacks(policy.override(changes).config)  # type: ignore[attr-defined]
    except ConfigError:  # reported by _overridden
        return {}


def _needs(stage: StageConfig) -> frozenset[str]:
    """What the stage's algorithm asks for: always, and as it is configured (a static ``asks(config)``)."""
    cls: Any = stage.algorithm.cls
    return cls.needs | (cls.asks(stage.algorithm.config) if hasattr(cls, "asks") else frozenset())


def _sizes(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    """Environments that cannot be split into equal parts, or parts into groups."""
    if stage.collect is None:
        return
    key, num_envs, parts = f"stages.{stage.name}", stage.collect.num_envs, stage.collect.parts
    if num_envs % parts:
        yield f"'{key}.collect.parts' is {parts}, which does not divide '{key}.collect.num_envs' ({num_envs})"
        return
    size = getattr(stage.algorithm.config, "group_size", 1)
    if num_envs // parts % size:
        whole = f"'{key}.collect.num_envs' ({num_envs})"
        each = (
            whole if parts == 1 else f"the {num_envs // parts} environments of a part: {whole} / '{key}.collect.parts' ({parts})"
        )
        yield f"'{key}.algorithm.group_size' is {size}, which does not divide {each}"


def _rewards(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    """Rewards that nothing would read, that share a name, or that have no conversation to judge; none where some are needed.

    An environment's class may have a static ``pays(config)``: whether what it is told to pay is anything at all.
    """
    key, names = f"stages.{stage.name}", [reward.name for reward in stage.rewards]
    if not names:
        if "rollout" in _needs(stage) and not _pays(config.environment, stage.environment):
            yield (
                f"'{key}.algorithm' learns from rewards, and 'environment.rewards' pay nothing; give one a weight there, or "
                f"'{key}.rewards' to the stage"
            )
        if stage.scoring is not None:
            yield f"unused key '{key}.scoring': the stage has no '{key}.rewards'"
        return
    if "rollout" not in _needs(stage):
        yield f"unused key '{key}.rewards': '{key}.algorithm' is {stage.algorithm.target}, which learns from no rollout"
    if not issubclass(config.environment.cls, TalkingEnvironment):
        yield f"'{key}.rewards' judge conversations, and 'environment.target' ({config.environment.target}) has none"
    alone = stage.collect is None or stage.collect.parts == 1 or issubclass(config.environment.cls, AsyncEnvironment)
    if not alone:
        yield f"'{key}.collect.parts' needs processes that hand over no conversation for '{key}.rewards'; set it to 1"
    if stage.collect is not None and stage.collect.auto_reset:
        yield f"'{key}.collect.auto_reset' is true, but '{key}.rewards' judge whole episodes; set it to false"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"'{key}.rewards' has {names.count(name)} rewards called '{name}'; give each a 'name' of its own"


def _pays(environment: Component, changes: dict[str, Any]) -> bool:
    cls: Any = environment.cls
    try:
        return not hasattr(cls, "pays") or cls.pays(environment.override(changes).config)
    except ConfigError:  # reported by _overridden
        return True


def _overridden(component: Component, changes: dict[str, Any], key: str) -> Iterator[str]:
    """Errors in the fields of the policy or the environment that a stage or the evaluation changes."""
    try:
        component.override(changes, where=key)
    except ConfigError as error:
        yield from str(error).splitlines()
