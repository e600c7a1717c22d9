"""Scripts outside the package must be importable beside a CPU torch: see mmrl.torchvision_shim."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "assets").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
OWN = {"mmrl", "policies", "simulators", "tools"}
IMPORT_TORCHVISION = {"diffusers", "libero", "mani_skill", "peft", "sentence_transformers", "transformers", "trl", "vllm"}


def _imported(path: Path) -> list[str]:
    """The packages that a file imports at its top, in order; in place of a benchmark's own parts, theirs."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            beside = path.parent / f"{module.replace('.', '/')}.py"
            names += _imported(beside) if beside.is_file() else [module.split(".")[0]]
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_imports_the_project_before_what_imports_torchvision(path: Path) -> None:
    names = _imported(path)
    own = min((at for at, name in enumerate(names) if name in OWN), default=len(names))
    assert not IMPORT_TORCHVISION.intersection(names[:own]), f"{path.name}: begin with `import mmrl`"
