"""What the search tools keep on disk: folders that are built once, whole or not there, whoever writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mmrl.errors import ConfigError

T = TypeVar("T")


def build_once(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder ``folder/key``, which ``build`` fills if it is not there yet.

    It is filled under another name and renamed when it is whole. Of two processes that build at once, the second keeps what the
    first has renamed and throws its own away. Raises ConfigError if the folder cannot be written.
    """
    done = folder / key
    if done.is_dir():
        return done
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f"{key}.", suffix=".part", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot keep an index there ({error.strerror}); set 'cache' to a folder that can be written"
        ) from error
    with scratch as part:
        work = Path(part) / "index"
        work.mkdir()
        build(work)
        try:
            work.rename(done)
        except OSError:
            if not done.is_dir():
                raise
    return done


def shown(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, with a bar on a terminal while they are gone through."""
    console = Console(stderr=True)
    return iter(track(items, title, total=total, console=console, transient=True, disable=not console.is_terminal))
