"""What runs in a worker process: the environments of its slots, and a loop that answers the parent's calls."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from mmrl.errors import MMRLError, RegistryError
from mmrl.registry import install_command
from mmrl.workers.board import Board
from mmrl.workers.single import SingleEnvironment

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Chunk:
    """What a chunk of C actions did in k slots; metrics_kM in the order of Description.metrics."""

    rewards_kC: np.ndarray[Any, Any]
    valid_kC: np.ndarray[Any, Any]
    terminated_k: np.ndarray[Any, Any]
    truncated_k: np.ndarray[Any, Any]
    metrics_kM: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Failure:
    """An exception in a worker. user: it is a sentence for the user (MMRLError), not a bug."""

    text: str
    user: bool


class Worker:
    """The environments of ``slots``; each public method is a command of the parent's."""

    def __init__(self, target: str, config: Any, slots: Sequence[int]) -> None:
        self._make, self._config = load(target), config
        self._environments: dict[int, SingleEnvironment] = {slots[0]: self._make(config)}  # the others when they are needed
        self.description = self._environments[slots[0]].description
        self._done = dict.fromkeys(slots, True)
        self._board: Board | None = None
        self._ends: dict[int, tuple[bool, bool, list[float]]] = {}

    def attach(self, name: str, num_envs: int) -> None:
        self._board = Board(self.description, num_envs, name)

    def reset(self, tasks: dict[int, int]) -> dict[int, str]:
        """Start the tasks (slot -> task id); slot -> instruction."""
        instructions = {}
        for slot, task in tasks.items():
            if slot not in self._environments:
                self._environments[slot] = self._make(self._config)
            instructions[slot] = self._environments[slot].reset(task)
            self._done[slot] = False
            self._ends[slot] = (False, False, [0.0] * len(self.description.metrics))
            self._show(slot)
        return instructions

    def step(self, actions: dict[int, np.ndarray[Any, Any]]) -> Chunk:
        """A chunk [C, A] in each of some slots."""
        rewards, valid, ends = [], [], []
        for slot, actions_CA in actions.items():
            rewards_C, valid_C = np.zeros(len(actions_CA), np.float32), np.zeros(len(actions_CA), bool)
            for c, action_A in enumerate(actions_CA):
                if self._done[slot]:
                    break
                outcome = self._environments[slot].step(action_A)
                rewards_C[c], valid_C[c] = outcome.reward, True
                self._done[slot] = outcome.terminated or outcome.truncated
                metrics = [float(outcome.metrics[name]) for name in self.description.metrics]
                self._ends[slot] = (outcome.terminated, outcome.truncated, metrics)
            if valid_C.any():
                self._show(slot)
            rewards.append(rewards_C)
            valid.append(valid_C)
            ends.append(self._ends[slot])
        terminated, truncated, metrics = zip(*ends, strict=True)
        return Chunk(np.stack(rewards), np.stack(valid), np.array(terminated), np.array(truncated), np.array(metrics, np.float32))

    def expert(self, slots: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        return {slot: np.asarray(self._environments[slot].expert_action(), np.float32) for slot in slots}

    def render(self, slots: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        return {slot: np.asarray(self._environments[slot].render()) for slot in slots}

    def _show(self, slot: int) -> None:
        assert self._board is not None
        self._board.write(slot, self._environments[slot].observe())


def main(connection: Connection, kind: type, target: str, config: Any, share: Any) -> None:
    """Build ``kind(target, config, share)`` and have it serve the parent until that closes the connection, or dies."""
    _die_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the connection
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the server's (see mmrl.workers.server)
    torch.set_num_threads(1)
    worker = _answer(connection, lambda: kind(target, config, share), lambda made: made.description)
    while worker is not None:
        try:
            command, arguments = connection.recv()
        except (EOFError, OSError):
            break
        _answer(connection, functools.partial(getattr(worker, command), *arguments), lambda result: result)
    # No exit handlers: drivers crash in them, and there is nothing to save.
    sys.stderr.flush()
    os._exit(0)


def load(target: str) -> Callable[..., Any]:
    """The class ``package.module:Name``. Raises RegistryError, with what to install, where a package is missing."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise RegistryError(
            f"{module} needs the package '{missing}', which is not installed; install it with `{install_command(missing)}`"
        ) from error


def _answer(connection: Connection, call: Callable[[], Any], shown: Callable[[Any], Any]) -> Any:
    """Send what ``shown`` makes of the call's result, or the Failure; the result, None where it failed."""
    try:
        result = call()
        reply = shown(result)
    except MMRLError as error:
        result, reply = None, Failure(str(error), user=True)
    except Exception:  # whatever a simulator throws belongs to the parent, traceback included
        result, reply = None, Failure(traceback.format_exc(), user=False)
    try:
        connection.send(reply)
    except OSError:  # the parent is gone
        os._exit(0)
    return result


def _die_with_the_parent() -> None:
    """Have the kernel kill this process when the one that forked it dies, stopped or hung as it may be (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died before the kernel was asked
            os._exit(0)
