"""Whole runs, small ones: what they leave behind, what they log, and that a policy outlives its run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from mmrl import checkpoint, commands, config, playback, report
from mmrl.building import exclusive
from mmrl.component import Component
from mmrl.config import CheckpointConfig, CollectConfig, EvaluationConfig, RunConfig, StageConfig, SupervisedConfig, load
from mmrl.errors import ConfigError, MMRLError, TrainingError
from mmrl.numerics.draws import Draws
from mmrl.progress import Quiet
from mmrl.protocols import DataContext
from mmrl.trainer import resume, train
from tests.core import tiny_run
from tests.core.tiny_run import FLOW_NOISE, GRPO, SUPERVISED

CPU = torch.device("cpu")
KINDS = {
    "ppo_flow_sde": (SUPERVISED, "stages.improve.micro_batch=3"),
    "grpo_flow_sde": (
        GRPO,
        "policy.critic=null",
        "stages.improve.algorithm.kl_weight=0.1",
        "evaluation.every=1",
        "stages.warm_start.evaluate_every=0",
        "stages.improve.evaluate_every=2",
    ),
    "ppo_flow_noise": FLOW_NOISE,
    "grpo_flow_noise": (*FLOW_NOISE, GRPO, "policy.critic=null"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config; its runs go to the folder ``runs`` beside it."""
    return tiny_run.write_config(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def runs(tiny: Path) -> dict[str, Path]:
    return {name: tiny_run.run(tiny, name, *overrides) for name, overrides in KINDS.items()}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(True)


def improving(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in tiny_run.metrics.read(run_dir) if row["kind"] == "train" and row["stage"] == "improve"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files_and_a_report(kind: str, runs: dict[str, Path], tiny: Path) -> None:
    run_dir = runs[kind]
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "trajectories", "policy"} <= names
    assert not any(path.name.startswith(".") and path.name != ".lock" for path in run_dir.rglob("*"))
    assert load(run_dir / "config.yaml") == load(tiny, KINDS[kind])  # resolved, and complete
    assert {path.name for path in (run_dir / "policy").iterdir()} >= {"config.json", "model.safetensors", "statistics.json"}
    assert len(list((run_dir / "checkpoints").iterdir())) == 2
    assert report.build(run_dir).stat().st_size > 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_stages_evaluations_and_iterations_follow_one_another(kind: str, runs: dict[str, Path]) -> None:
    rows = [(row["stage"], row["iteration"], row.get("label", "train")) for row in tiny_run.rows(runs[kind])]
    warm = [("warm_start", 0, "before"), ("warm_start", 1, "train"), ("warm_start", 2, "train"), ("warm_start", 2, "after")]
    improve = [("improve", i, "train") for i in (1, 2, 3)]
    during = [("improve", 2, "during")] if kind == "grpo_flow_sde" else []
    assert rows == [*warm, *improve[:2], *during, *improve[2:], ("improve", 3, "after")]
    films = {tuple(path.stem.split("-")[:2]) for path in (runs[kind] / "trajectories").glob("*.webp")}
    assert films == {("warm_start", "before"), ("warm_start", "after"), ("improve", "after")}


ALWAYS = [
    "policy/ratio_min",
    "policy/ratio_max",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/entropy",
    "policy/log_prob_mismatch",
    "policy/log_prob_mismatch_max",
    "loss/loss",
    "loss/policy_loss",
    "update/grad_norm",
    "update/skipped",
    "update/updates",
    "update/stopped_by_kl",
    "optimizer/lr_actor",
    "speed/env_steps_per_s",
    "speed/decisions_per_s",
    "seconds/collect",
    "seconds/score",
    "seconds/update",
    "rollout/success",
    "rollout/return",
    "rollout/length",
    "rollout/episodes",
    "rollout/decisions",
    "rollout/env_steps",
    "rollout/lost_episodes",
    "rollout/trained_decisions",
]
ALSO = {
    "ppo_flow_sde": ["loss/supervised_loss", "loss/value_loss", "advantages/explained_variance", "optimizer/lr_critic"],
    "grpo_flow_sde": ["policy/kl_reference", "advantages/groups_without_spread"],
    "ppo_flow_noise": ["loss/value_loss", "advantages/explained_variance", "optimizer/lr_noise_head"],
    "grpo_flow_noise": ["advantages/groups_without_spread", "optimizer/lr_noise_head"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_always_logged(kind: str, runs: dict[str, Path]) -> None:
    trained = [row for row in improving(runs[kind]) if row["update/updates"]]  # GRPO may have filtered all of an iteration
    assert trained
    for row in trained:
        assert [name for name in (*ALWAYS, *ALSO[kind]) if name not in row] == []
        assert not any(row[name] != row[name] for name in ALWAYS)
        assert row["speed/env_steps_per_s"] == pytest.approx(row["rollout/env_steps"] / row["seconds/collect"])
        seconds = sum(row[f"seconds/{phase}"] for phase in ("collect", "reward", "score", "update"))
        assert row["speed/decisions_per_s"] == pytest.approx(row["rollout/decisions"] / seconds)
    warm = [row for row in tiny_run.metrics.read(runs[kind]) if row["kind"] == "train" and row["stage"] == "warm_start"]
    for row in warm:
        assert {"loss/loss", "loss/flow_matching", "update/grad_norm", "seconds/update", "speed/samples_per_s"} <= row.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_and_training_score_alike(kind: str, runs: dict[str, Path]) -> None:
    trained = [row for row in improving(runs[kind]) if row["update/updates"]]
    assert max(row["policy/log_prob_mismatch_max"] for row in trained) < 1e-4
    if kind.startswith("grpo"):  # one update a rollout, so every ratio is that of unchanged weights
        assert all(row["policy/ratio_min"] == pytest.approx(1, abs=1e-4) for row in trained)
        assert all(row["policy/ratio_max"] == pytest.approx(1, abs=1e-4) for row in trained)
    else:
        assert any(row["policy/ratio_min"] < 0.999 for row in trained)


def test_the_kl_is_to_the_policy_that_the_stage_began_with(runs: dict[str, Path]) -> None:
    first, *later = [row["policy/kl_reference"] for row in improving(runs["grpo_flow_sde"]) if row["update/updates"]]
    assert first == pytest.approx(0, abs=1e-6) and later and all(kl > 1e-3 for kl in later)
    tensors, _ = tiny_run.newest(runs["grpo_flow_sde"])
    frozen = {
        name for name in tensors if name.startswith("reference/") and torch.equal(tensors[name], tensors["policy" + name[9:]])
    }
    moved = {name for name in tensors if name.startswith("reference/")} - frozen
    assert any(".dit." in name for name in moved) and all(".vision_tower." not in name for name in moved)


def test_rollouts_have_the_size_that_was_asked_for(runs: dict[str, Path]) -> None:
    for row in improving(runs["ppo_flow_sde"]):
        assert row["rollout/decisions"] == 4 * 4 and row["update/updates"] == 2 * 2
    for row in improving(runs["grpo_flow_sde"]):
        assert row["rollout/episodes"] == 4 and row["rollout/decisions"] <= 4 * 3  # 8 steps in decisions of 3


@pytest.mark.parametrize("kind", ["ppo_flow_sde", "ppo_flow_noise"])
def test_training_changes_what_it_should_and_nothing_else(kind: str, runs: dict[str, Path], tiny: Path) -> None:
    fresh = load(tiny, KINDS[kind]).policy.build(device=CPU)
    after = tiny_run.newest(runs[kind])[0]
    moved = {name for name, value in fresh.state_dict().items() if not torch.equal(value, after[f"policy/{name}"])}
    learns = {id(p) for group in fresh.trainable().values() for p in group}
    expected = {name for name, p in fresh.named_parameters() if id(p) in learns}
    assert moved - {"_extra_state"} <= expected
    assert {name.split(".")[0] for name in moved - {"_extra_state"}} == {name.split(".")[0] for name in expected}


@pytest.mark.parametrize("kind", ["ppo_flow_sde", "grpo_flow_noise"])
def test_the_policy_outlives_the_run(kind: str, runs: dict[str, Path]) -> None:
    run_dir = runs[kind]
    settings = load(run_dir / "config.yaml")
    trained = playback.load_policy(run_dir, settings, CPU).policy
    changes = {"checkpoint": str(run_dir / "policy"), "weights": "pretrained", "action_dim": None, "seed": 7}
    again = Component.parse({**settings.policy.dump(), **changes}).build(device=CPU)
    seen = trained.example_observation(3)
    actions = [p.act(seen, Draws.of(2, torch.arange(3)), explore=False).action for p in (trained, again)]
    assert torch.equal(*actions)


def test_statistics_are_fitted_once_and_carried_on(runs: dict[str, Path], tiny: Path) -> None:
    settings = load(tiny)
    stage = settings.stages[0]
    assert stage.data is not None

    def make(num_envs: int, overrides: Any) -> Any:
        return settings.environment.override(overrides).build(num_envs=num_envs, device=CPU)

    source = stage.data.build(context=DataContext(make, 5, settings.seed, CPU))
    seen = source.batch(4096)
    real = seen.actions_BHA[seen.mask_BH].double()
    for run_dir in runs.values():
        written = json.loads((run_dir / "policy" / "statistics.json").read_text())
        assert written["actions_mean"] == pytest.approx(real.mean(0).tolist(), abs=1e-6)
        assert written["state_mean"] == pytest.approx(seen.observation.state.double().mean(0).tolist(), abs=1e-6)


def test_the_version_counts_updates_over_all_stages(runs: dict[str, Path]) -> None:
    _, meta = tiny_run.newest(runs["ppo_flow_sde"])
    assert meta["policy_version"] == 2 + 3 * 4


def test_evaluating_a_run_again_gives_its_last_evaluation(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = runs["ppo_flow_noise"]
    for _ in range(2):
        playback.evaluate_run(run_dir, [], None, Quiet())
    *_, after, first, second = tiny_run.rows(run_dir)
    assert (after["label"], first["label"], second["label"]) == ("after", "evaluate", "evaluate")
    for row in (first, second):
        assert {**row, "label": "after"} == after
    shown = capsys.readouterr().out
    assert "reach" in shown and f"{100 * after['success']:.1f}%" in shown
    assert list((run_dir / "trajectories").glob("improve-evaluate-*.webp"))
    playback.evaluate_run(run_dir, ["environment.families=[push]", "evaluation.num_envs=2"], 3, Quiet())
    *_, changed = tiny_run.rows(run_dir)
    assert changed["episodes"] == 3 and list(changed["families"]) == ["push"]
    assert changed["changed"] == ["environment.families=[push]"]
    report.build(run_dir)
    with exclusive(run_dir):  # as if it were still being trained
        playback.evaluate_run(run_dir, [], 2, Quiet())
    assert tiny_run.rows(run_dir)[-1] == changed


def test_averaged_weights_are_evaluated_saved_and_handed_on(tiny: Path) -> None:
    settings = load(tiny, ["stages.warm_start.optimizer={lr: 0.1, ema: 0.999}"])
    settings = settings.model_copy(update={"stages": settings.stages[:1]})
    run_dir = train(settings, tiny.parent / "runs" / "averaged", Quiet())
    start = settings.policy.build(device=CPU)
    raw = checkpoint.load(checkpoint.latest(run_dir / "checkpoints").path)[0]["policy"]
    averaged = playback.load_policy(run_dir, settings, CPU).policy

    def distance(state: Any) -> float:
        return max(float((p.detach() - state[name]).abs().max()) for name, p in start.named_parameters())

    assert distance(raw) > 0.05
    assert distance(averaged.state_dict()) < 1e-3  # two steps of 0.1, each counted for a thousandth
    saved = Component.parse({**settings.policy.dump(), "checkpoint": str(run_dir / "policy"), "weights": "pretrained"})
    assert torch.equal(
        saved.build(device=CPU).model.action_out_proj.weight.detach(), averaged.model.action_out_proj.weight.detach()
    )
    before, after = (row for row in tiny_run.rows(run_dir) if row["kind"] == "evaluation")
    assert after["return"] == pytest.approx(before["return"], abs=0.1) and after["length"] == before["length"]


def test_every_key_of_the_configuration_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run_dir, _ = commands.plan(tiny, [SUPERVISED, "evaluation.every=1", "stages.improve.iterations=2"], "consumed")
    blocks: list[type[BaseModel]] = [RunConfig, StageConfig, EvaluationConfig, CheckpointConfig, CollectConfig, SupervisedConfig]
    read: dict[type, set[str]] = defaultdict(set)

    def spy(block: type) -> None:
        original: Any = block.__getattribute__

        def look(self: Any, name: str) -> Any:
            read[type(self)].add(name)
            return original(self, name)

        monkeypatch.setattr(block, "__getattribute__", look)

    for block in blocks:
        spy(block)
    commands.plan(tiny, [], None)
    train(settings, run_dir, Quiet())
    for block in blocks:
        assert block.model_fields.keys() - read[block] == set(), block.__name__


def test_without_a_number_a_rollout_lasts_as_long_as_the_longest_episode(tiny: Path) -> None:
    """8 actions in chunks of 3 are 3 decisions, after which every episode is over."""
    settings = load(tiny, ["stages.improve.collect={auto_reset: false, decisions: null}", "stages.improve.iterations=1"])
    run_dir = train(settings, tiny.parent / "runs" / "whole", Quiet())
    (row,) = (row for row in tiny_run.rows(run_dir) if row["kind"] == "train" and row["stage"] == "improve")
    assert row["rollout/episodes"] == 4 and row["rollout/length"] <= 8 and 4 <= row["rollout/decisions"] <= 4 * 3
    failed = row["rollout/episodes"] * (1 - row["rollout/success"])
    assert failed == 0 or row["rollout/decisions"] > 4 * 2  # the tiny policy hardly ever succeeds, and then it takes all three


def test_a_run_needs_an_empty_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not to be lost")
    with pytest.raises(ConfigError, match="is not empty"):
        train(load(tiny), tmp_path, Quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


LATE = {
    "a policy that cannot be loaded": (["policy.checkpoint=/nowhere"], "policy.checkpoint = /nowhere"),
    "episodes that do not fit": (
        [GRPO, "policy.critic=null", "stages.improve.collect.decisions=2"],
        "stages.improve.collect.decisions",
    ),
    "episodes all cut at one place": (
        ["stages.improve.collect={auto_reset: false, decisions: 2}"],
        "stages.improve.collect.decisions' is 2, but without auto_reset episodes are played whole, which may take 3",
    ),
    "groups cut by resets": ([GRPO, "policy.critic=null", "stages.improve.collect.auto_reset=true"], "collect.auto_reset"),
    "weights of another shape": (["stages.warm_start.policy={critic: null}"], "stages.improve.policy"),
    "instructions that do not fit": (["policy.max_text_tokens=2"], "policy.max_text_tokens = 2"),
    "a device that is not there": (["device=cuda:99"], "'device' is 'cuda:99', which cannot be used here"),
    "groups nobody trains": (
        ["stages.warm_start.optimizer.groups={nobody: {lr: 1.0}}"],
        "^stages.warm_start.optimizer.groups.nobody configures a group",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_only_building_can_tell_ends_in_a_sentence(case: str, tiny: Path) -> None:
    overrides, key = LATE[case]
    run_dir = tiny.parent / "runs" / case.replace(" ", "_")
    with pytest.raises(MMRLError, match=key) as caught:
        train(load(tiny, overrides), run_dir, Quiet())
    assert "\n" not in str(caught.value)
    # Nothing is left of a run that never began; one that got to its second stage keeps what it has.
    assert run_dir.exists() == ("stages.improve" in key or "collect" in key)


def test_a_later_stage_that_is_refused_says_how_the_run_goes_on(tiny: Path) -> None:
    run_dir = tiny.parent / "runs" / "mended"
    with pytest.raises(ConfigError, match=r"^stages\.improve\.optimizer\.groups\.nobody configures") as caught:
        train(load(tiny, ["stages.improve.optimizer.groups={nobody: {lr: 1.0}}"]), run_dir, Quiet())
    assert str(caught.value).endswith(f"mend {run_dir / 'config.yaml'}, then go on with --resume {run_dir}")
    mended = load(run_dir / "config.yaml", ["stages.improve.optimizer.groups.nobody=null", "stages.improve.iterations=1"])
    (run_dir / "config.yaml").write_text(config.dump(mended))
    resume(run_dir, Quiet())
    trained = [(row["stage"], row["iteration"]) for row in tiny_run.rows(run_dir) if row["kind"] == "train"]
    assert trained == [("warm_start", 1), ("warm_start", 2), ("improve", 1)]


def test_a_change_that_measuring_a_run_would_not_notice_is_refused(tiny: Path) -> None:
    run_dir = tiny_run.run(tiny, "measured", "stages.warm_start.iterations=1", "stages.improve.iterations=1")
    unread = r"config\.yaml: 'stages\.improve\.optimizer\.lr' is for training; evaluating reads only seed, .*\.improve\.policy"
    with pytest.raises(ConfigError, match=unread):
        playback.evaluate_run(run_dir, ["evaluation.num_envs=2", "stages.improve.optimizer.lr=1.0"], 2, Quiet())
    assert tiny_run.rows(run_dir)[-1]["label"] == "after"
    playback.evaluate_run(run_dir, ["evaluation.num_envs=2", "stages.improve.environment.reward=sparse"], 2, Quiet())
    assert tiny_run.rows(run_dir)[-1]["label"] == "evaluate"


def test_only_one_process_trains_a_run(runs: dict[str, Path]) -> None:
    with exclusive(runs["ppo_flow_sde"]), pytest.raises(TrainingError, match="in use by another process"):
        resume(runs["ppo_flow_sde"], Quiet())


def test_resuming_a_finished_run_changes_nothing(runs: dict[str, Path]) -> None:
    run_dir = runs["grpo_flow_noise"]
    before = tiny_run.weights(run_dir), tiny_run.rows(run_dir), tiny_run.newest(run_dir)
    resume(run_dir, Quiet())
    weights, rows, (tensors, meta) = before
    assert tiny_run.weights(run_dir) == weights and tiny_run.rows(run_dir) == rows
    again, meta_again = tiny_run.newest(run_dir)
    assert meta_again == meta and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_run_that_diverges_stops_with_a_sentence_and_can_go_on(tiny: Path) -> None:
    assert config.load(tiny).stages[0].max_skipped_updates == 5
    overrides = [
        "stages.warm_start.optimizer.lr=1e38",
        "stages.warm_start.iterations=9",
        "stages.warm_start.max_skipped_updates=2",
    ]
    run_dir = tiny.parent / "runs" / "diverged"
    with pytest.raises(TrainingError, match=r"stage 'warm_start', iteration \d: 2 updates in a row .*optimizer.lr"):
        train(load(tiny, overrides), run_dir, Quiet())
    assert sum(row.get("update/skipped", 0) for row in tiny_run.rows(run_dir)) == 1
    assert checkpoint.latest(run_dir / "checkpoints").warning is None
