"""A language or vision-language model as judge, over any endpoint that speaks OpenAI's chat completions.

Requests run at the same time, are repeated where that may help, and are kept on disk by their content: the same question is asked
once. A request that fails, or a reply without a score, is NaN and never a 0. The key comes from an environment variable; it is
sent to the endpoint and goes nowhere else: no message, file or log holds it.

A generated picture is judged with ``pictures: answer`` and a ``prompt`` of its own, such as
"Caption: {prompt}. How well does the picture show it, from 1 to 5? End with 'Score: N'." with ``low: 1`` and ``high: 5``.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

import urllib3
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.caching import Answers, cache_folder
from mmrl.errors import ConfigError
from mmrl.messages import Picture
from mmrl.rewards.asking import filled
from mmrl.rewards.pictures import generated, prompt_of
from mmrl.transcripts import Transcript

_AGAIN = (0, 408, 425, 429, 500, 502, 503, 504)  # statuses after which another try may succeed; 0: no answer
_LONGEST_PAUSE = 30.0  # seconds between two tries
Prompt = Sequence[str | Picture]

PROMPT = """Judge an answer to a question.

Question: {question}
Reference: {references}
Answer: {answer}

Does the answer say the same as the reference? Take wording and form lightly and facts strictly.
End with a line "Score: 1" if it does or "Score: 0" if it does not."""


class Judge:
    """See the module. failure: why the last request that failed did."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.rewards.judge:Judge`` block."""

        url: str
        """Address of the API up to its version, such as 'https://api.openai.com/v1' or 'http://127.0.0.1:8000/v1'."""
        model: str
        """Name of the model there."""
        key_env: str | None = None
        """Environment variable that holds the key; null: the API wants none."""
        prompt: str = PROMPT
        """What is asked; {question}, {prompt}, {references}, {answer} and {conversation} are filled in."""
        system: str | None = None
        """A system message before it."""
        pictures: Literal["none", "question", "answer", "all"] = "question"
        """Pictures that are shown: none, the question's, the last one that the policy gave, or the whole conversation's."""
        unanswered: float | None = 0.0
        """Score of a conversation without an answer, about which nobody is asked; null: it is judged like any other."""
        score: str = r"score\s*[:=]?\s*\**\s*(-?\d+(?:\.\d+)?)"
        """Regular expression whose last match in the reply gives the score as its group, whatever the case."""
        words: dict[str, float] = Field(default_factory=dict)
        """Word -> score where the group is a word, in lower case ({yes: 1, no: 0}); empty: it is a number."""
        low: float = 0.0
        """Number that becomes 0."""
        high: float = 1.0
        """Number that becomes 1; one beyond low and high counts as a failure."""
        max_tokens: int = Field(default=512, ge=1)
        """Length of a reply."""
        temperature: float = Field(default=0.0, ge=0)
        """Of the judge's sampling."""
        fields: dict[str, Any] = Field(default_factory=dict)
        """Further fields of the request, sent as they are."""
        timeout_s: float = Field(default=60.0, gt=0)
        """Time for one request."""
        retries: int = Field(default=3, ge=0)
        """Repeats after a connection that failed or an answer that says to come again."""
        backoff_s: float = Field(default=1.0, ge=0)
        """Pause before the first repeat; each further one is twice as long, or as long as the API says."""
        concurrency: int = Field(default=16, ge=1)
        """Requests that run at a time."""
        keep: bool = True
        """Whether replies with a score are kept on disk and read from there ever after."""
        cache: str | None = None
        """Folder for what is kept; null: mmrl in the user's cache folder."""

        @model_validator(mode="after")
        def _consistent(self) -> Judge.Config:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.username is not None:
                raise ValueError(
                    f"url must begin with http:// or https:// and a host, and hold no query and no user name; a key goes into "
                    f"key_env's variable (host: {parts.hostname})"
                )
            if self.low >= self.high:
                raise ValueError(f"low is {self.low:g}, which must be less than high ({self.high:g})")
            try:
                groups = re.compile(self.score).groups
            except re.error as error:
                raise ValueError(f"score is no regular expression ({error})") from error
            if groups != 1:
                raise ValueError(f"score must have one group, which is the score; it has {groups}")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        self._host = urlsplit(config.url).hostname or config.url
        self._key = _key(config, self._host)
        self._kept = Answers(cache_folder(config.cache) / "judge" if config.keep else None)
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, retries=False)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        default = self.config.unanswered
        asked = [place for place, each in enumerate(transcripts) if default is None or each.answer is not None]
        scores = [0.0 if default is None else default] * len(transcripts)
        for place, score in zip(asked, self.ask([self._prompt(transcripts[place]) for place in asked]), strict=True):
            scores[place] = score
        return scores

    def ask(self, prompts: Sequence[Prompt]) -> list[float]:
        """A score, 0 to 1, for each prompt of texts and pictures; NaN where there is none. Equal prompts are asked once."""
        bodies = [self._body(prompt) for prompt in prompts]
        names = [_name(self.config, prompt) for prompt in prompts]
        once = dict(zip(names, bodies, strict=True))
        if not once:
            return []
        with ThreadPoolExecutor(min(self.config.concurrency, len(once))) as pool:
            replies = dict(zip(once, pool.map(lambda name: self._reply(name, once[name]), once), strict=True))
        self.terms = {"from_disk": sum(reply[1] for reply in replies.values()) / len(replies)}
        return [replies[name][0] for name in names]

    def _reply(self, name: str, body: Mapping[str, Any]) -> tuple[float, bool]:
        """(score, whether it was known)."""
        kept = self._kept.get(name)
        if isinstance(kept, str):
            score = self._read(kept)
            if not math.isnan(score):
                return score, True
        text = self._request(json.dumps(body).encode())
        if text is None:
            return math.nan, False
        score = self._read(text)
        if math.isnan(score):
            self.failure = f"{self._host} replied without a score: {' '.join(text.split())[-80:]!r}"
        else:
            self._kept.put(name, text)
        return score, False

    def _read(self, text: str) -> float:
        """The score that a reply gives; NaN if it gives none."""
        config, found = self.config, re.findall(self.config.score, text, re.IGNORECASE)
        if not found:
            return math.nan
        if config.words:
            return config.words.get(found[-1].lower(), math.nan)
        try:
            share = (float(found[-1]) - config.low) / (config.high - config.low)
        except ValueError:
            return math.nan
        return share if 0 <= share <= 1 else math.nan

    def _request(self, body: bytes) -> str | None:
        """The reply's text; None, and a ``failure``, if there is none."""
        config = self.config
        for attempt in range(config.retries + 1):
            status, content, pause = self._once(body)
            if status == 200:
                return self._text(content)
            if status not in _AGAIN:
                break
            if attempt < config.retries:
                time.sleep(min(max(pause, config.backoff_s * 2**attempt), _LONGEST_PAUSE))
        self.failure = f"{self._host} {_refusal(status, config)}"
        return None

    def _once(self, body: bytes) -> tuple[int, bytes, float]:
        """(status, content, seconds that the API asks to wait); status 0: no answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.config.url.rstrip('/')}/chat/completions"
        try:
            response = self._pool.request("POST", url, body=body, headers=headers, timeout=self.config.timeout_s, redirect=False)
        except urllib3.exceptions.HTTPError:
            return 0, b"", 0.0
        wait = response.headers.get("Retry-After", "")
        return response.status, response.data, float(wait) if wait.isdigit() else 0.0

    def _text(self, content: bytes) -> str | None:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if isinstance(text, str):
            return text
        self.failure = f"{self._host} gave no chat completion; is 'url' that of an OpenAI-compatible API?"
        return None

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        config = self.config
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        content = [_image(part) if isinstance(part, Picture) else {"type": "text", "text": part} for part in prompt]
        return {
            "model": config.model,
            "messages": [*system, {"role": "user", "content": content}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            **config.fields,
        }

    def _prompt(self, transcript: Transcript) -> Prompt:
        question = transcript.question
        fields = {
            "question": "".join(part for part in question.parts if isinstance(part, str)),
            "prompt": prompt_of(question),
            "references": " or ".join(question.references),
            "answer": transcript.answer or "",
            "conversation": "\n".join(f"[{message.role}] {message.text}" for message in transcript.messages),
        }
        shown = {
            "none": [],
            "question": [part for part in question.parts if isinstance(part, Picture)],
            "answer": [Picture(image) for image in [generated(transcript)] if image is not None],
            "all": [picture for message in transcript.messages for picture in message.pictures],
        }[self.config.pictures]
        return (filled(self.config.prompt, fields), *shown)


def _key(config: Judge.Config, host: str) -> str | None:
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(f"{host} needs a key: put it into the environment variable {config.key_env}, which is not set")
    return key


def _refusal(status: int, config: Judge.Config) -> str:
    if status in (401, 403):
        where = f"the key in {config.key_env}" if config.key_env else "a request without a key; set key_env"
        return f"refuses {where} (status {status})"
    return (
        f"answered with status {status}" if status else f"did not answer within {config.timeout_s:g} s, or could not be reached"
    )


def _name(config: Judge.Config, prompt: Prompt) -> str:
    """All that a reply depends on, pictures by their content."""
    parts = [["picture", part.key] if isinstance(part, Picture) else ["text", part] for part in prompt]
    settings = [config.url, config.model, config.system, config.max_tokens, config.temperature, config.fields]
    return json.dumps([settings, parts], sort_keys=True)


def _image(picture: Picture) -> dict[str, Any]:
    file = io.BytesIO()
    picture.image.save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}}
