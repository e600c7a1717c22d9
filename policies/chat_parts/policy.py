"""Policies that talk: what all families of language models share.

A decision is a turn of a conversation, its units are the tokens that the model says, and a sample is a conversation: one forward
pass scores all its turns. Tokens that stand for pictures are never drawn, and have probability 0 in scoring as well.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from mmrl.columns import Column
from mmrl.component import Component
from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.protocols import Check
from mmrl.types import Decision, Evaluation, Loss, Observation, Packing, Rollout, Talks, Trace
from policies.chat_parts.checks import checks, refuse_unpackable
from policies.chat_parts.ears import Ears, SpanWeight
from policies.chat_parts.engine import Engine, Generated, LocalEngine, Request, Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Piece, Said
from policies.chat_parts.scoring import Scores, score, spoken_in
from policies.shared.adapters import LoraOptions, add_adapters, frozen_twin, merged, without_adapters
from policies.shared.checkpoints import load_heads, load_tokenizer, save_heads
from policies.shared.heads import CriticHead
from policies.shared.vision_language import model_groups

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=STRICT)
class CriticOptions:
    """The value head: what a conversation will still earn, read from hidden states."""

    granularity: Literal["turn", "token"] = "turn"
    """What has a value: each turn, read where the model begins to speak, or each token, read where it is drawn from."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers."""
    detach: bool = True
    """Whether the value loss stops at the head instead of reaching the model."""


@dataclass(frozen=True, config=STRICT)
class SpanOptions:
    """Text that counts more, or less, when conversations are imitated (GUI-Libra, 2602.22190, weighs actions and coordinates)."""

    pattern: str
    """Regular expression over what the assistant says; ``(?s)`` lets ``.`` match line ends."""
    weight: float = Field(ge=0)
    """Of every token that overlaps a match; 1 is that of the others, and weights of several spans multiply."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatConfig:
    """Fields that all policies that talk have."""

    checkpoint: str
    """Folder or hub id of a chat model in transformers' format, with its tokenizer and chat template."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` takes only architecture and tokenizer from the checkpoint."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a turn at most; a turn that is longer is cut and takes no further part."""
    max_tokens: int = Field(default=8192, ge=2)
    """Tokens of a conversation at most, those of pictures included; one that is longer ends."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, when tokens are drawn and when they are scored again; imitation knows none."""
    train: Literal["all", "lora"] = "all"
    """Which weights learn: everything (see also ``frozen``), or low-rank adapters."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Used with ``train: lora``."""
    reference: Literal["start", "base"] = "start"
    """What a KL is measured from: the weights with which the stage began, or (``train: lora``) the model without adapters."""
    frozen: str | None = None
    """Regular expression over names of weights that do not learn with ``train: all``, such as ``.*visual.*``."""
    critic: CriticOptions | None = None
    """The value head, for algorithms that need one; null: none."""
    spans: tuple[SpanOptions, ...] = ()
    """What counts more in imitation."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    score_chunk: int = Field(default=1024, ge=1)
    """Positions whose logits over the vocabulary exist at a time when tokens are scored."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a line, in which conversations are scored end to end without padding, and none sees another; a longer one has a
    line to itself. null: those of about the same length side by side, padded. policies/README.md says which pays when."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Storage type of the weights; probabilities are computed in float32 or better in any case."""
    engine: Component | None = None
    """Another program that says what the model would say, such as ``{target: policies.vllm_engine:VllmEngine}``; null: the model
    itself does."""
    seed: int = 0
    """Seed of fresh weights."""


class ChatPolicy(nn.Module, ABC):
    """See the module. Satisfies LikelihoodPolicy, EnginePolicy, ValuePolicy, LegiblePolicy and SupervisedPolicy (of Talks)."""

    horizon, execute = 1, 1
    kind: str  # in the fingerprint

    @staticmethod
    def lacks(config: ChatConfig) -> dict[str, tuple[str, str]]:
        """What a policy of this config cannot give an algorithm: need -> (field, why); see mmrl.config."""
        return {} if config.critic else {"critic": ("critic", "is null; give the policy one, or use grpo")}

    def __init__(self, config: ChatConfig, *, device: torch.device) -> None:
        super().__init__()
        self.config, self.version = config, 0
        self.model = self._load(_DTYPES[config.dtype])
        self._tokenizer = self._load_tokenizer()
        self._freeze()
        self.model.eval()
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise MMRLError(
                f"policy.lora.modules = {config.lora.modules!r} adapts the output head, which cannot be; leave it out"
            )
        if head.bias is not None:
            raise MMRLError(f"policy.checkpoint = {config.checkpoint}: its output head has a bias, which is not supported")
        if config.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(device)
        self.network = self._network()
        spans = [SpanWeight(_compiled(span.pattern), span.weight) for span in config.spans]
        self.ears = Ears(
            self._tokenizer, self.network, self._image_id(), config.checkpoint, unsayable=self._unsayable(), spans=spans
        )
        self._build_critic()
        self.to(device)
        self.engine = self._engine()
        self.rescores = self.engine.rescores
        if config.pack_tokens is not None:
            with self.compute_mode(train=False):
                refuse_unpackable(self.network, config.checkpoint)

    # -- what a family says --------------------------------------------------------------------------------------------

    @abstractmethod
    def _load(self, dtype: torch.dtype) -> Any:
        """The model, in transformers' class."""

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.checkpoint)

    @abstractmethod
    def _network(self) -> Network:
        """How it is called."""

    def _image_id(self) -> int | None:
        """The token that stands for a piece of a picture, if there is one."""
        return None

    def _unsayable(self) -> set[int]:
        """Tokens that it must not say."""
        return set()

    # -- building ------------------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        config = self.config
        if config.reference == "base" and config.train != "lora":
            raise MMRLError(
                "policy.reference = 'base' is the model without adapters, but policy.train = 'all' has none; use reference: start"
            )
        if config.train == "lora":
            lora = config.lora
            add_adapters(self.model, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, seed=config.seed + 2)
        elif config.frozen is not None:
            pattern = _compiled(config.frozen)
            found = [parameter for name, parameter in self.model.named_parameters() if pattern.fullmatch(name)]
            if not found:
                raise MMRLError(f"policy.frozen = {config.frozen!r} fits no weight of {config.checkpoint}")
            for parameter in found:
                parameter.requires_grad_(False)

    def _sampling(self, temperature: float) -> Sampling:
        rows = self.model.get_output_embeddings().weight.shape[0]
        forbidden = sorted({token for token in self._unsayable() if token < rows} | set(range(len(self._tokenizer), rows)))
        generation: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ends: set[Any] = {self.ears.end, *(generation if isinstance(generation, list) else [generation])}
        ends.add(self._tokenizer.eos_token_id)
        return Sampling(
            temperature,
            torch.tensor(forbidden, device=self.device) if forbidden else None,
            tuple(sorted(end for end in ends if end is not None)),
        )

    def _build_critic(self) -> None:
        critic = self.config.critic
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + 1)
            self.critic = None if critic is None else CriticHead(self.network.width, critic.hidden)
        if self.config.weights == "pretrained":
            load_heads(self._heads(), self.config.checkpoint)
        if self.critic is not None:
            self.critic.to(torch.promote_types(self.model.dtype, torch.float32))

    def _heads(self) -> dict[str, tuple[str, nn.Module]]:
        """The heads in use, each with what it computes in words: a saved one is loaded where the words are the same."""
        if self.critic is None or self.config.critic is None:
            return {}
        critic = self.config.critic
        return {"critic": (f"value of {critic.granularity}s through {'x'.join(map(str, critic.hidden))}", self.critic)}

    def _engine(self) -> Engine:
        config, sampling = self.config, self._sampling(self.config.temperature)
        if config.engine is None:
            return LocalEngine(self.network, sampling)
        if not hasattr(config.engine.cls, "generate"):
            raise MMRLError(
                f"policy.engine.target = {config.engine.target}: is no engine; use policies.vllm_engine:VllmEngine or null"
            )
        return config.engine.build(
            network=self.network, sampling=sampling, tokenizer=self._tokenizer, max_tokens=config.max_tokens
        )

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        critic = [] if self.critic is None else list(self.critic.parameters())
        groups = {**model_groups(self.model), "critic": critic}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def fingerprint(self) -> str:
        critic = "".join(f" critic={says.replace(' ', '-')}" for says, _ in self._heads().values())
        return (
            f"{self.kind} {self.model.config.model_type} width={self.network.width} train={self.config.train} "
            f"parameters={sum(p.numel() for p in self.parameters())}{critic}"
        )

    @contextmanager
    def compute_mode(self, *, train: bool) -> Iterator[None]:
        """bf16 autocast on a GPU while the weights are float32; no dropout, in training neither."""
        if train:
            self.engine.forget()
            self._checkpoint(self.config.checkpointing)
        autocast = self.device.type == "cuda" and self.config.dtype == "float32"
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
                yield
        finally:
            self._checkpoint(False)

    def _checkpoint(self, on: bool) -> None:
        """transformers checkpoints layers in training mode alone; what is in them stays as it was, without dropout."""
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = on

    def train(self, mode: bool = True) -> ChatPolicy:
        """Modes change nothing: with dropout a decision could not be scored again."""
        return self

    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self.engine.forget()
        return super().load_state_dict(state, *args, **options)

    def save(self, folder: Path) -> None:
        """A folder that ``checkpoint`` opens: transformers' format (adapters merged), tokenizer, processor, heads."""
        model = merged(self.model) if self.config.train == "lora" else self.model
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        save_heads(self._heads(), folder)

    def reference(self) -> ChatPolicy:
        """A frozen twin, or (``reference: base``) one without adapters; it shares the weights that do not learn."""
        self.engine.forget()
        twin = frozen_twin(self)
        if self.config.reference == "base":
            without_adapters(twin.model)
        return twin

    def needs_statistics(self) -> bool:
        return False

    def fit_statistics(self, examples: Any) -> None:
        """There is nothing to fit."""

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        if observation.conversations is None:
            raise MMRLError(f"policy {self.kind} talks, but the environment shows no conversations; use one of mmrl.tool_use")
        heard = [self.ears.listen(conversation) for conversation in observation.conversations]
        most = [min(self.config.max_new_tokens, self.config.max_tokens - sum(map(len, pieces))) for pieces, _ in heard]
        speaking = [row for row, limit in enumerate(most) if limit > 0]
        requests = [Request(heard[row][0], heard[row][1], most[row]) for row in speaking]
        size, device = len(heard), self.device
        index = torch.tensor(speaking, dtype=torch.long, device=device)
        said_BK = torch.zeros(size, self.config.max_new_tokens, dtype=torch.long, device=device)
        count_B = torch.zeros(size, dtype=torch.long, device=device)
        log_probs_BK = torch.zeros(said_BK.shape, dtype=torch.promote_types(self.model.dtype, torch.float32), device=device)
        messages = [Message("assistant", ("",), finish="length")] * size
        values_BV = None
        if explore and self.critic is not None:
            values_BV = torch.zeros(size, self.config.max_new_tokens if self._by_token else 1, device=device)
        version = self.version
        if requests:
            with self.compute_mode(train=False):
                critic = self.critic if explore and self._by_token else None
                made = self.engine.generate(requests, draws.select(index) if explore else None, self.version, critic)
                spoken, version = self.messages(made), made.version
                self.engine.keep(spoken)
                if values_BV is not None:
                    found_BV = self._values_of(requests, made)
                    values_BV[index, : found_BV.shape[1]] = found_BV.to(values_BV.dtype)
            width = made.ids_BK.shape[1]
            said_BK[index, :width], log_probs_BK[index, :width] = made.ids_BK, made.log_probs_BK.to(log_probs_BK.dtype)
            count_B[index] = made.count_B
            for row, message in zip(speaking, spoken, strict=True):
                messages[row] = message
        mask_BK = torch.arange(said_BK.shape[1], device=device) < count_B[:, None]
        trace: Trace = {"heard": Column.of((pieces[-1] for pieces, _ in heard), device), "said": said_BK, "count": count_B}
        return Decision(Column.of(messages), trace if explore else {}, log_probs_BK, mask_BK, values_BV, version)

    def messages(self, made: Generated) -> list[Message]:
        """What was generated, as messages."""
        ids_B = [row[:count] for row, count in zip(made.ids_BK.tolist(), made.count_B.tolist(), strict=True)]
        return [
            Message(
                "assistant",
                (self.ears.text(ids[:-1] if ended else ids),),
                token_ids=tuple(ids),
                finish="stop" if ended else "length",
            )
            for ids, ended in zip(ids_B, made.ended_B.tolist(), strict=True)
        ]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each decoded behind the one before it, as some tokenizers write the first of a text otherwise."""
        texts, done = [], 0
        for end in range(1, len(ids) + 1):
            before, text = self._decoded(ids[max(done - 1, 0) : done]), self._decoded(ids[max(done - 1, 0) : end])
            whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
            texts.append(text[len(before) :] if whole else "")
            done = end if whole else done
        return texts

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def value(self, observation: Observation, draws: Draws) -> Tensor:
        if self.critic is None or observation.conversations is None:
            raise MMRLError("the policy has no critic (policy.critic is null)")
        with self.compute_mode(train=False):
            return self.critic(self._hidden(self.ears.listen(conversation)[0] for conversation in observation.conversations))

    @property
    def _by_token(self) -> bool:
        return self.config.critic is not None and self.config.critic.granularity == "token"

    def _values_of(self, requests: Sequence[Request], made: Generated) -> Tensor:
        """The critic's values of the turns, or of the tokens, just said: [B, 1] or [B, K]."""
        assert self.critic is not None
        if not self._by_token:
            hidden_BW = made.hidden_BW if made.hidden_BW is not None else self._hidden(r.pieces for r in requests)
            return self.critic(hidden_BW)[:, None]
        if made.values_BK is not None:
            return made.values_BK
        said = [Said(row[:count]) for row, count in zip(made.ids_BK.cpu(), made.count_B.tolist(), strict=True)]
        rows = [(*request.pieces, turn) for request, turn in zip(requests, said, strict=True)]
        scores = self._scores(rows, self.engine.sampling, before=True)
        assert scores.before_MW is not None
        new_M = torch.cat([torch.arange(spoken_in(row)) >= spoken_in(row[:-1]) for row in rows]).to(self.device)
        there_BK = torch.arange(made.ids_BK.shape[1], device=self.device) < made.count_B[:, None]
        values_M = self.critic(scores.before_MW[new_M])
        return values_M.new_zeros(there_BK.shape).masked_scatter(there_BK, values_M)

    def _hidden(self, heard: Iterable[tuple[Piece, ...]]) -> Tensor:
        """The hidden state in which each conversation's next turn begins: [B, W]."""
        rows = [(*pieces, _NOTHING) for pieces in heard]
        scores = self._scores(rows, self.engine.sampling)
        last_B = torch.tensor([sum(isinstance(piece, Said) for piece in row) for row in rows]).cumsum(0) - 1
        return scores.turns[last_B.to(self.device)]

    # -- scoring again -------------------------------------------------------------------------------------------------

    def _scores(self, rows: Sequence[Sequence[Piece]], sampling: Sampling, *, before: bool = False) -> Scores:
        return score(self.network, rows, sampling, self.config.score_chunk, self.config.pack_tokens, before=before)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()

    def evaluate(self, trace: Trace) -> Evaluation:
        """One pass over each conversation: log-probabilities and entropies of its tokens, zeros where nothing was said."""
        said_NJK, count_NJ, heard = trace["said"], trace["count"], trace["heard"]
        assert isinstance(said_NJK, Tensor) and isinstance(count_NJ, Tensor) and isinstance(heard, Column)
        rows = [
            _said_rows(pieces, said, counts)
            for pieces, said, counts in zip(heard.tolist(), said_NJK.cpu(), count_NJ.tolist(), strict=True)
        ]
        scores = self._scores(rows, self.engine.sampling, before=self._by_token)
        there = (torch.arange(said_NJK.shape[2], device=self.device) < count_NJ.to(self.device)[..., None]).flatten(1)

        def spread(x_M: Tensor) -> Tensor:
            return x_M.new_zeros(there.shape).masked_scatter(there, x_M)

        values_NV = None
        if self.critic is not None and self.config.critic is not None:
            hidden = scores.turns if scores.before_MW is None else scores.before_MW
            values_M = self.critic(hidden.detach() if self.config.critic.detach else hidden)
            where_NV = there if self._by_token else count_NJ.to(self.device) > 0
            values_NV = values_M.new_zeros(where_NV.shape).masked_scatter(where_NV, values_M)
        return Evaluation(spread(scores.log_probs_M), spread(scores.entropy_M), values_NV)

    # -- imitation -----------------------------------------------------------------------------------------------------

    def supervised_weight(self, examples: Talks) -> Tensor:
        return torch.tensor([sum(float(w.sum()) for w in _weights(self._study(talk))) for talk in examples.conversations])

    def supervised_loss(self, examples: Talks, generator: torch.Generator) -> Loss:
        """Cross entropy of what the assistant says, the end of its turns included, weighted by ``spans``."""
        rows = [self._study(talk) for talk in examples.conversations]
        scores = self._scores(rows, self._sampling(1.0))
        weight_M = torch.cat([weights for row in rows for weights in _weights(row)]).to(self.device)
        value = -(scores.log_probs_M * weight_M).sum() / weight_M.sum().clamp(min=1e-12)
        likely = (scores.log_probs_M.detach().exp() * weight_M).sum() / weight_M.sum().clamp(min=1e-12)
        return Loss(value, {"cross_entropy": value.detach(), "token_probability": likely})

    def _study(self, talk: tuple[Message, ...]) -> tuple[Piece, ...]:
        """The conversation's pieces, cut after the last turn that begins within ``max_tokens``; its tokens likewise."""
        kept: list[Piece] = []
        room = self.config.max_tokens
        pieces = self.ears.study(talk)
        for heard, said in zip(pieces[::2], pieces[1::2], strict=True):
            room -= len(heard)
            if room <= 0:
                break
            assert isinstance(said, Said)
            kept += [heard, Said(said.ids[:room], None if said.weights is None else said.weights[:room])]
            room -= len(said)
        if not kept:
            raise MMRLError(f"policy.max_tokens = {self.config.max_tokens}, but a conversation begins with more; raise it")
        return tuple(kept)

    def checks(self) -> Iterator[Check]:
        return checks(self)

    def example_observation(self, batch_size: int) -> Observation:
        """Conversations of one message."""
        words = ("up", "down", "left", "right")
        talks = tuple((Message("user", (" ".join(words[(b + i) % 4] for i in range(b % 3 + 1)),)),) for b in range(batch_size))
        return Observation({}, None, ("",) * batch_size, conversations=talks)


_NOTHING = Said(torch.zeros(0, dtype=torch.long))


def _said_rows(pieces: list[Heard | None], said_JK: Tensor, counts: list[int]) -> tuple[Piece, ...]:
    """A conversation's pieces; where nothing was said, what was heard before it does not count either."""
    first = pieces[0]
    assert first is not None
    turns = [
        (heard, Said(said[:count]))
        for heard, said, count in zip(pieces, said_JK, counts, strict=True)
        if heard is not None and count
    ]
    return tuple(piece for turn in turns for piece in turn) or (first,)


def _weights(pieces: tuple[Piece, ...]) -> list[Tensor]:
    said = [piece for piece in pieces if isinstance(piece, Said)]
    return [torch.ones(len(piece)) if piece.weights is None else piece.weights for piece in said]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise MMRLError(f"policy: {pattern!r} is no regular expression: {error}") from error
