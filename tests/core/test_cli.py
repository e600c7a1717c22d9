"""The command line: exit codes, the one sentence, and which folder a run goes to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from typer.testing import CliRunner, Result

from mmrl import commands, component
from mmrl.cli import app
from mmrl.config import RunConfig
from mmrl.errors import MMRLError, TrainingError
from mmrl.registry import ROOT

YAML = """
name: run
policy: {target: "fake:Thing"}
environment: {target: "fake:Thing"}
stages: [{name: warm, algorithm: {target: "fake:Thing"}, iterations: 3}]
"""


class Thing:
    needs: frozenset[str] = frozenset()
    act = reset = None

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        size: int = 1


class FakeTrainer:
    """Stands in for mmrl.trainer: leaves a run's folder behind, or raises ``error``."""

    error: BaseException | None = None

    def __init__(self) -> None:
        self.trained: list[tuple[RunConfig, Path]] = []
        self.resumed: list[Path] = []

    def train(self, config: RunConfig, run_dir: Path, progress: Any) -> Path:
        self.trained.append((config, run_dir))
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text("name: run\n")
        if self.error is not None:
            raise self.error
        return run_dir

    def resume(self, run_dir: Path, progress: Any) -> Path:
        self.resumed.append(run_dir)
        return run_dir


@pytest.fixture(autouse=True)
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    """In a folder with x.yaml, where training and reporting are faked."""
    fake = FakeTrainer()
    monkeypatch.setattr(component, "resolve", lambda target: Thing)
    monkeypatch.setattr(commands, "trainer", fake)
    monkeypatch.setattr(commands.report, "build", lambda run_dir: run_dir / "report.html")
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(YAML)
    return fake


def mmrl(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_train_prints_the_report_last(trainer: FakeTrainer) -> None:
    result = mmrl("train", "x.yaml", "seed=4", "stages.warm.algorithm.size=7")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "runs/run/report.html"
    config, run_dir = trainer.trained[0]
    assert (config.seed, config.stages[0].algorithm.config.size, run_dir) == (4, 7, Path("runs/run"))


def test_a_mistake_is_one_sentence_and_code_2(trainer: FakeTrainer) -> None:
    result = mmrl("train", "x.yaml", "sead=4")
    assert result.exit_code == 2
    assert result.stderr == "x.yaml: unknown key 'sead'; did you mean 'seed'?\n"
    assert result.stdout == "" and trainer.trained == [] and not Path("runs").exists()


def test_a_run_is_never_written_over(trainer: FakeTrainer) -> None:
    mmrl("train", "x.yaml")
    result = mmrl("train", "x.yaml")
    assert "runs/run is a run already (--resume runs/run would continue it); this one goes to runs/run-2." in result.stderr
    mmrl("train", "x.yaml")
    assert [(config.name, folder) for config, folder in trainer.trained] == [
        ("run", Path("runs/run")),
        ("run-2", Path("runs/run-2")),
        ("run-3", Path("runs/run-3")),
    ]


@pytest.mark.parametrize("choice", [["--name", "mine"], ["name=mine"]])
def test_a_name_the_user_chose_is_not_changed(trainer: FakeTrainer, choice: list[str]) -> None:
    assert mmrl("train", "x.yaml", *choice).exit_code == 0
    assert trainer.trained[0][1] == Path("runs/mine")
    result = mmrl("train", "x.yaml", *choice)
    assert result.exit_code == 2
    assert result.stderr == "runs/mine: is a run already; continue it with --resume runs/mine, or choose another name=NAME\n"


def test_resume_continues_a_run(trainer: FakeTrainer) -> None:
    mmrl("train", "x.yaml")
    result = mmrl("train", "--resume", "runs/run")
    assert trainer.resumed == [Path("runs/run")]
    assert result.stdout.splitlines()[-1] == "runs/run/report.html"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], "give a config to train"),
        (["train", "x.yaml", "--resume", "runs/run"], "--resume takes no config"),
        (["train", "--resume", "runs/none"], "runs/none: is no run (it has no config.yaml)"),
        (["report", "runs/none"], "runs/none: is no run (it has no config.yaml)"),
        (["evaluate", "runs/none"], "runs/none: is no run (it has no config.yaml)"),
        (["evaluate", "x.yaml"], "runs/run: is no run (it has no config.yaml)"),
        (["show-config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    ],
)
def test_each_mistake_has_its_sentence(arguments: list[str], sentence: str) -> None:
    result = mmrl(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(sentence) and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            TrainingError("stage improve: 5 updates in a row were not finite"),
            "stage improve: 5 updates in a row were not finite\n",
        ),
        (MMRLError("anything else"), "anything else\n"),
        (OSError(errno.ENOSPC, "No space left", "runs/run/a"), "runs/run/a: the disk is full; free some space\n"),
        (
            PermissionError(errno.EACCES, "no", "runs"),
            "runs: there is no permission to write here; choose another with output=FOLDER\n",
        ),
    ],
)
def test_errors_of_a_run_are_sentences(trainer: FakeTrainer, error: BaseException, sentence: str) -> None:
    trainer.error = error
    result = mmrl("train", "x.yaml")
    assert (result.exit_code, result.stderr) == (2, sentence)


def test_a_bug_keeps_its_traceback(trainer: FakeTrainer) -> None:
    trainer.error = KeyError("a bug")
    assert isinstance(mmrl("train", "x.yaml").exception, KeyError)
    trainer.error = OSError(errno.EBADF, "a bug too")
    assert isinstance(mmrl("train", "x.yaml").exception, OSError)


def test_an_interrupt_says_how_to_go_on(trainer: FakeTrainer) -> None:
    trainer.error = KeyboardInterrupt()
    result = mmrl("train", "x.yaml")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; continue with `mmrl train --resume runs/run`.\n"


def test_evaluate_passes_what_it_was_given(trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(commands.playback, "evaluate_run", lambda *arguments: calls.append(arguments[:3]))
    mmrl("train", "x.yaml")
    assert mmrl("evaluate", "runs/run", "evaluation.num_envs=3", "--episodes", "9").exit_code == 0
    assert mmrl("evaluate", "x.yaml").exit_code == 0
    assert calls == [(Path("runs/run"), ["evaluation.num_envs=3"], 9), (Path("runs/run"), [], None)]


def test_show_config_prints_what_would_run() -> None:
    result = mmrl("show-config", "x.yaml", "policy.size=3")
    assert result.exit_code == 0
    assert "policy:" in result.stdout and "  size: 3" in result.stdout.splitlines()


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mmrl.cli import app\n"
        "out = CliRunner().invoke(app, ['--help']).output\n"
        "print(sorted(c for c in ('train', 'evaluate', 'collect', 'statistics', 'report', 'doctor', 'show-config')"
        " if c in out), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert done.stdout.strip() == "['collect', 'doctor', 'evaluate', 'report', 'show-config', 'statistics', 'train'] False"
