"""Checkpoints that are either complete or not there, and that say so when they are damaged.

A checkpoint is a folder ``CHECKPOINTS/000120``: one safetensors file per section (policy, optimizer, generators, data, ...) and
``meta.json`` with the size and SHA-256 of each. It is written into a hidden folder beside its place, flushed to the disk, and
renamed, so a process killed at any moment leaves whole checkpoints and hidden leftovers, which the next save removes. Nothing is
pickled. One process writes to a checkpoints folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl.errors import CheckpointError, MMRLError, TrainingError

FORMAT = 1
META = "meta.json"
_SUFFIX = ".safetensors"
_WRITING, _REPLACED, _REMOVED = ".writing-", ".replaced-", ".removed-"  # hidden folders; only _REPLACED is ever worth keeping

Sections = Mapping[str, Mapping[str, Tensor]]


class Found(NamedTuple):
    """The newest complete checkpoint, and a sentence about newer ones that are damaged (None: there are none)."""

    path: Path
    warning: str | None


def save(checkpoints: Path, number: int, sections: Sections, meta: Mapping[str, Any], keep: int) -> Path:
    """Write checkpoint ``number`` and return its folder; afterwards at most ``keep`` are left.

    sections: name -> name -> tensor on any device, of any dtype safetensors knows, shared or strided as it may be. meta: what
    fits in json. Checkpoints of a higher number are removed too: the run went back to before them, or they were damaged.

    Raises CheckpointError where the disk is full or the folder cannot be written; then nothing of ``number`` is left behind and
    the earlier checkpoints stand.
    """
    if keep < 1 or number < 0:
        raise ValueError(f"keep is {keep} and number {number}; keep at least 1 checkpoint, numbered from 0")
    final, writing = checkpoints / _name(number), checkpoints / f"{_WRITING}{_name(number)}"
    with _explained(f"cannot write checkpoint {final}", CheckpointError):
        checkpoints.mkdir(parents=True, exist_ok=True)
        _tidy(checkpoints)
        try:
            writing.mkdir()
            _write(writing, sections, meta)
            _put_in_place(writing, final)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
    _prune(checkpoints, number, keep)
    return final


def any_saved(checkpoints: Path) -> bool:
    """Whether a checkpoint, complete or damaged, was ever put in place here; a killed first save leaves none."""
    return bool(_listed(checkpoints)) or any(checkpoints.glob(f"{_REPLACED}*"))


def latest(checkpoints: Path) -> Found:
    """The newest complete checkpoint, every byte of it verified.

    Raises CheckpointError where there is none.
    """
    if checkpoints.is_dir():
        with _explained(f"cannot read {checkpoints}", CheckpointError):
            _restore_replaced(checkpoints)
    problems: list[str] = []
    for path in reversed(_listed(checkpoints)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        warning = f"{'; '.join(problems)}; continuing from the earlier checkpoint {path}" if problems else None
        return Found(path, warning)
    detail = f": {'; '.join(problems)}" if problems else ""
    raise CheckpointError(f"{checkpoints} holds no complete checkpoint{detail}; start the run again without --resume")


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(sections, meta) of the checkpoint in the folder ``path``, on the CPU, as ``save`` was given them.

    Raises CheckpointError for a checkpoint that is missing, damaged, incomplete, or of another format.
    """
    body = verify(path)
    with _explained(f"cannot read checkpoint {path}", CheckpointError):
        sections = {name.removesuffix(_SUFFIX): load_file(path / name) for name in body["files"]}
    return sections, body["meta"]


def verify(path: Path) -> dict[str, Any]:
    """The body of ``path/meta.json`` ({"files", "meta"}), once every file has the size and SHA-256 noted there.

    Raises CheckpointError as ``load`` does.
    """
    body = _read_body(path)
    for name, expected in body["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != expected["size"]:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise _damaged(path, f"{name} is corrupt (its SHA-256 is not the one noted in {META})")
    return body


def check_fingerprint(
    meta: Mapping[str, Any], fingerprint: str, path: Path, remedy: str = "resume with the config that wrote it"
) -> None:
    """Raise CheckpointError unless ``meta["fingerprint"]`` is the policy's."""
    written = meta.get("fingerprint")
    if written != fingerprint:
        raise CheckpointError(
            f"{path} holds another policy: it was written by {written!r}, the config's policy is {fingerprint!r}; {remedy}"
        )


def atomic_write_text(path: Path, text: str) -> None:
    """``atomic_write_bytes`` of the UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``, flushed to the disk; whoever reads it sees the old content or the new, never a part.

    Raises TrainingError where that is not possible; then the old content stands.
    """
    writing = path.with_name(f".{path.name}{_WRITING}{os.getpid()}")
    with _explained(f"cannot write {path}", TrainingError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            writing.replace(path)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def _name(number: int) -> str:
    return f"{number:06d}"


def _listed(checkpoints: Path) -> list[Path]:
    """Folders that are named like checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    named = [path for path in checkpoints.iterdir() if re.fullmatch(r"\d{6,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name))


def _write(folder: Path, sections: Sections, meta: Mapping[str, Any]) -> None:
    files = {}
    for name, tensors in sections.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"section {name!r} cannot name a file; use letters, digits, '_', '-' and '.'")
        file = folder / f"{name}{_SUFFIX}"
        save_file(_unshared(tensors), file)
        _flush(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    body = json.loads(json.dumps({"files": files, "meta": dict(meta)}))  # as it will be read, so that the digest is of that
    document = {"format": FORMAT, "sha256": _body_sha256(body), "body": body}
    (folder / META).write_text(json.dumps(document, indent=1))
    _flush(folder / META)
    _flush(folder)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, each in memory of its own (tied ones are written twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return result


def _put_in_place(writing: Path, final: Path) -> None:
    """Rename ``writing`` to ``final``; a checkpoint already there steps aside, and comes back if this process dies in between."""
    aside = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        final.rename(aside)
    writing.rename(final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _restore_replaced(checkpoints: Path) -> None:
    for aside in checkpoints.glob(f"{_REPLACED}*"):
        final = checkpoints / aside.name.removeprefix(_REPLACED)
        if not final.exists():
            aside.rename(final)


def _tidy(checkpoints: Path) -> None:
    """Remove what a killed process left behind."""
    _restore_replaced(checkpoints)
    for prefix in (_WRITING, _REPLACED, _REMOVED):
        for leftover in checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _prune(checkpoints: Path, number: int, keep: int) -> None:
    """Leave ``number`` and the ``keep`` - 1 before it. A folder that cannot be removed is left to the next save."""
    listed = _listed(checkpoints)
    kept = [path for path in listed if int(path.name) <= number][-keep:]
    for path in listed:
        if path not in kept:
            removed = path.with_name(f"{_REMOVED}{path.name}")
            with _explained(f"cannot remove the old checkpoint {path}", CheckpointError):
                path.rename(removed)  # at once, so that a kill leaves no checkpoint that lacks a file
            shutil.rmtree(removed, ignore_errors=True)


def _read_body(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; give the folder of a run that has one")
    try:
        document = json.loads((path / META).read_bytes())
        version, digest, body = document["format"], document.get("sha256"), document.get("body")
    except FileNotFoundError:
        raise _damaged(path, f"{META} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path / META}: {error.strerror}; check its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, f"{META} is not the json that was written") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    if digest != _body_sha256(body):
        raise _damaged(path, f"{META} is corrupt (its SHA-256 is not the one noted in it)")
    return body


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {what}; remove the folder to resume from an earlier one")


def _body_sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the file or folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(what: str, error_class: type[MMRLError]) -> Iterator[None]:
    """Turn a failure of the operating system within the scope into one sentence."""
    try:
        yield
    except OSError as error:
        raise error_class(f"{what}: {error.strerror or error}; {_REMEDY}") from error
    except SafetensorError as error:  # carries the system's error only as text
        number = re.search(r"os error (\d+)", str(error))
        reason = os.strerror(int(number.group(1))) if number else str(error)
        raise error_class(f"{what}: {reason}; {_REMEDY}") from error


_REMEDY = "free some space or choose a folder that can be read and written, then go on with --resume"
