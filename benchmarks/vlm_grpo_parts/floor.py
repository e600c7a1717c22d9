"""The floor of benchmarks/vlm_grpo.py: the passes of a step through transformers' model, and nothing else.

Generation is a pass over the questions with their pictures, then one over each token of all rows, then the same after what is
shown between turns. Learning is a pass over the questions and one over all that follows, with gradients; then the likelihood of
what was said, backward and AdamW. Tokens are random and rows of equal length, so that nothing is sampled, masked, padded or laid
out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from vlm_grpo_parts.task import Costs, Stopwatch, Task, begin, closer, question, serve

from mmrl.messages import Message
from policies.chat_parts.pieces import Heard
from policies.qwen_vl import QwenVL


class Floor:
    """See the module. Letters: P questions, B rows, L tokens."""

    def __init__(self, task: Task) -> None:
        self.task = task
        policy = QwenVL(QwenVL.Config(checkpoint=task.checkpoint), device=torch.device("cpu"))
        listen: Any = policy.ears.listen
        self.model = policy.model
        self.asked: Heard = listen((Message("user", question(0)),))[0][0]
        said = Message("assistant", ("yes",), token_ids=(policy.ears.end,))
        self.shown: Heard = listen((Message("user", question(0)), said, Message("tool", (closer(0, 1),))))[0][2]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.lr, weight_decay=0.0, fused=True)

    def step(self) -> Costs:
        with Stopwatch() as whole:
            with Stopwatch() as generating, torch.no_grad():
                self._generate()
            self._learn()
        task = self.task
        return Costs(whole.wall, whole.cpu, generating.wall, generating.cpu, task.completions * task.tokens * task.turns)

    def _generate(self) -> None:
        task = self.task
        cache, at = self._ask()
        for turn in range(task.turns):
            if turn:
                at = self._hear(cache, self.shown, task.completions, at)
            for _ in range(task.tokens):  # the last one is read with what follows it, but for the last turn's
                self.model.lm_head(self._read(cache, torch.randint(7, 500, (task.completions, 1)), at))
                at += 1

    def _learn(self) -> None:
        task = self.task
        cache, at = self._ask()
        ids = [torch.randint(7, 500, (task.completions, task.tokens)) for _ in range(task.turns)]
        said = [self._words(part) for part in ids]
        parts, positions = [], []
        for turn, words in enumerate(said):
            if turn:
                parts.append(self._sight(self.shown, task.completions))
                positions.append(self.shown.offsets + at)
                at += self.shown.span
            parts.append(words)
            positions.append((torch.arange(task.tokens) + at).expand(3, -1))
            at += task.tokens
        where = torch.cat(positions, 1)[:, None].expand(-1, task.completions, -1)
        hidden = self._pass(cache, torch.cat(parts, 1), where)
        ends = torch.cat([torch.arange(part.shape[1]) for part in parts])  # any places will do, as many as were said
        logits = self.model.lm_head(hidden[:, ends.argsort(stable=True)[: task.tokens * task.turns]])
        loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(ids, 1).flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _ask(self) -> tuple[DynamicCache, int]:
        """A cache of B rows in which their questions are, and the next position."""
        cache: Any = DynamicCache()
        self._hear(cache, self.asked, self.task.prompts, 0)
        cache.batch_repeat_interleave(self.task.group)
        return cache, self.asked.span

    def _hear(self, cache: DynamicCache, heard: Heard, rows: int, at: int) -> int:
        self._pass(cache, self._sight(heard, rows), (heard.offsets + at)[:, None].expand(-1, rows, -1))
        return at + heard.span

    def _sight(self, heard: Heard, rows: int) -> Tensor:
        """Words and pictures [rows, L, W]; a question's rows are shown the same picture."""
        words = self._words(heard.ids.expand(rows, -1))
        patches, grid = heard.pictures[0].patches, torch.tensor([heard.pictures[0].grid])
        different = self.task.prompts
        made: Any = self.model.base_model.get_image_features(
            patches.repeat(different, 1), grid.repeat(different, 1), return_dict=True
        )
        pictures = torch.stack(made.pooler_output).repeat_interleave(rows // different, 0)
        return words.masked_scatter((heard.ids == self.model.config.image_token_id)[None, :, None].expand_as(words), pictures)

    def _words(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def _read(self, cache: DynamicCache, ids: Tensor, at: int) -> Tensor:
        return self._pass(cache, self._words(ids), torch.tensor(at).expand(3, *ids.shape))

    def _pass(self, cache: DynamicCache, words: Tensor, positions: Tensor) -> Tensor:
        reader = self.model.get_decoder()
        return reader(inputs_embeds=words, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state


def main() -> None:
    floor = Floor(begin())
    serve(floor.step, {})


if __name__ == "__main__":
    main()
