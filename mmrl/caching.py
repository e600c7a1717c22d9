"""Small things kept on disk between runs: whole or not there, whoever writes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mmrl.errors import ConfigError


def cache_folder(configured: str | None) -> Path:
    """``configured``, or ``mmrl`` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    if configured is not None:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrl"


def digest(*parts: object) -> str:
    """A short name for what an index was built from; bytes count as they are, anything else as its repr."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(f"{len(data)}:".encode() + data)
    return whole.hexdigest()[:32]


class Answers:
    """JSON values by name, a small file each; without a folder nothing is kept. A file that cannot be read counts as missing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str) -> Any | None:
        if self._folder is None:
            return None
        try:
            return json.loads(self._path(self._folder, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, name: str, value: Any) -> None:
        """Raises ConfigError if the folder cannot be written."""
        if self._folder is None:
            return
        path = self._path(self._folder, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
                json.dump(value, file)
            os.replace(file.name, path)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); set 'cache' to a folder that can be written"
            ) from error

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        key = digest(name)
        return folder / key[:2] / f"{key}.json"
