"""One wheel, with this project's packages and nothing else, that declares what it imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

from mmrl.registry import DISTRIBUTION, PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> list[str]:
    """Every folder with Python in it, dotted."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        copytree(ROOT / package, source / package, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1
    assert top - info == set(PACKAGES)


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert wanted <= set(wheel.namelist()), sorted(wanted - set(wheel.namelist()))


def test_every_package_is_listed() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_the_script_is_declared(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "mmrl = mmrl.cli:main" in wheel.read(entry).decode()


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def third_party(path: Path) -> set[str]:
    """Top-level packages that a file imports and that are neither Python's nor this project's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found - sys.stdlib_module_names - set(PACKAGES)


def test_everything_imported_is_declared() -> None:
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    declared = {normalised(item) for item in requirements}
    known = packages_distributions()
    imported = {module for package in PACKAGES for path in (ROOT / package).rglob("*.py") for module in third_party(path)}
    undeclared = {module for module in imported if not {normalised(d) for d in known.get(module, [module])} & declared}
    assert undeclared == set()


def test_the_distribution_has_the_name_that_errors_tell_users_to_install() -> None:
    assert PROJECT["project"]["name"] == DISTRIBUTION
