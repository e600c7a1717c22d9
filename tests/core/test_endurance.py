"""A run that is killed, or loses a checkpoint or its disk: it goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmrl import checkpoint
from mmrl.cli import app
from mmrl.registry import ROOT
from tests.core import tiny_run
from tests.core.tiny_run import SUPERVISED

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

# Forks a process for each line that it reads, so that torch is imported once: a moment, a count, a file for what is said, and
# the arguments of ``mmrl``. The process kills itself (kill -9) the count-th time that it comes to the moment, a function
# ``module:name``. The answer is the exit code.
SERVER = """
import importlib, json, os, signal, sys, traceback
import torch
from mmrl.cli import main
from mmrl.config import load

torch.set_num_threads(1)
load(sys.argv[1]).policy.build(device=torch.device("cpu"))  # imports everything that a run needs
sys.stdout.write("ready\\n"), sys.stdout.flush()

def die_at(moment, count):
    module, _, names = moment.partition(":")
    owner, (*parts, name) = importlib.import_module(module), names.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original, seen = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)

for line in sys.stdin:
    moment, count, said, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        if moment:
            die_at(moment, count)
        sys.argv = ["mmrl", *arguments]
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    sys.stdout.write(json.dumps(os.waitstatus_to_exitcode(status)) + "\\n"), sys.stdout.flush()
"""


class Mmrl:
    """``mmrl`` in processes of its own."""

    def __init__(self, config: Path) -> None:
        self.config, self.runs, self._said = config, config.parent / "runs", config.parent / "said.txt"
        command = [sys.executable, "-c", textwrap.dedent(SERVER), str(config)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def __call__(self, *arguments: str, moment: str = "", count: int = 0) -> tuple[int, str]:
        """(exit code, what it said), minus the signal's number where it was killed."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([moment, count, str(self._said), *arguments]) + "\n")
        self._server.stdin.flush()
        code = int(self._answer())
        return code, self._said.read_text()

    def train(self, name: str, *overrides: str, **death: Any) -> tuple[int, str]:
        return self("train", str(self.config), f"name={name}", *overrides, **death)

    def resume(self, name: str, **death: Any) -> tuple[int, str]:
        return self("train", "--resume", str(self.runs / name), **death)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


@pytest.fixture(scope="module")
def mmrl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mmrl]:
    server = Mmrl(tiny_run.write_config(tmp_path_factory.mktemp("endurance")))
    yield server
    server.close()


@pytest.fixture(scope="module")
def unkilled(mmrl: Mmrl) -> Path:
    """A run that nothing happened to."""
    code, said = mmrl.train("unkilled", SUPERVISED)
    assert code == 0, said
    assert said.splitlines()[-1] == str(mmrl.runs / "unkilled" / "report.html")
    return mmrl.runs / "unkilled"


def assert_same(run_dir: Path, unkilled: Path) -> None:
    """Bit for bit, but for what the clock says."""
    assert tiny_run.rows(run_dir) == tiny_run.rows(unkilled)
    assert tiny_run.weights(run_dir) == tiny_run.weights(unkilled)
    tensors, meta = tiny_run.newest(run_dir)
    expected, expected_meta = tiny_run.newest(unkilled)
    assert meta == expected_meta and tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []


# Where it is killed, and how often it comes there before: each process dies later in the run than the one before it.
KILLS = [
    ("before anything but the configuration is written", "mmrl.trainer:_describe_machine", 1),
    ("before the first checkpoint is whole", "mmrl.checkpoint:os.fsync", 4),
    ("in the first evaluation", "mmrl.playing:Player._round", 2),
    ("in an update from examples", "mmrl.optim:Optimization.step", 2),
    ("while a checkpoint is put in place", "mmrl.checkpoint:_put_in_place", 2),
    ("between two stages", "mmrl.learners:RolloutLearner.__init__", 1),
    ("while it collects", "mmrl.rollout:Collector.collect", 2),
    ("in the middle of collecting", "policies.pi0:Pi0.act", 3),
    ("in the middle of an update", "mmrl.optim:Optimization.step", 3),
    ("between a row of metrics and its checkpoint", "mmrl.trainer:Run.save", 1),
    ("while a checkpoint is written", "mmrl.checkpoint:os.fsync", 3),
    ("in the last evaluation", "mmrl.playing:Player._round", 1),
    ("while the policy is saved", "mmrl.trainer:_save_policy", 1),
]


def test_a_run_killed_again_and_again_ends_where_an_unkilled_one_does(mmrl: Mmrl, unkilled: Path) -> None:
    code, said = mmrl.train("killed", SUPERVISED, moment=KILLS[0][1], count=KILLS[0][2])
    assert code == -signal.SIGKILL, said
    for what, moment, count in KILLS[1:]:
        code, said = mmrl.resume("killed", moment=moment, count=count)
        assert code == -signal.SIGKILL, f"{what}: {said}"
    code, said = mmrl.resume("killed")
    assert code == 0, said
    assert_same(mmrl.runs / "killed", unkilled)
    assert (mmrl.runs / "killed" / "environment.json").is_file()
    left = [path.name for path in (mmrl.runs / "killed").rglob("*") if path.name.startswith(".")]
    assert left in ([], [".lock"])


def test_a_kill_from_outside(mmrl: Mmrl, unkilled: Path) -> None:
    """``python -m mmrl`` itself, killed as soon as it has trained."""
    run_dir = mmrl.runs / "outside"
    command = [sys.executable, "-m", "mmrl", "train", str(mmrl.config), "name=outside", SUPERVISED]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 300
    while '"kind": "train"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert tiny_run.rows(run_dir) != tiny_run.rows(unkilled)
    code, said = mmrl.resume("outside")
    assert code == 0, said
    assert_same(run_dir, unkilled)


def test_a_run_in_parts_ends_where_an_unkilled_one_does(mmrl: Mmrl) -> None:
    """Its simulators are processes, which die with it."""
    parts = "stages.improve.collect.parts=2"
    code, said = mmrl.train("parts", parts)
    assert code == 0, said
    code, said = mmrl.train("parts-killed", parts, moment="mmrl.workers.remote:RemoteEnvironment.begin_step", count=12)
    assert code == -signal.SIGKILL, said  # in the second rollout, whose first part simulates
    assert '"kind": "train", "stage": "improve", "iteration": 1' in (mmrl.runs / "parts-killed" / "metrics.jsonl").read_text()
    code, said = mmrl.resume("parts-killed")
    assert code == 0, said
    assert_same(mmrl.runs / "parts-killed", mmrl.runs / "parts")


@pytest.fixture
def halfway(mmrl: Mmrl, unkilled: Path) -> Path:
    """A run killed in its improving stage, with two checkpoints of that stage."""
    name = f"halfway-{len(list(mmrl.runs.iterdir()))}"
    code, said = mmrl.train(name, SUPERVISED, moment="mmrl.rollout:Collector.collect", count=3)
    assert code == -signal.SIGKILL, said
    return mmrl.runs / name


def test_a_corrupt_checkpoint_is_passed_over_with_a_note(mmrl: Mmrl, halfway: Path, unkilled: Path) -> None:
    newest = checkpoint.latest(halfway / "checkpoints").path
    file = newest / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, said = mmrl.resume(halfway.name)
    assert code == 0, said
    assert f"checkpoint {newest} is damaged: policy.safetensors is corrupt" in said and "continuing from the earlier" in said
    assert_same(halfway, unkilled)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sentence(said: str) -> str:
    """What was said, which must be one line without a traceback."""
    lines = said.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def test_a_checkpoint_of_another_policy_is_refused(mmrl: Mmrl, halfway: Path) -> None:
    other = tiny_run.write_architecture(mmrl.config.parent / "other", width=48)
    settings = halfway / "config.yaml"
    settings.write_text(settings.read_text().replace(str(mmrl.config.parent / "architecture"), str(other)))
    before = everything(halfway)
    code, said = mmrl.resume(halfway.name)
    assert code == 2 and "holds another policy" in sentence(said) and str(halfway / "checkpoints") in said
    assert everything(halfway) == before


def test_checkpoints_that_are_all_damaged_are_refused(mmrl: Mmrl, halfway: Path) -> None:
    for path in (halfway / "checkpoints").glob("*/meta.json"):
        path.write_text("{")
    before = everything(halfway)
    code, said = mmrl.resume(halfway.name)
    assert code == 2 and "holds no complete checkpoint" in sentence(said)
    assert everything(halfway) == before


@pytest.mark.parametrize("output", ["a_file", "/proc/nowhere", "/sys/nowhere"])
def test_a_folder_that_cannot_be_written(output: str, mmrl: Mmrl) -> None:
    if output == "a_file":
        (mmrl.config.parent / output).write_text("")
        output = str(mmrl.config.parent / output)
    elif not Path(output).parent.is_dir():
        pytest.skip(f"{Path(output).parent} is not here")
    code, said = mmrl.train("nowhere", f"output={output}")
    assert code == 2 and output in sentence(said)
    assert not (Path(output) / "nowhere").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(mmrl: Mmrl, small_disk: Path, unkilled: Path) -> None:
    """Full at the first checkpoint, full in the midst of the run, and large enough at last."""
    run_dir = small_disk / "full"
    code, said = mmrl.train("full", SUPERVISED, f"output={small_disk}")
    assert code == 2 and "No space left on device" in said and "Traceback" not in said, said
    assert not checkpoint.any_saved(run_dir / "checkpoints")
    assert not list(run_dir.rglob(".*writing*")) and not list(run_dir.rglob("*.part"))
    weight = sum(file.stat().st_size for file in checkpoint.latest(unkilled / "checkpoints").path.iterdir())
    subprocess.run(["mount", "-o", f"remount,size={2 * weight + 200_000}", str(small_disk)], check=True)
    code, said = mmrl("train", "--resume", str(run_dir))
    assert code == 2 and "No space left on device" in said and "Traceback" not in said, said
    assert checkpoint.latest(run_dir / "checkpoints").warning is None
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, said = mmrl("train", "--resume", str(run_dir))
    assert code == 0, said
    assert_same(run_dir, unkilled)


# What a user may get wrong in the configuration: the overrides, and what the sentence must name.
MISTAKES = {
    "an unknown key": (["policy.noise_levle=0.5"], ["policy.noise_levle", "noise_level"]),
    "an unknown key of a stage": (["stages.improve.colect={}"], ["stages.improve.colect", "collect"]),
    "a wrong type": (["stages.improve.iterations=many"], ["stages.improve.iterations", "many"]),
    "a wrong type of an optimizer": (["stages.improve.optimizer.lr=fast"], ["stages.improve.optimizer.lr", "fast"]),
    "an unused key": (["stages.warm_start.collect={num_envs: 4, decisions: 4}"], ["unused key", "stages.warm_start.collect"]),
    "an unused noise level": (["policy.sampler=flow_noise"], ["policy", "noise_level is not used by sampler 'flow_noise'"]),
    "no noise": (["policy.noise_level=0"], ["policy", "noise_level must be above 0 with sampler 'flow_sde'"]),
    "no likelihood": (["policy.sampler=ode", "policy.noise_level=null"], ["stages.improve.algorithm", "policy.sampler"]),
    "groups that do not divide": ([tiny_run.GRPO, "stages.improve.algorithm.group_size=3"], ["group_size", "does not divide"]),
    "no such stage": (["stages.improove.iterations=1"], ["stages.improove", "improve"]),
    "no such class": (["policy.target=policies.pi0:Pi1"], ["policy.target", "Pi1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_one_sentence(mistake: str, mmrl: Mmrl) -> None:
    overrides, named = MISTAKES[mistake]
    before = set(mmrl.runs.iterdir()) if mmrl.runs.exists() else set()
    result = CliRunner().invoke(app, ["train", str(mmrl.config), "name=mistaken", *overrides])
    assert result.exit_code == 2, result.output
    said = sentence(result.output)
    assert all(part in said for part in (str(mmrl.config), *named)), said
    assert (set(mmrl.runs.iterdir()) if mmrl.runs.exists() else set()) == before


def test_a_name_that_is_taken(mmrl: Mmrl, unkilled: Path) -> None:
    before = everything(unkilled)
    result = CliRunner().invoke(app, ["train", str(mmrl.config), "name=unkilled"])
    assert result.exit_code == 2 and f"--resume {unkilled}" in sentence(result.output)
    assert everything(unkilled) == before
