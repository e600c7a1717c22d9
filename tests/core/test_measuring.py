"""``mmrl evaluate CHECKPOINT CONFIG``: the same numbers every time, in a folder of their own, and a sentence for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from mmrl import checkpoint, measuring, report
from mmrl.cli import app
from mmrl.component import Component
from mmrl.config import MeasuringConfig
from mmrl.errors import MMRLError
from mmrl.evaluation import evaluate
from mmrl.playing import Played, Player
from mmrl.progress import Quiet
from mmrl.report.evaluation import load
from tests.core import tiny_run
from tests.core.test_report import INJECTION, Inspector, open_in_chromium, text_of

CPU = torch.device("cpu")
FAMILIES = ["reach", "push"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a tiny config (tiny.yaml), the policy it made and a measurement's config (measure.yaml)."""
    folder = tmp_path_factory.mktemp("place")
    changes = ["stages.improve.iterations=1", "evaluation.videos=0", "stages.improve.optimizer.ema=0.9"]
    tiny_run.run(tiny_run.write_config(folder), "tiny", *changes)
    run = yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())
    environment = {**run["environment"], "families": FAMILIES, "max_steps": {"reach": 8, "push": 6}, "tolerance": 0.3}
    about: dict[str, Any] = {"name": "both", "output": str(folder / "out"), "threads": 1, "policy": run["policy"]}
    about |= {"environment": environment, "evaluation": {"episodes": 6, "per_task": True, "num_envs": 5, "videos": 4}}
    (folder / "measure.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(True)  # as every test has it; a measurement sets what it needs


def mmrl(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(place: Path) -> Path:
    """The folder of a first measurement of the policy."""
    result = mmrl(place / "runs/tiny/policy", place / "measure.yaml")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(place / "out/both/report.html")
    assert "out of time" in result.stdout and "push" in result.stdout
    return place / "out/both"


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def episodes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_the_folder_holds_the_numbers_and_what_they_are_of(place: Path, measured: Path) -> None:
    found, rows = numbers(measured), episodes(measured)
    assert sorted(path.name for path in measured.iterdir()) == [
        "episodes.jsonl",
        "evaluation.json",
        "report.html",
        "trajectories",
    ]
    assert [row["task_id"] for row in rows] == sorted(row["task_id"] for row in rows)
    for name in (*FAMILIES, "overall"):
        own = [row for row in rows if name in (row["family"], "overall")]
        score = found["overall"] if name == "overall" else found["tasks"][name]
        assert score["episodes"] == len(own) == (12 if name == "overall" else 6)
        assert score["successes"] == sum(row["success"] for row in own)
        assert score["timeouts"] == sum(row["timed_out"] for row in own) and score["failures"] == 0
        assert score["return"] == pytest.approx(sum(row["return"] for row in own) / len(own))
        assert score["length"] == pytest.approx(sum(row["steps"] for row in own) / len(own))
    assert found["checkpoint"] == {"path": str(place / "runs/tiny/policy")}
    assert found["config"]["environment"]["max_steps"] == {"reach": 8, "push": 6}
    assert found["config"]["evaluation"]["act_batch"] == 32 and found["versions"]["torch"]
    # As evaluating the loaded policy in this process gives it.
    block = {**found["config"]["policy"], "checkpoint": str(place / "runs/tiny/policy"), "weights": "pretrained"}
    environment = Component.parse(found["config"]["environment"]).build(num_envs=12, device=CPU)
    settings = MeasuringConfig(episodes=6, per_task=True)
    result = evaluate(Component.parse(block).build(device=CPU), environment, settings, seed=0, device=CPU, progress=Quiet())
    assert [episode.row() for episode in result.played] == rows


def test_again_and_with_other_num_envs_the_numbers_are_the_same(place: Path, measured: Path) -> None:
    policy, config = place / "runs/tiny/policy", place / "measure.yaml"
    assert mmrl(policy, config).exit_code == 0
    again = measured.with_name("both-2")

    def without_clock(folder: Path) -> str:
        return re.sub(r'"seconds": [\d.]+', "", (folder / "evaluation.json").read_text())

    assert without_clock(again) == without_clock(measured)
    for name in ("episodes.jsonl", *(f"trajectories/{path.name}" for path in (measured / "trajectories").iterdir())):
        assert (again / name).read_bytes() == (measured / name).read_bytes()
    assert mmrl(policy, config, "evaluation.num_envs=12", "evaluation.videos=0", "--output", place / "out/wide").exit_code == 0
    wide = place / "out/wide"
    assert (wide / "episodes.jsonl").read_bytes() == (measured / "episodes.jsonl").read_bytes()
    assert {**numbers(wide), "seconds": 0, "config": 0} == {**numbers(measured), "seconds": 0, "config": 0}
    assert not (wide / "trajectories").exists()


def test_the_videos_show_what_was_counted_successes_and_others_of_each_task(measured: Path) -> None:
    by_id = {row["task_id"]: row for row in episodes(measured)}
    records = [json.loads(path.read_text()) for path in (measured / "trajectories").glob("*.json")]
    assert len(records) == 4
    for record in records:
        assert {**by_id[record["task_id"]], "video": record["video"]} == record
        assert (measured / "trajectories" / record["video"]).is_file()
    kinds = {(row["family"], row["success"]) for row in by_id.values()}
    assert len(kinds) > 2  # or this test shows little
    assert kinds == {(record["family"], record["success"]) for record in records}


def test_a_simulator_that_does_not_repeat_itself_is_not_filmed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Player.play

    def otherwise(self: Player, tasks: Any, advance: Any, reel: Any = None, filmed: Any = ()) -> list[Played]:
        played = play(self, tasks, advance, reel, filmed)
        return [replace(played[0], steps=99), *played[1:]] if reel else played

    monkeypatch.setattr(Player, "play", otherwise)
    result = mmrl(place / "runs/tiny/policy", place / "measure.yaml", "--output", tmp_path / "out")
    assert "1 of 4 filmed episodes went otherwise than when they were counted" in result.stderr
    assert len(list((tmp_path / "out/trajectories").iterdir())) == 6


def test_a_run_and_its_config_give_its_last_evaluation(place: Path, tmp_path: Path) -> None:
    run, config = place / "runs/tiny", place / "tiny.yaml"
    *_, after = tiny_run.rows(run)
    assert mmrl(run, config, "--output", tmp_path / "of_run").exit_code == 0
    found = numbers(tmp_path / "of_run")
    assert found["checkpoint"] == {"path": str(run), "stage": "improve", "iteration": 1}
    assert {name: after[name] for name in found["overall"]} == found["overall"] and found["tasks"] == after["families"]
    assert found["config"]["environment"]["reward"] == "dense"  # of the last stage
    assert mmrl(run / "policy", config, "--output", tmp_path / "of_policy").exit_code == 0  # its averaged weights
    assert (tmp_path / "of_policy/episodes.jsonl").read_bytes() == (tmp_path / "of_run/episodes.jsonl").read_bytes()
    assert mmrl(run, config, "--episodes", "3", f"output={tmp_path / 'named'}").exit_code == 0
    assert numbers(tmp_path / "named/tiny")["overall"]["episodes"] == 3


def test_a_run_of_another_policy_than_the_config_s_says_what_to_measure(place: Path, tmp_path: Path) -> None:
    run = place / "runs/tiny"
    result = mmrl(run, place / "measure.yaml", "policy.critic=null", "--output", tmp_path / "out")
    told = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"give 'policy' the fields that {run}/config.yaml has, or measure {run}/policy, if the run has ended" in told


def test_a_damaged_checkpoint_of_a_run_is_passed_over_with_a_word(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "runs/tiny", run)
    newest = checkpoint.latest(run / "checkpoints").path
    (newest / "policy.safetensors").write_bytes(b"broken")
    result = mmrl(run, place / "tiny.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 0 and f"{newest}" in result.stderr and "damaged" in result.stderr
    assert mmrl(run, "--episodes", "2").exit_code == 0
    shutil.rmtree(run / "checkpoints")
    refused(mmrl(run, place / "tiny.yaml", "--output", tmp_path / "none"), "checkpoint", tmp_path / "none")


def refused(result: Result, sentence: str, folder: Path) -> None:
    """One sentence, exit code 2, and nothing where the results would have gone."""
    # transformers draws progress bars with carriage returns, without ending the line
    lines = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line and "Status" not in line]
    said = [line for line in lines if sentence in line]
    assert result.exit_code == 2 and len(said) == 1, result.stderr
    assert lines[-1] == said[0]
    assert not folder.exists() and not (folder.parent.exists() and list(folder.parent.glob(f".{folder.name}*")))


def test_damaged_and_foreign_policies(place: Path, tmp_path: Path) -> None:
    config, out = place / "measure.yaml", tmp_path / "out"

    def damaged(name: str) -> Path:
        shutil.copytree(place / "runs/tiny/policy", tmp_path / name)
        return tmp_path / name

    (file := damaged("short") / "model.safetensors").write_bytes(file.read_bytes()[:5000])
    refused(mmrl(tmp_path / "short", config, "--output", out), "cannot be loaded as a pi0", out)
    (damaged("empty") / "model.safetensors").unlink()
    refused(mmrl(tmp_path / "empty", config, "--output", out), "cannot be loaded as a pi0", out)
    mlp = "policy={target: 'policies.mlp:MLP', state_dim: 4, action_dim: 4}"
    refused(mmrl(place / "runs/tiny/policy", config, mlp, "--output", out), "cannot be loaded as an MLP", out)
    refused(mmrl(place / "runs/tiny", config, mlp, "--output", out), "another policy", out)
    refused(mmrl(tmp_path / "nothing", config, "--output", out), "is not there; give a run's folder", out)


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_at_random(place: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(place / "runs/tiny/policy", tmp_path / "policy")
    weights = safetensors.load_file(tmp_path / "policy/model.safetensors")
    del weights["action_out_proj.weight"]
    safetensors.save_file(weights, tmp_path / "policy/model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    sentence = "lacks 1 of the weights of a pi0, such as action_out_proj.weight"
    refused(mmrl(tmp_path / "policy", place / "measure.yaml", "--output", out), sentence, out)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"environment": None}, "'environment' is missing"),
        ({"evalution": {}}, "unknown key 'evalution'; did you mean 'evaluation'?"),
        ({"evaluation": {"every": 3}}, "unknown key 'evaluation.every'"),
        ({"evaluation": {"environment": {"splt": "train"}}}, "splt"),
        ({"stage": []}, "unknown key 'stage'"),
    ],
)
def test_a_config_that_says_too_much_or_too_little(place: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    about = yaml.safe_load((place / "measure.yaml").read_text()) | changes | {"output": str(tmp_path / "out")}
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in about.items() if value is not None}))
    refused(mmrl(place / "runs/tiny/policy", config), sentence, tmp_path / "out")


def test_mistakes_on_the_command_line(place: Path, measured: Path, tmp_path: Path) -> None:
    policy, config, out = place / "runs/tiny/policy", place / "measure.yaml", tmp_path / "out"
    refused(mmrl(policy, place / "nowhere.yaml", "--output", out), "there is no such file", out)
    refused(mmrl(policy, "--output", out), "--output needs a CONFIG", out)
    refused(mmrl(policy), "is no run", out)
    refused(mmrl(policy, config, "evaluation.episods=3", "--output", out), "did you mean 'episodes'?", out)
    for key in ("stages.improve.optimizer.lr", "evaluation.every", "stages.warm_start.policy.noise_level"):
        refused(mmrl(policy, place / "tiny.yaml", f"{key}=1", "--output", out), f"'{key}' is for training", out)
    taken = mmrl(policy, config, "--output", measured)
    assert taken.exit_code == 2 and f"{measured}: is there already; choose another folder" in taken.stderr
    assert mmrl(policy, config, "name=both").exit_code == 2


def test_what_is_interrupted_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> Path:
        assert (folder / "evaluation.json").is_file() and folder.parent == tmp_path
        assert not (tmp_path / "out").exists()  # a kill would leave nothing that looks whole
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring.report, "build_evaluation", interrupted)
    result = mmrl(place / "runs/tiny/policy", place / "measure.yaml", "--output", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, [])
    assert result.stderr.endswith("Interrupted; nothing was saved.\n")


# ---------------------------------------------------------------- the report


def test_the_report_shows_the_table_and_opens_in_a_browser(measured: Path, tmp_path: Path) -> None:
    page = (measured / "report.html").read_text()
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.outside == [] and (inspector.pictures, inspector.unnamed, inspector.scripts) == (4, 0, 2)
    text, found = text_of(page), numbers(measured)
    for name, score in [*found["tasks"].items(), ("all tasks", found["overall"])]:
        rate, interval = f"{100 * score['success']:.1f} %", f"{100 * score['low']:.1f}–{100 * score['high']:.1f}"
        counts = f"{score['successes']} {score['failures']} {score['timeouts']}"
        assert f"{name} {rate} {interval} · n = {score['episodes']} {counts}" in text
    assert "success over 12 episodes" in text and "✓ success" in text and "✕ out of time" in text
    dom, console = open_in_chromium(measured / "report.html", tmp_path / "profile")
    assert console == [] and "4 of 4 rollouts shown" in dom


def test_a_report_is_written_again_and_escapes_what_it_shows(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    hostile = numbers(folder)
    hostile["tasks"][INJECTION] = {**hostile["tasks"]["push"], "episodes": 0, "lost": 3}
    hostile["overall"]["lost"] = 3
    hostile |= {"name": INJECTION, "checkpoint": {"path": INJECTION}}
    (folder / "evaluation.json").write_text(json.dumps(hostile))
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.stdout == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.scripts == 2 and "<b>push" not in page and text_of(page).count(INJECTION) >= 3
    assert "Lost: 3 episodes broke off at every attempt" in text_of(page)
    assert load(folder).checkpoint == INJECTION


def test_a_damaged_evaluation_has_its_sentence(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"name": "x"}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(MMRLError, match=r"evaluation\.json is not what `mmrl evaluate` wrote .*; evaluate again"):
            report.build_evaluation(tmp_path)
