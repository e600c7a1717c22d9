"""Embeddings of prompts on disk, for the next run and for others beside this one: FOLDER/ab/abcd....safetensors.

A file is named after all that an embedding depends on: the prompt, the encoders' weights and configs, the tokenizers, the options
and the versions of the libraries. So a changed encoder never reads what another has left. A file is there whole or not at all,
whoever writes; one that was damaged is removed, counted and made again. Where room is short, what was used longest ago goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmrl.caching import cache_folder, digest
from mmrl.errors import ConfigError
from policies.diffusion_families.base import Family
from policies.diffusion_parts.options import PromptCache

LOG = logging.getLogger("mmrl.policies")
_FORMAT = 1  # of the files, and of what families tell a network of a prompt
_OURS = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}\.safetensors")
_SHARE = 0.9  # of the room that is still taken when some was made, so that it need not be made for every file
_LOOK = 64  # files that are written before the folder is looked at again, to which other processes write as well
_ABANDONED_S = 3600.0  # age of a file that is still being written, after which nobody writes it


class DiskCache:
    """See the module. dropped: files that were damaged. Raises ConfigError where the folder cannot be written."""

    def __init__(self, options: PromptCache) -> None:
        self.folder = cache_folder(None) / "embeddings" if options.folder is None else Path(options.folder)
        self.limit = int(options.gigabytes * 1e9)
        self.dropped = 0
        self._room, self._written = 0, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(self.folder, error) from error

    def get(self, name: str) -> dict[str, Tensor] | None:
        """On the CPU; None where it is not kept. Marks it as used."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            tensors = _unpacked(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            self.dropped += 1
            LOG.warning("%s was damaged (%s) and is made again; %d so far", path, error, self.dropped)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another process has just removed it, or the folder is only to be read
            os.utime(path)
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        data, path = save(plain, {"checksum": _checksum(plain)}), self._path(name)
        if len(data) > self.limit:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
                file.write(data)
            os.replace(file.name, path)
        except OSError as error:
            raise self._unwritable(path, error) from error
        self._room -= len(data)
        self._written += 1
        if self._room < 0 or self._written % _LOOK == 0:
            self._make_room()

    def _make_room(self) -> None:
        """Remove what was used longest ago, if all of it takes more than the limit, and what nobody finished writing."""
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process has removed it
            if path.suffix == ".part" and time.time() - stat.st_mtime > _ABANDONED_S:
                path.unlink(missing_ok=True)
            if _OURS.fullmatch(path.relative_to(self.folder).as_posix()):
                files.append((stat.st_mtime_ns, stat.st_size, path))
        taken = sum(size for _, size, _ in files)
        if taken > self.limit:
            for _, size, path in sorted(files):
                path.unlink(missing_ok=True)
                taken -= size
                if taken <= _SHARE * self.limit:
                    break
        self._room = self.limit - taken

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _unwritable(path: Path, error: OSError) -> ConfigError:
        return ConfigError(f"{path}: cannot be written ({error.strerror}); set policy.prompt_cache.folder to one that can be")


def _unpacked(data: bytes) -> dict[str, Tensor]:
    """Raises one of several errors where the file is not what was written."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header["__metadata__"]["checksum"] != _checksum(tensors):
        raise ValueError("its checksum is another")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return digest(*(part for name in sorted(tensors) for part in (name, *_content(tensors[name]))))


def _content(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def encoders_digest(family: Family) -> str:
    """A name for all that an embedding depends on beside the prompt. Reads all weights of the encoders once."""
    pipeline, network = family.pipeline, family.network
    apart = [network, pipeline.scheduler, None if family.edits else pipeline.vae]
    about: list[object] = [_FORMAT, type(family).__qualname__, type(pipeline).__qualname__, family.height, family.width]
    about += [family.max_text_tokens, str(network.dtype), network.device.type]
    about += [library.__version__ for library in (torch, transformers, diffusers)]
    for name, part in sorted(pipeline.components.items()):
        if any(part is other for other in apart):
            continue
        about += [name, type(part).__qualname__, _weights(part) if isinstance(part, nn.Module) else _files(part)]
    return digest(*about)


def _weights(module: Any) -> str:
    config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for name, tensor in sorted(module.state_dict().items()):
        dtype, shape, data = _content(tensor)
        whole.update(f"{name} {dtype} {shape}".encode())
        whole.update(data)
    return whole.hexdigest()


def _files(part: Any) -> str:
    """Of a tokenizer or a processor: what it writes down of itself."""
    if not hasattr(part, "save_pretrained"):
        return repr(part)
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        written = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return digest(*(each for path in written for each in (path.relative_to(folder).as_posix(), path.read_bytes())))
