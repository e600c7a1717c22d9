"""Which files a confined Python must be able to read: its own, the system's libraries, and those of a few distributions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from mmrl.errors import EnvironmentMissing

ROOT = Path(__file__).resolve().parents[2]
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_MORE = ("/etc/ld.so.cache", "/usr/share/fonts", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Reading:
    """python: the program. readable: files and folders. site: the folders that packages lie in, for ``sys.path``.

    names: what can be imported from there. modules: what to import at the start.
    """

    python: str
    readable: tuple[str, ...]
    site: tuple[str, ...]
    names: tuple[str, ...]
    modules: tuple[str, ...]


def reading(wanted: Iterable[str]) -> Reading:
    """What the distributions ``wanted`` and all that they need take. Raises EnvironmentMissing for one that is not installed."""
    chosen = list(wanted)
    found = _closure(chosen)
    paths: list[Path] = []
    modules: list[str] = []
    for name, distribution in found.items():
        tops = _tops(distribution)
        paths += tops
        if name in map(_normalised, chosen):
            modules += [path.name for path in tops if (path / "__init__.py").is_file()]
    site = dict.fromkeys(str(Path(str(d.locate_file(""))).resolve()) for d in found.values())
    own = [ROOT / "tools" / "__init__.py", Path(__file__).parent]
    python = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    readable = dict.fromkeys(str(path) for path in [*_python(python), *own, *paths] if path.exists())
    names = dict.fromkeys(path.name.partition(".")[0] for path in paths)
    return Reading(str(python), tuple(readable), tuple(site), tuple(names), tuple(dict.fromkeys(modules)))


def _python(program: Path) -> list[Path]:
    paths = [Path(path) for path in (*_SYSTEM, *_MORE)]
    paths += [program, Path(sysconfig.get_paths()["stdlib"])]
    paths += [Path(folder) for folder in [sysconfig.get_config_var("DESTSHARED")] if folder]
    libraries = sysconfig.get_config_var("LIBDIR")
    if libraries and not libraries.startswith(_SYSTEM):
        paths += sorted(Path(libraries).glob("*.so*"))
    return paths


def _closure(wanted: Iterable[str]) -> dict[str, Distribution]:
    """Normalised name -> distribution; a requirement that is not installed is one that its marker rules out, or an extra's."""
    found: dict[str, Distribution] = {}
    queue = [(name, True) for name in wanted]
    while queue:
        name, needed = queue.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if needed:
                raise EnvironmentMissing(name, f"pip install {name}") from None
            continue
        if _normalised(name) in found:
            continue
        found[_normalised(name)] = distribution
        for requirement in distribution.requires or []:
            match = re.match(r"[\w.-]+", requirement)
            if match and "extra ==" not in requirement:
                queue.append((match[0], False))
    return found


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _tops(distribution: Distribution) -> list[Path]:
    """The folders and modules of a distribution, without scripts; its whole folder where it does not list its files."""
    home = Path(str(distribution.locate_file(""))).resolve()
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return sorted(home / name for name in names) if names else [home]
