"""From a name in a YAML file, ``package.module:Name``, to the class (or the tool's function) it means.

The packages ``policies``, ``simulators`` and ``tools`` share their names with unrelated distributions on PyPI, so a name is
followed only into the packages that lie beside this one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from mmrl.errors import RegistryError

PACKAGES = ("mmrl", "policies", "simulators", "tools")
DISTRIBUTION = "mmrl-framework"
ROOT = Path(__file__).resolve().parents[1]
NEAR = 0.7  # how much alike a name must be that someone may have meant: 'GPRO' and 'GRPO' are 0.75, 'save' and 'stages' 0.6
GUESS = 0.6  # the same for a model, which cannot look anything up
_TARGET = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def resolve(target: str) -> type:
    """The class that ``target`` names, e.g. ``policies.pi0:Pi0``.

    Raises RegistryError, saying what to write or install, as ``find`` does, and if the name is no class's.
    """
    found = find(target, _components)
    if not isinstance(found, type):
        raise RegistryError(f"target '{target}' is a {type(found).__name__}, but a component is a class")
    return found


def find(target: str, offered: Callable[[dict[str, Any]], Iterable[str]]) -> Any:
    """Whatever ``target`` names. offered: of what a module itself defines, the names that a wrong one may have meant.

    Raises RegistryError if the name is malformed, lies outside this project's packages, is hidden by another distribution's
    package, does not exist, or needs a package that is not installed.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise RegistryError(f"target '{target}' is not of the form 'package.module:Name', such as 'policies.pi0:Pi0'")
    module_name, name = match["module"], match["name"]
    package = module_name.partition(".")[0]
    if package not in PACKAGES:
        raise RegistryError(f"target '{target}' starts with '{package}', but components live in {', '.join(PACKAGES)}")
    _refuse_shadow(package)
    module = _import(target, module_name)
    found = getattr(module, name, None)
    if found is None:
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name}
        raise RegistryError(f"target '{target}': {module_name} has no '{name}'{did_you_mean(name, offered(own))}")
    return found


def did_you_mean(wrong: str, known: Iterable[str], near: float = NEAR) -> str:
    """The end of a sentence about an unknown name: its ``nearest`` neighbour, else everything known."""
    known = sorted(set(known))
    meant = nearest(wrong, known, near)
    if meant is not None:
        return f"; did you mean '{meant}'?"
    return f"; known are {', '.join(known)}" if known else ""


def nearest(wrong: str, known: Sequence[str], near: float = NEAR) -> str | None:
    """The known name that ``wrong`` is likely to mean; None where there is none.

    near: how much alike they must be, from 0 to 1: difflib's ratio. Names of as many parts, between dots and underscores,
    must be alike part by part, as what they have in common says nothing of the rest.
    """

    def alike(name: str) -> bool:
        ours, theirs = re.split(r"[._]", wrong), re.split(r"[._]", name)
        return len(ours) != len(theirs) or all(get_close_matches(a, [b], cutoff=near) for a, b in zip(ours, theirs, strict=True))

    return next(filter(alike, get_close_matches(wrong, known, n=max(len(known), 1), cutoff=near)), None)


def _refuse_shadow(package: str) -> None:
    """Raise unless Python would import ``package`` from beside this project's ``mmrl``."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module made by hand, without a spec
        spec = None
    places = [Path(p).resolve() for p in (spec.submodule_search_locations or [spec.origin or ""])] if spec else []
    if ROOT / package not in places:
        found = places[0] if places else "nowhere"
        raise RegistryError(
            f"'{package}' is imported from {found}, which hides this project's {ROOT / package}; "
            f"uninstall the distribution of that name (`pip uninstall {package}`) or take its folder off PYTHONPATH"
        )


def _import(target: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == module_name or module_name.startswith(f"{missing}."):
            hint = did_you_mean(module_name, _candidates(module_name))
            raise RegistryError(f"target '{target}': there is no module '{module_name}'{hint}") from error
        if missing.partition(".")[0] in PACKAGES:
            raise RegistryError(f"target '{target}': {module_name} imports '{missing}', which does not exist") from error
        raise RegistryError(
            f"target '{target}': {module_name} needs the package '{missing}', which is not installed; "
            f"install it with `{install_command(missing.partition('.')[0])}`"
        ) from error


def install_command(module: str) -> str:
    """The pip command that brings ``module``: through an extra of this distribution if one lists it or is called like it."""
    wanted = _normalised(module)
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and wanted in (_normalised(name[0]), _normalised(extra[1])):
            return f"pip install '{DISTRIBUTION}[{extra[1]}]'"
    return f"pip install {wanted}"


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return []


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _candidates(wrong: str) -> list[str]:
    """Every module of the package if one of them is near, else those beside it, in the nearest folder that has any."""
    folder = wrong.rpartition(".")[0]
    modules = _modules(wrong.partition(".")[0])
    if nearest(wrong, modules) is not None:
        return modules
    while folder and not any(module.rpartition(".")[0] == folder for module in modules):
        folder = folder.rpartition(".")[0]
    return [module for module in modules if module.rpartition(".")[0] == folder]


def _modules(package: str) -> list[str]:
    """Every module of ``package``, dotted, read from the folder so that nothing is imported."""
    paths = (ROOT / package).rglob("*.py")
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if not path.stem.startswith("__")]


def _components(own: dict[str, Any]) -> list[str]:
    """The classes with a Config, or every class if none has one."""
    classes = {name: value for name, value in own.items() if isinstance(value, type)}
    return [name for name, value in classes.items() if hasattr(value, "Config")] or list(classes)
