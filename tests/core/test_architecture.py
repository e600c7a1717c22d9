"""The one-way rule, and the sizes that keep a file readable, read from the syntax trees of the whole project."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mmrl.describe import descriptions
from mmrl.registry import PACKAGES, ROOT, install_command

CONTRACTS = (
    "mmrl.types",
    "mmrl.columns",
    "mmrl.messages",
    "mmrl.transcripts",
    "mmrl.answers",
    "mmrl.protocols",
    "mmrl.numerics",
    "mmrl.errors",
    "mmrl.caching",
    "mmrl.component",
    "mmrl.torchvision_shim",
)
FREE = ("mmrl",)  # the trainer, the command line and what serves them: all of mmrl, but nothing outside it
# Module or package -> what of this project it may import; the longest match holds, and a package may always import itself.
RULES = {
    "mmrl": FREE,
    "mmrl.numerics": (),
    "mmrl.columns": (),
    "mmrl.messages": (),
    "mmrl.transcripts": ("mmrl.messages",),
    "mmrl.answers": ("mmrl.registry",),
    "mmrl.observation": ("mmrl.columns", "mmrl.messages"),
    "mmrl.types": ("mmrl.numerics", "mmrl.columns", "mmrl.messages", "mmrl.observation", "mmrl.transcripts"),
    "mmrl.judging": ("mmrl.messages", "mmrl.transcripts"),
    "mmrl.sources": ("mmrl.types",),
    "mmrl.protocols": (
        "mmrl.types",
        "mmrl.numerics",
        "mmrl.columns",
        "mmrl.messages",
        "mmrl.transcripts",
        "mmrl.judging",
        "mmrl.sources",
    ),
    "mmrl.errors": (),
    "mmrl.torchvision_shim": (),
    "mmrl.caching": ("mmrl.errors",),
    "mmrl.registry": ("mmrl.errors",),
    "mmrl.component": ("mmrl.errors", "mmrl.registry"),
    "mmrl.algorithms": CONTRACTS,
    "mmrl.rewards": CONTRACTS,
    "mmrl.rewards.apart": (*CONTRACTS, "mmrl.rewards", "mmrl.workers"),
    "mmrl.data": CONTRACTS,
    "mmrl.rollout": CONTRACTS,
    "mmrl.batching": CONTRACTS,
    "mmrl.workers": (*CONTRACTS, "mmrl.registry"),
    "mmrl.calling": (*CONTRACTS, "mmrl.registry"),
    "mmrl.tool_use": (*CONTRACTS, "mmrl.answers", "mmrl.calling"),
    "policies": CONTRACTS,
    "simulators": (*CONTRACTS, "mmrl.workers", "mmrl.registry"),
    "tools": CONTRACTS,
}
TORCH_ONLY = (
    "mmrl.numerics",
    "mmrl.columns",
    "mmrl.observation",
    "mmrl.types",
    "mmrl.judging",
    "mmrl.sources",
    "mmrl.protocols",
)

SOURCES = sorted(path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py"))
MODULES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; ``from mmrl import types`` counts as mmrl.types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rule_of(name: str) -> str:
    return max((rule for rule in RULES if within(name, rule)), key=len)


def forbidden(name: str, imported: str) -> bool:
    """Whether module ``name`` may not import ``imported``."""
    rule = rule_of(name)
    if imported.partition(".")[0] in PACKAGES:
        return not any(within(imported, allowed) for allowed in (*RULES[rule], rule))
    return rule in TORCH_ONLY and imported.partition(".")[0] not in {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    name = name_of(path)
    assert [f"line {line}: {imported}" for line, imported in imports(tree_of(path)) if forbidden(name, imported)] == []


@pytest.mark.parametrize(
    ("name", "imported", "wrong"),
    [
        ("policies.pi0", "simulators.tabletop.Tabletop", True),
        ("policies.pi0", "mmrl.algorithms.ppo", True),
        ("policies.pi0", "policies.pi0_parts.heads", False),
        ("policies.pi0", "transformers.AutoModel", False),
        ("mmrl.algorithms.ppo", "mmrl.trainer", True),
        ("mmrl.algorithms.ppo", "mmrl.numerics.losses.value_loss", False),
        ("mmrl.trainer", "policies.pi0.Pi0", True),
        ("mmrl.trainer", "mmrl.algorithms.ppo", False),
        ("mmrl.numerics.flow", "mmrl.types.Loss", True),
        ("mmrl.numerics.flow", "numpy", True),
        ("mmrl.numerics.flow", "torch.nn", False),
        ("mmrl.protocols", "mmrl.types.Batch", False),
        ("mmrl.types", "mmrl.protocols", True),
        ("simulators.maniskill", "mmrl.workers.environment.WorkerEnvironment", False),
        ("policies.pi0", "mmrl.workers.environment.WorkerEnvironment", True),
        ("mmrl.workers.pool", "simulators.maniskill", True),
    ],
)
def test_the_rule_itself(name: str, imported: str, wrong: bool) -> None:
    assert forbidden(name, imported) is wrong


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_stand_at_the_top(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"line {line}: {what} in {function.name}" for function in functions for line, what in imports(function)] == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {function.name: lines for function in functions if (lines := (function.end_lineno or 0) - function.lineno + 1) > 80}
    assert long == {}


def components() -> Iterator[tuple[str, str]]:
    """(module, class) of every component, found without importing anything."""
    for path in MODULES:
        for owner in (node for node in tree_of(path).body if isinstance(node, ast.ClassDef)):
            if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in owner.body):
                yield name_of(path), owner.name


def imported(name: str) -> ModuleType:
    """A module of ours; skips, but in CI, where a package of an extra is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in PACKAGES or os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{name} needs {missing}; install it with: {install_command(missing)}")


@pytest.mark.parametrize(("module", "owner"), list(components()), ids=lambda name: name)
def test_a_component_s_config_is_strict_frozen_and_described(module: str, owner: str) -> None:
    config = getattr(imported(module), owner).Config
    assert config.__pydantic_config__.get("extra") == "forbid"  # type: ignore[attr-defined]
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert inspect.getdoc(config)
    assert {field.name for field in dataclasses.fields(config)} == set(descriptions(config))  # type: ignore[arg-type]
