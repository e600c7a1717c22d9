"""One vLLM engine in this process: prompts in, tokens and their log-probabilities out, and the weights of whoever speaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import mm_input, tokens_input
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor

from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Piece, Seen
from policies.vllm_parts.starting import start


@dataclass
class Rules:
    """What is done to logits before anything else: ``forbidden`` tokens get probability 0, and all are divided by ``divisor``."""

    forbidden: Tensor | None = None
    divisor: float = 1.0


class Runner:
    """vLLM's engine for one architecture. ``loaded`` names the weights that it holds; None: nobody's."""

    def __init__(self, network: Network, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self.rules = Rules()
        options = {**options, "logits_processors": [_processor(self.rules)]}
        self._llm = start(network, tokenizer, options)
        self.loaded: object = None
        self._requests = 0

    def close(self) -> None:
        """Give its memory back, so that another one can start in this process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights (under transformers' names) in place, and forget all that was computed with those before."""
        engine = self._llm.llm_engine
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        engine.collective_rpc(_repack_head)
        engine.reset_prefix_cache()
        engine.reset_encoder_cache()

    def speak(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        """vLLM's output for each prompt; all of them are in work at the same time."""
        engine, finished = self._llm.llm_engine, dict[str, Any]()
        names = [f"{self._requests + row}" for row in range(len(prompts))]
        self._requests += len(prompts)
        try:
            for name, prompt, param in zip(names, prompts, params, strict=True):
                engine.add_request(name, prompt, param)
            while engine.has_unfinished_requests():
                finished |= {output.request_id: output for output in engine.step() if output.finished}
        finally:
            engine.abort_request([name for name in names if name not in finished])
        return [finished[name] for name in names]

    def prompt(self, pieces: Sequence[Piece], image_id: int | None) -> Any:
        """A conversation as vLLM takes it once it is processed: its tokens, and its pictures in the patches that there are."""
        ids = torch.cat([piece.ids for piece in pieces]).tolist()
        pictures = [seen for piece in pieces if isinstance(piece, Heard) for seen in piece.pictures]
        if not pictures:
            return tokens_input(ids)
        items, places, at = [], [], 0
        for seen in pictures:
            at = ids.index(image_id, at)
            places.append(PlaceholderRange(offset=at, length=seen.tokens))
            items.append(self._item(seen))
            at += seen.tokens
        return mm_input(
            ids, MultiModalKwargsItems({"image": items}), {"image": [seen.key for seen in pictures]}, {"image": places}
        )

    def _item(self, seen: Seen) -> MultiModalKwargsItem:
        grid = torch.tensor([seen.grid])
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grid.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        made: Any = {"pixel_values": seen.patches, "image_grid_thw": grid}
        return MultiModalKwargsItems.from_hf_inputs(made, fields)["image"][0]


def _repack_head(worker: Any) -> None:
    """An output head that shares the words' weights has none to load, so vLLM leaves the copy alone that it packed for a CPU."""
    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def sampling(**fields: Any) -> SamplingParams:
    """Nothing but what is asked for shapes the distribution, and no text is made of tokens."""
    return SamplingParams(detokenize=False, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **fields)


def _processor(rules: Rules) -> type[LogitsProcessor]:
    """A class, as vLLM wants it, that follows ``rules``."""

    class Follow(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: Tensor) -> Tensor:
            if rules.forbidden is not None:
                logits.index_fill_(-1, rules.forbidden.to(logits.device), -torch.inf)
            return logits if rules.divisor == 1 else logits.div_(rules.divisor)

    return Follow
