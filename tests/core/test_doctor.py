"""The doctor: it finds what is there, says what mends what is not, and survives what crashes."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmrl import doctor, probes, simulator_probe
from mmrl.doctor import Capability
from mmrl.types import Step
from simulators.tabletop import Tabletop


def program(folder: Path, name: str, script: str) -> None:
    """An executable ``name`` in ``folder``."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_every_line_says_whether_it_works_and_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "one": lambda: Capability("One", True, "is fine"),
        "two": lambda: Capability("Two", False, "is not installed", "apt-get install two"),
    }
    monkeypatch.setattr(doctor, "checks", lambda: table)
    one, two = doctor.lines()
    assert one.split() == ["works", "One", "is", "fine"]
    assert two.startswith("no ") and two.endswith("is not installed  ->  apt-get install two")


def test_torch_and_each_simulator_have_a_line() -> None:
    table = doctor.checks()
    assert "tabletop" in table
    assert not any(name.startswith("_") for name in table)
    assert doctor.check("torch").ok


def test_the_tabletop_renders_and_is_timed() -> None:
    capability = doctor.check("tabletop")
    assert capability.ok, capability.detail
    assert "steps/s" in capability.detail and "front 64x64" in capability.detail


def test_a_missing_package_names_what_installs_it() -> None:
    capability = doctor._package("Nothing", "no_such_package_anywhere", "pip install nothing")
    assert capability == Capability("Nothing", False, "is not installed", "pip install nothing")


def test_a_simulator_s_missing_package_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask", lambda *arguments, **limits: (False, "No module named 'no_such_simulator.parts'"))
    assert doctor.check("tabletop").remedy == "pip install no-such-simulator"
    monkeypatch.setattr(doctor, "_ask", lambda *arguments, **limits: (False, "no display"))
    assert doctor.check("tabletop").remedy == "python -m mmrl.simulator_probe simulators.tabletop"


@pytest.mark.parametrize(("seconds", "built"), [(0.08, [1]), (0.0, [1, 32])])
def test_a_slow_simulator_is_built_once(seconds: float, built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Slow(Tabletop):
        def __init__(self, config: Tabletop.Config, *, num_envs: int, device: torch.device) -> None:
            super().__init__(config, num_envs=num_envs, device=device)
            made.append(num_envs)

        def step(self, actions_BCA: torch.Tensor) -> Step:
            time.sleep(seconds)
            return super().step(actions_BCA)

    monkeypatch.setattr("simulators.tabletop.Tabletop", Slow)
    monkeypatch.setattr(simulator_probe, "_SECONDS", 0.01)
    said = simulator_probe._steps_per_second("simulators.tabletop:Tabletop")
    assert made == built and f"steps/s at {built[-1]} environment" in said


def test_gymnasium_is_built_and_timed(require: Callable[[str], None]) -> None:
    require("gymnasium")
    assert "steps/s at 32 environments (no camera)" in doctor.check("gymnasium").detail


def test_a_package_that_dies_at_import_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies_at_import.py").write_text("import os\nos._exit(9)\n")
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    died = doctor._package("Dies", "dies_at_import", "pip install it")
    assert not died.ok and "ended with 9" in died.detail and died.remedy == "pip install it"
    raised = doctor._package("Raises", "raises_at_import", "pip install it")
    assert (raised.ok, raised.detail) == (False, "operator torchvision::nms does not exist")


def test_torchvision_for_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Capability("torchvision", False, "operator torchvision::nms does not exist", "pip install torchvision")
    monkeypatch.setattr(doctor, "_package", lambda *arguments: broken)
    capability = doctor.check("torchvision")
    assert "CUDA beside CPU" in capability.detail and "--force-reinstall" in capability.remedy


@pytest.mark.parametrize(
    ("name", "installs"), [("bubblewrap", "apt-get install bubblewrap"), ("chromium", "apt-get install chromium")]
)
def test_programs_that_are_not_there(name: str, installs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    capability = doctor.check(name)
    assert not capability.ok and capability.remedy == installs


def test_bubblewrap_that_may_not_make_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    capability = doctor.check("bubblewrap")
    assert (capability.ok, capability.detail) == (False, "bwrap: No permissions to create new namespace")
    assert capability.remedy.startswith("sysctl")


def test_a_browser_that_renders_nothing_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "chromium", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert not doctor.check("chromium").ok
    program(tmp_path, "chromium", "echo '<html><p>ok</p></html>'")
    assert doctor.check("chromium").ok


def test_a_program_that_hangs_is_given_up() -> None:
    assert doctor._run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2) == (
        False,
        "no answer within 0 seconds",
    )
    assert doctor._run(["/no/such/program"]) == (False, "program does not start (No such file or directory)")


def test_vulkan_without_a_loader_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda name, argument="": (False, "libvulkan.so.1: cannot open shared object file"))
    capability = doctor.check("vulkan")
    assert not capability.ok and "mesa-vulkan-drivers" in capability.remedy


def test_the_probe_of_a_module_gives_its_version() -> None:
    assert probes.module("pytest") == pytest.__version__


def test_every_check_is_a_table_entry_without_arguments() -> None:
    assert all(isinstance(check, functools.partial) or check.__code__.co_argcount == 0 for check in doctor.CHECKS.values())


@pytest.mark.parametrize(
    ("answer", "ok", "remedy"),
    [
        ((True, "bubblewrap: own file system; 2.0 ms a call"), True, ""),
        ((True, "files hidden by Landlock; 2.0 ms a call"), True, "apt-get install bubblewrap"),
        (
            (False, "matplotlib is not available on this machine; install it with `pip install matplotlib`"),
            False,
            "pip install matplotlib",
        ),
        ((False, "ended without an answer"), False, "apt-get install bubblewrap"),
    ],
)
def test_the_python_tool_says_how_its_isolation_gets_better(
    answer: tuple[bool, str], ok: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_ask", lambda module: answer)
    capability = doctor.check("python_sandbox")
    assert (capability.ok, capability.detail, capability.remedy) == (ok, answer[1], remedy)


def test_the_python_tool_is_tried(require: Callable[[str], None]) -> None:
    require("bubblewrap")
    require("python_sandbox")
    assert doctor.check("python_sandbox").detail.startswith("bubblewrap: own file system")
