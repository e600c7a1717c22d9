"""vLLM says what the model would say: all conversations of a batch at once, with what they share computed once.

The key ``policy.engine`` of a policy that talks takes it. Tokens go in and tokens come out, nothing is tokenised again. Pictures
go in as the patches that the policy cut itself, each with its name, so that vLLM encodes it once. The engine lives in the
trainer's process; before it speaks with weights that it does not have, it is given them (adapters merged), in place, and
forgets the keys, values and pictures of those before. Then a canary speaks: a prompt whose log-probabilities must have changed
where the policy's own have, and must be the policy's own but for rounding.

Log-probabilities are those of the distribution that was drawn from: at the policy's temperature, and without the tokens that it
never says. A row's tokens depend on its own seed alone, but for rounding, in which vLLM lets rows depend on their neighbours.

Departures from vLLM's own defaults: no top-k, top-p or penalties, whatever generation_config.json says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from policies.chat_parts.engine import Critic, Generated, Request, Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Said
from policies.chat_parts.scoring import score
from policies.shared.adapters import merged_weights
from policies.vllm_parts.running import Runner, sampling
from policies.vllm_parts.starting import refuse

CANARY = 16  # tokens
# How far the canary's log-probabilities may lie, on average, from the policy's own; what moves them further must move vLLM's.
GAPS = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.5}
MOVED = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@plain_dataclass(frozen=True)
class _Sung:
    """Log-probabilities of the canary's tokens, the policy's own and vLLM's: [CANARY - 1] each."""

    own: Tensor
    theirs: Tensor


class VllmEngine:
    """See the module. Built as ``cls(config, network=..., sampling=..., tokenizer=..., max_tokens=...)``.

    vLLM starts when something is to be said for the first time. Policies of the same architecture share it: a process has one.
    """

    rescores = True

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``policies.vllm_engine:VllmEngine`` block."""

        dtype: Literal["float32", "bfloat16", "float16"] | None = None
        """vLLM's weights and arithmetic; null: as the policy computes, that is its ``dtype``, but bfloat16 on a GPU."""
        gpu_memory: float = Field(default=0.4, gt=0, lt=1)
        """Share of a GPU's memory that vLLM takes for weights, keys and values; the trainer needs the rest."""
        cpu_memory_gib: float = Field(default=1.0, gt=0)
        """Memory for keys and values where there is no GPU."""
        concurrent: int = Field(default=256, ge=1)
        """Conversations in work at the same time at most; the others wait."""
        prefix_caching: bool = True
        """Whether keys and values of what conversations share, and of their earlier turns, are kept."""
        graphs: bool = True
        """Whether vLLM records CUDA graphs as it starts: slower to start, faster to speak. Of no effect on a CPU."""

    def __init__(self, config: Config, *, network: Network, sampling: Sampling, tokenizer: Any, max_tokens: int) -> None:
        self.config, self.network, self.sampling, self._tokenizer = config, network, sampling, tokenizer
        self._max_tokens = max_tokens
        self.dtype = config.dtype or _dtype(network)
        self._stale, self._holds = True, (0, ())
        self._sung: _Sung | None = None
        self._image_id: Any = getattr(network.model.config, "image_token_id", None)
        refuse(network)

    def __deepcopy__(self, memo: dict[int, Any]) -> VllmEngine:
        """Of a copy of the model: it shares vLLM, but not the weights that are there."""
        network = copy.deepcopy(self.network, memo)
        return VllmEngine(
            self.config, network=network, sampling=self.sampling, tokenizer=self._tokenizer, max_tokens=self._max_tokens
        )

    def forget(self) -> None:
        self._stale = True

    def keep(self, messages: Sequence[Message]) -> None:
        """vLLM knows by their tokens what it has heard."""

    # -- speaking ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], draws: Draws | None, version: int = 0, critic: Critic | None = None
    ) -> Generated:
        """``critic`` is not asked: vLLM shows no hidden states."""
        with torch.autocast(self.network.device.type, enabled=False):
            runner = self._runner()
            self._update(runner, version)
            runner.rules.forbidden = self.sampling.forbidden
            # vLLM divides only what it draws from by a temperature; the likeliest token's log-probability is wanted at it too.
            runner.rules.divisor = 1.0 if draws is not None else self.sampling.temperature
            seeds = None if draws is None else draws.integers(2**48).tolist()
            outputs = runner.speak(
                [runner.prompt(request.pieces, self._image_id) for request in requests],
                [self._params(request, None if seeds is None else seeds[row]) for row, request in enumerate(requests)],
            )
        return self._generated(outputs)

    def _params(self, request: Request, seed: int | None) -> Any:
        temperature = 0.0 if seed is None else self.sampling.temperature
        return sampling(
            temperature=temperature, seed=seed, max_tokens=request.limit, stop_token_ids=list(self.sampling.ends), logprobs=0
        )

    def _generated(self, outputs: Sequence[Any]) -> Generated:
        device, said = self.network.device, [output.outputs[0] for output in outputs]
        ids = [torch.tensor(list(each.token_ids), dtype=torch.long) for each in said]
        log_probs = [
            torch.tensor([tokens[token].logprob for token, tokens in zip(each.token_ids, each.logprobs, strict=True)])
            for each in said
        ]
        ended_B = torch.tensor([bool(row[-1] in self.sampling.ends) for row in [row.tolist() for row in ids]])
        count_B = torch.tensor([len(row) for row in ids])
        ids_BK, log_probs_BK = (pad_sequence(rows, batch_first=True).to(device) for rows in (ids, log_probs))
        return Generated(ids_BK, log_probs_BK, count_B.to(device), ended_B.to(device), None, self._holds[0])

    # -- vLLM, and the weights in it -------------------------------------------------------------------------------------

    def _runner(self) -> Runner:
        """vLLM as this policy needs it: the one that there is, if it fits."""
        options = self._options()
        key = json.dumps([self.network.model.config.to_dict(), type(self.network.model).__name__, options], default=str)
        if _running.get("key") != key:
            old = _running.pop("runner", None)
            _running.clear()
            if old is not None:
                old.close()
            _running.update(runner=Runner(self.network, self._tokenizer, options), key=key)
        return _running["runner"]

    def _options(self) -> dict[str, Any]:
        config, cpu = self.config, self.network.device.type == "cpu"
        memory = (
            {"kv_cache_memory_bytes": int(config.cpu_memory_gib * 2**30)}
            if cpu
            else {"gpu_memory_utilization": config.gpu_memory}
        )
        sights = {"limit_mm_per_prompt": {"video": 0}, "mm_processor_cache_gb": 0, "mm_device_do_normalize": False}
        return {
            "dtype": self.dtype,
            "max_model_len": self._max_tokens,
            "max_num_seqs": config.concurrent,
            "enable_prefix_caching": config.prefix_caching,
            "enforce_eager": cpu or not config.graphs,
            "logprobs_mode": "processed_logprobs",
            "skip_mm_profiling": True,
            **memory,
            **(sights if self.network.processor is not None else {}),
        }

    def _update(self, runner: Runner, version: int) -> None:
        """Give vLLM the weights as they are now, if it does not have them."""
        holds = version, tuple((p.data_ptr(), p._version) for p in self.network.model.parameters())
        if runner.loaded is self and not self._stale and holds == self._holds:
            return
        runner.loaded = None
        runner.load(merged_weights(self.network.model))
        self._sing(runner)
        runner.loaded, self._stale, self._holds = self, False, holds

    def _sing(self, runner: Runner) -> None:
        """The canary. Raises MMRLError where vLLM goes on as before, or computes something else than the policy does."""
        forbidden = set() if self.sampling.forbidden is None else set(self.sampling.forbidden.tolist())
        sayable = [token for token in range(self.network.head.weight.shape[0]) if token not in forbidden]
        ids = torch.tensor([sayable[(7919 * (place + 1)) % len(sayable)] for place in range(CANARY)])
        song = (self._heard(ids[:1]), Said(ids[1:]))
        own = score(self.network, [song], Sampling(1.0, None, ()), CANARY).log_probs_M.cpu()
        runner.rules.forbidden, runner.rules.divisor = None, 1.0
        prompt = runner.prompt(song, self._image_id)
        (output,) = runner.speak([prompt], [sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0)])
        pairs = zip(ids[1:].tolist(), output.prompt_logprobs[1 - CANARY :], strict=True)
        sung = _Sung(own.double(), torch.tensor([known[token].logprob for token, known in pairs]).double())
        before, self._sung = self._sung, sung
        judge(before, sung, self.dtype)

    def _heard(self, ids: Tensor) -> Heard:
        """What the canary hears: a token, and a picture if the model sees."""
        offsets = torch.zeros(self.network.axes, 1, dtype=torch.long)
        if self.network.processor is None:
            return Heard(ids, offsets, 1)
        seen = self.network.see(Picture(Image.linear_gradient("L").resize((60, 40))))
        places, span = self.network.place(seen)
        shown = torch.full((seen.tokens,), self._image_id)
        return Heard(torch.cat([ids, shown]), torch.cat([offsets, places + 1], 1), 1 + span, (seen,))


def judge(before: _Sung | None, now: _Sung, dtype: str) -> None:
    """Raise MMRLError where vLLM's canary did not move with the policy's own, or is not the same."""
    if before is not None and torch.equal(before.theirs, now.theirs) and _apart(before.own, now.own) > MOVED[dtype]:
        raise MMRLError("policy.engine: vLLM was given new weights, but speaks with the old ones; set policy.engine: null")
    gap = _apart(now.own, now.theirs)
    if not gap <= GAPS[dtype]:
        raise MMRLError(
            f"policy.engine: vLLM's log-probabilities are {gap:.2g} from the policy's own on average ({GAPS[dtype]} allowed), so "
            "it computes another model; set policy.engine: null"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def _dtype(network: Network) -> str:
    short = (torch.bfloat16,) if network.device.type == "cpu" else (torch.bfloat16, torch.float32)
    return "bfloat16" if network.model.dtype in short else "float32"


_running: dict[str, Any] = {}  # at most one of them: a second would find no memory left on a GPU
