"""A corpus: a JSONL file with a document a line, {"id", "title", "text", optional "url", "images"}.

Documents stay in the file. Where each line starts, and which line has which id and url, is worked out once, kept on disk under a
hash of the file's content and mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.errors import ConfigError, DataError
from tools.search_parts.caching import build_once, shown

_LAYOUT = 1  # of the files below; another number builds them anew


@dataclass(frozen=True)
class Document:
    """One line. images: files, relative to the corpus file's folder."""

    id: str
    title: str
    text: str
    url: str | None = None
    images: tuple[str, ...] = ()


def parse(line: bytes, where: str) -> Document:
    """The document of one line. Raises DataError, which opens with ``where``."""
    data = parse_object(line, where)
    for key in ("id", "title", "text"):
        if not isinstance(data.get(key), str):
            have = f"is {json.dumps(data[key])[:40]}" if key in data else "is missing"
            raise DataError(f"{where}: '{key}' must be a string, but it {have}")
    if not data["id"]:
        raise DataError(f"{where}: 'id' is empty; give the document a name of its own")
    url, images = data.get("url"), data.get("images") or []
    if not isinstance(url, str | None):
        raise DataError(f"{where}: 'url' must be a string, but it is {json.dumps(url)[:40]}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: 'images' must be a list of file names, but it is {json.dumps(images)[:40]}")
    return Document(data["id"], data["title"], data["text"], url or None, tuple(images))


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line. Raises DataError, which opens with ``where``."""
    try:
        data = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: must be a JSON object, but it is {json.dumps(data)[:40]}")
    return data


class Corpus:
    """See the module. Safe to read from several threads.

    digest: hash of the file's content. Raises ConfigError where there is no such file, DataError (naming file and line) where a
    line is broken or two lines have one id.
    """

    def __init__(self, path: str, cache: Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            self.digest = hashlib.file_digest(self._file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise ConfigError(f"{path}: the corpus cannot be read ({error.strerror}); set 'corpus' to a JSONL file") from error
        folder = build_once(cache, f"corpus-{self.digest}-{_LAYOUT}", self._build)
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        self._names = np.load(folder / "names.npy", mmap_mode="r")
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Document:
        start, length = (int(number) for number in self._starts[row])
        return parse(os.pread(self._file.fileno(), length, start), f"{self.path}, byte {start}")

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def find(self, name: str) -> list[Document]:
        """The documents with this id or this url, in the file's order; several passages may share a url."""
        wanted = _hash(name)
        first, last = np.searchsorted(self._names, wanted, "left"), np.searchsorted(self._names, wanted, "right")
        found = [self[row] for row in sorted(int(row) for row in self._rows[first:last])]
        return [document for document in found if name in (document.id, document.url)]

    def close(self) -> None:
        self._file.close()

    def _build(self, folder: Path) -> None:
        starts, names, rows = array("q"), array("Q"), array("q")
        ids, lines, at = array("Q"), array("q"), 0
        self._file.seek(0)
        for number, line in enumerate(shown(self._file, f"Reading {self.path.name}", 0), 1):
            if line.strip():
                document = parse(line, f"{self.path}, line {number}")
                own = {_hash(document.id), *([_hash(document.url)] if document.url else [])}
                names.extend(own)
                rows.extend([len(lines)] * len(own))
                starts.extend((at, len(line)))
                ids.append(_hash(document.id))
                lines.append(number)
            at += len(line)
        if not lines:
            raise DataError(f"{self.path}: holds no document; each line must be one JSON object with id, title and text")
        self._refuse_twins(np.array(ids, np.uint64), lines)
        order = np.argsort(np.array(names, np.uint64), kind="stable")
        np.save(folder / "starts.npy", np.array(starts, np.int64).reshape(-1, 2))
        np.save(folder / "names.npy", np.array(names, np.uint64)[order])
        np.save(folder / "rows.npy", np.array(rows, np.int64)[order])

    def _refuse_twins(self, ids: np.ndarray, lines: array[int]) -> None:
        order = np.argsort(ids, kind="stable")
        twins = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if len(twins):
            row = int(twins[np.argmin(order[twins + 1])])  # the twin that comes first in the file
            first, second = lines[int(order[row])], lines[int(order[row + 1])]
            raise DataError(f"{self.path}, line {second}: has the id of line {first}; ids must differ")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
