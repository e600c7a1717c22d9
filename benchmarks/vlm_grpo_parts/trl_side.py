"""TRL's side of benchmarks/vlm_grpo.py: GRPOTrainer, with its own tool loop where a conversation has several turns.

A model of random weights calls no tool. So what TRL's reader of messages finds in one is set: a call, in every message but the
last. TRL then runs the tool and goes on as it would; every turn reads the whole conversation again.
"""

from __future__ import annotations

from typing import Any

import trl.trainer.grpo_trainer as trainer_module
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from vlm_grpo_parts.task import DISTINCT, Costs, Line, Stopwatch, Task, begin, closer, question, reward

STEPS = 10_000  # more than are asked for
# TRL wants a template that shows calls; in what is tokenised there are none.
_CALLS = (
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }} {{ call['function']['arguments'] | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def processor_of(folder: str) -> Any:
    """Qwen's own, without videos, for which its constructor wants torchvision."""
    made: Any = object.__new__(Qwen2_5_VLProcessor)
    made.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    made.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    made.chat_template = made.tokenizer.chat_template.replace("<|im_end|>\n{% endfor %}", _CALLS)
    made.video_processor, made.image_token, made.video_token = None, "<|image_pad|>", "<|video_pad|>"
    made.tokenizer.response_template = {"in place of it": "Reader"}  # without one TRL would look for a known template
    made.image_token_id, made.video_token_id = made.tokenizer.convert_tokens_to_ids([made.image_token, made.video_token])
    return made


def look_closer(task: int, turn: int) -> list[dict[str, Any]]:
    """Show a part of the picture.

    Args:
        task: number of the question
        turn: number of the turn
    """
    return [{"type": "image", "image": closer(task, turn).image}]


def vowels(completions: list[list[dict[str, Any]]], **_: Any) -> list[float | None]:
    said = [[message for message in talk if message["role"] == "assistant"] for talk in completions]
    return [reward("".join(str(message["content"]) for message in talk)) for talk in said]


class Timed(GRPOTrainer):
    """A trainer that says how long it generates, and how many tokens."""

    generating = Stopwatch()
    tokens = 0

    def _generate(self, prompts: list[Any]) -> Any:
        with self.generating:
            made: Any = super()._generate(prompts)
        return made

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        made = super()._generate_single_turn(*arguments, **options)
        Timed.tokens += sum(map(len, made[0]))
        return made


class Asked(TrainerCallback):
    """Makes a step when it is asked to."""

    def __init__(self, line: Line, task: Task) -> None:
        self.line, self.task = line, task
        self.trainer: Any = None
        self.whole = Stopwatch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.line.asked():
            raise SystemExit
        self.whole, Timed.generating, Timed.tokens = Stopwatch(), Stopwatch(), 0
        self.whole.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.whole.__exit__()
        spent, generating = self.whole, Timed.generating
        self.line.done(Costs(spent.wall, spent.cpu, generating.wall, generating.cpu, Timed.tokens))


class Reader:
    """In place of TRL's reader of messages: finds a call in every turn but the last."""

    def __init__(self, task: Task) -> None:
        self.task, self.read = task, 0

    def __call__(self, tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
        count, row = divmod(self.read, self.task.completions)
        step, turn = divmod(count, self.task.turns)
        self.read += 1
        message = {"role": "assistant", "content": tokenizer.decode(ids)}
        if turn + 1 == self.task.turns:
            return message
        arguments = {"task": step * self.task.prompts + row // self.task.group, "turn": turn + 1}
        return {**message, "tool_calls": [{"type": "function", "function": {"name": "look_closer", "arguments": arguments}}]}


def prompts(task: Task) -> Dataset:
    rows = []
    for number in range(DISTINCT):
        picture, text = question(number)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rows.append({"prompt": [{"role": "user", "content": content}], "image": picture.image})
    return Dataset.from_list(rows)


def build(task: Task, asked: Asked) -> Timed:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(task.checkpoint)
    known = model.config
    sampled = {
        "max_new_tokens": task.tokens,
        "min_new_tokens": task.tokens,  # every turn has as many
        # TRL forbids the first; said in a conversation that goes on, the second ends the run
        "suppress_tokens": [known.image_token_id, known.video_token_id, known.vision_start_token_id, known.vision_end_token_id],
    }
    config = GRPOConfig(
        output_dir="unused",
        per_device_train_batch_size=task.completions,
        num_generations=task.group,
        max_completion_length=task.tokens if task.turns == 1 else 1024,
        generation_kwargs=sampled,
        top_k=0,
        beta=0.0,
        loss_type="bnpo",  # the mean over the batch's tokens
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=STEPS,
        max_tool_calling_iterations=task.turns - 1 if task.turns > 1 else None,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    tools: Any = [look_closer] if task.turns > 1 else None
    return Timed(
        model=model,
        reward_funcs=vowels,
        args=config,
        train_dataset=prompts(task),
        processing_class=processor_of(task.checkpoint),
        callbacks=[asked],
        tools=tools,
    )


def main() -> None:
    task = begin()
    line = Line()
    asked = Asked(line, task)
    trainer: Any = build(task, asked)
    trainer_module.parse_response = Reader(task)  # type: ignore[assignment]
    line.ready({"parameters": sum(p.numel() for p in trainer.model.parameters())})
    trainer.train()


if __name__ == "__main__":
    main()
