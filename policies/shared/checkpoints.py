"""The files of a checkpoint that transformers does not know, or knows under several names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from mmrl.errors import MMRLError

CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.json"
HEADS_FILE = "heads.safetensors"


def load_tokenizer(
    place: str, *, key: str = "checkpoint", remedy: str = "", loader: Any = AutoTokenizer, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id that the policy's field ``key`` names; ``options`` are its loader's."""
    try:
        return loader.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        reason = f"no tokenizer could be loaded from there ({first_line(error)})"
        raise MMRLError(f"policy.{key} = {place}: {reason}{remedy}") from error


def load_pretrained(loader: Any, checkpoint: str, what: str, *, unread: str | None = None, **options: Any) -> Any:
    """transformers' own ``loader`` on safetensors alone; ``what`` it should be, in words.

    Raises MMRLError if the checkpoint cannot be read, does not fit its config, or lacks weights, which transformers would draw at
    random; a weight whose name contains ``unread`` may be missing, because the policy does not read it.
    """
    check_kind(checkpoint, loader, what)
    try:
        model, found = loader.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unloadable(checkpoint, what, error) from error
    missing = sorted(name for name in found["missing_keys"] if unread is None or unread not in name)
    if missing:
        raise MMRLError(
            f"policy.checkpoint = {checkpoint}: lacks {len(missing)} of the weights of a {what}, such as {missing[0]}; "
            "it is damaged, or of another model"
        )
    return model


def check_kind(checkpoint: str, loader: Any, what: str) -> None:
    """Refuse a checkpoint whose config.json is of another model than the class ``loader`` builds.

    transformers only warns, builds one of the class's own default sizes, which may be gigabytes, and draws its weights at random.
    A config.json that names no model (LeRobot's does not) passes, and so does a loader for many models.
    """
    kind, found = getattr(getattr(loader, "config_class", None), "model_type", None), find_file(checkpoint, CONFIG_FILE)
    if kind is None or found is None:
        return
    try:
        named = json.loads(found.read_text()).get("model_type", kind)
    except (OSError, ValueError, AttributeError):  # transformers says what is wrong with it
        return
    if named != kind:
        raise MMRLError(f"policy.checkpoint = {checkpoint}: is a {named}, not a {what}; name one that is")


def unloadable(checkpoint: str, what: str, error: Exception) -> MMRLError:
    """The sentence for a checkpoint that a library refused."""
    place = "" if Path(checkpoint).exists() else "is no folder here, and as a hub id it "
    return MMRLError(
        f"policy.checkpoint = {checkpoint}: {place}cannot be loaded as a {what} ({first_line(error)}){of_run(checkpoint)}"
    )


def of_run(checkpoint: str) -> str:
    """The end of a sentence about a folder that cannot be loaded, where it is that of a run."""
    policy = Path(checkpoint) / "policy"
    return f"; it is a run's, whose policy is {policy}" if policy.is_dir() else ""


def save_heads(heads: Mapping[str, tuple[str, nn.Module]], folder: Path) -> None:
    """Each head's weights under its name, beside the sentence that says what it computes (no heads: no file)."""
    tensors = {
        f"{name}.{key}": value.contiguous() for name, (_, head) in heads.items() for key, value in head.state_dict().items()
    }
    (folder / HEADS_FILE).unlink(missing_ok=True)
    if tensors:
        save_file(tensors, folder / HEADS_FILE, metadata={name: says for name, (says, _) in heads.items()})


def load_heads(heads: Mapping[str, tuple[str, nn.Module]], checkpoint: str) -> None:
    """Fill the heads that the checkpoint has and that compute the same there; leave the others as they are."""
    found = find_file(checkpoint, HEADS_FILE)
    if found is None:
        return
    try:
        with safe_open(found, "pt") as file:
            saved = file.metadata() or {}
            for name, (says, head) in heads.items():
                if saved.get(name) == says:
                    head.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in head.state_dict()})
    except (SafetensorError, RuntimeError) as error:
        raise MMRLError(
            f"{found}: the saved heads cannot be read ({first_line(error)}); delete it to start with fresh heads"
        ) from error


def find_file(checkpoint: str, name: str) -> Path | None:
    """Where the file ``name`` of a folder or hub id is; None if it has none."""
    if Path(checkpoint).is_dir():
        path = Path(checkpoint) / name
        return path if path.is_file() else None
    try:
        found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(found) if found else None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
