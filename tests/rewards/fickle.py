"""Rewards that misbehave where a picture's prompt tells them to. Worker processes and servers import this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.component import Component
from mmrl.errors import ConfigError
from mmrl.rewards.pictures import generated, prompt_of
from mmrl.transcripts import Transcript


class Fickle:
    """The red of the upper left pixel over 255, unless the prompt says otherwise."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields."""

        refuse: bool = False
        """Whether it cannot be built."""

    def __init__(self, config: Config) -> None:
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        if config.refuse:
            raise ConfigError("there is no such model")

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Any]:
        scores = [self._score(transcript) for transcript in transcripts]
        self.terms = {"batch": float(len(transcripts)), "pid": float(os.getpid())}
        return scores

    def _score(self, transcript: Transcript) -> Any:
        image, prompt = generated(transcript), prompt_of(transcript.question)
        match prompt.split():
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hang"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["raise"]:
                raise RuntimeError("the picture is cursed")
            case ["wait", seconds]:
                time.sleep(float(seconds))
            case ["give", what]:
                return {"none": None, "text": "0.5", "inf": float("inf"), "nan": float("nan")}[what]
            case ["leave", path]:
                Path(path).touch()
            case ["mark"]:
                return transcript.mark
        assert image is not None
        return image.getpixel((0, 0))[0] / 255  # type: ignore[index]


def fickle(refuse: bool = False) -> Component:
    return Component("tests.rewards.fickle:Fickle", Fickle, Fickle.Config(refuse=refuse))
