"""GRPO's switches against TRL's own trainers, from rewards to the gradient of the loss.

The trainers are real ones around a tiny model, but what they would generate, be rewarded for and score is given: the same random
numbers that a rollout holds here. TRL adds 1e-4 to standard deviations and this project 1e-6, so rewards are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmrl.algorithms.grpo import GRPO
from mmrl.batching import make_batch
from mmrl.numerics.advantages import overlong_penalty
from mmrl.protocols import LossContext
from mmrl.types import EpisodeRecord, Evaluation, Packing, Rollout

P, G, J, K = 3, 4, 2, 5  # tasks, episodes of each, decisions of an episode, units of a decision
N = P * G


@dataclass
class Numbers:
    """What both sides are given; units [N, J K]."""

    rewards_N: Tensor
    mask: Tensor
    old: Tensor
    new: Tensor
    reference: Tensor
    entropy: Tensor

    @staticmethod
    def draw(mask: Tensor) -> Numbers:
        old, reference, new = (torch.randn(N, J * K, dtype=torch.float64) for _ in range(3))
        reference, new = old + 0.3 * reference, old + 0.5 * new
        rewards_N = 1e6 * torch.randn(N, dtype=torch.float64)
        return Numbers(rewards_N, mask, old, new, reference, torch.rand(N, J * K, dtype=torch.float64))

    @staticmethod
    def of_turns() -> Numbers:
        """Units in both decisions of every episode, with holes: where tools speak, or nothing is said any more."""
        mask = torch.rand(N, J * K) < 0.7
        mask[:, [0, K]] = True
        return Numbers.draw(mask)

    @staticmethod
    def of_lengths() -> Numbers:
        """Of every episode so many units, from the first on."""
        return Numbers.draw(torch.arange(J * K) < torch.randint(1, J * K + 1, (N,))[:, None])

    def rollout(self) -> Rollout:
        """Each decision a row; the last one earns the reward."""

        def rows(x_NK: Tensor) -> Tensor:
            return x_NK.unflatten(1, (J, K)).transpose(0, 1)

        zero_TB, last_TB = torch.zeros(J, N, dtype=torch.float64), torch.arange(J)[:, None].expand(J, N) == J - 1
        whole = torch.arange(N)
        return Rollout(
            trace={},
            log_probs_TBK=rows(self.old),
            mask_TBK=rows(self.mask),
            rewards_TB=torch.where(last_TB, self.rewards_N, 0),
            values_TBV=zero_TB[..., None],
            next_values_TB=zero_TB,
            valid_TB=torch.ones(J, N, dtype=torch.bool),
            terminated_TB=last_TB,
            truncated_TB=torch.zeros(J, N, dtype=torch.bool),
            task_ids_TB=(whole // G).expand(J, N),
            episodes=EpisodeRecord(whole // G, self.rewards_N, torch.ones(N), torch.full((N,), J)),
            env_steps=J * N,
            reference_log_probs_TBK=rows(self.reference),
        )


class Scorer:
    """A policy whose scores are leaves, which it scores whole episodes with."""

    def __init__(self, numbers: Numbers) -> None:
        self.log_probs, self.entropy = (x.clone().requires_grad_() for x in (numbers.new, numbers.entropy))

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()

    def evaluate(self, trace: Any) -> Evaluation:
        return Evaluation(self.log_probs, self.entropy, None)


def ours(numbers: Numbers, **fields: Any) -> tuple[Tensor, float, Tensor, Tensor]:
    """Advantages of the episodes, the loss, and its gradients by log-probabilities and by entropies."""
    algorithm, policy, rollout = GRPO(GRPO.Config(**{"group_size": G, **fields})), Scorer(numbers), numbers.rollout()
    advantages = algorithm.advantages(rollout)
    liked: Any = policy
    batch = make_batch(rollout, advantages, liked)
    context = LossContext(int(numbers.mask.sum()), int(batch.trained_NJ.sum()), N, 0)
    loss = algorithm.loss(liked, batch, context).value
    loss.backward()
    assert policy.log_probs.grad is not None
    entropy_grad = torch.zeros_like(policy.entropy) if policy.entropy.grad is None else policy.entropy.grad
    return advantages.advantages_TB[0], float(loss.detach()), policy.log_probs.grad, entropy_grad


class Given:
    """What a trainer of TRL would generate, be rewarded for and score, mixed into it."""

    def give(self, numbers: Numbers, *, turns: bool) -> None:
        self.numbers, self.turns = numbers, turns
        self.log_probs, self.entropy = (x.clone().requires_grad_() for x in (numbers.new, numbers.entropy))
        self.current_gradient_accumulation_steps = 1
        self.model: Any = self.model.train()

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """RLOO's knows no units within a completion that are not trained."""
        mask = self.numbers.mask
        lengths = [J * K] * N if self.turns else mask.sum(1).tolist()
        ids = [[2] * length for length in lengths]
        if not self.turns:
            return [[2]] * N, ids, [""] * N
        return [[2]] * N, ids, mask.long().tolist(), [""] * N, None, {}, None, None

    def _calculate_rewards(self, *_: Any) -> Tensor:
        return self.numbers.rewards_N[:, None]

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        length = input_ids.shape[1] - 1  # after a prompt of one token
        if model is not self.model:
            return self.numbers.reference[:, :length], None, None
        if not torch.is_grad_enabled():
            return self.numbers.old[:, :length], None, None
        return self.log_probs[:, :length], self.entropy[:, :length], None


Make = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture(scope="module")
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``theirs("GRPO", numbers, **config)``: TRL's trainer, which is given the numbers, and what it made of its rollout."""
    request.getfixturevalue("installed")("trl")
    import trl  # takes seconds, which nobody should wait for who runs other tests
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("trl")
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="a")), pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )
    shape = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(shape).save_pretrained(folder)  # RLOO and a KL read their reference from there
    prompts = Dataset.from_list([{"prompt": "a"}] * N)

    def make(name: str, numbers: Numbers, **config: Any) -> tuple[Any, dict[str, Any]]:
        given: Any = type("GivenTrainer", (Given, getattr(trl, f"{name}Trainer")), {})
        arguments = getattr(trl, f"{name}Config")(
            output_dir=str(folder / "run"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=N,
            num_generations=G,
            num_iterations=2,  # so that it asks for the log-probabilities at rollout
            **config,
        )
        trainer = given(
            model=LlamaForCausalLM.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        trainer.give(numbers, turns=name == "GRPO")
        return trainer, trainer._generate_and_score_completions([{"prompt": "a"}] * N)

    return make


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


LONGEST = 64
# TRL's words and this project's for the same thing.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GRPO": ({"loss_type": "grpo"}, {"reduce": "sample_mean"}),
    "mean over tokens": ({"loss_type": "bnpo"}, {"reduce": "unit_mean"}),
    "Dr.GRPO": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": LONGEST},
        {"reduce": "constant", "units_per_sample": LONGEST, "scale": "none"},
    ),
    "DAPO": ({"loss_type": "dapo", "epsilon_high": 0.5}, {"reduce": "unit_mean", "clip_high": 0.5}),
    "clip lower": ({"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.3}, {"clip_low": 0.05, "clip_high": 0.3}),
    "CISPO": ({"loss_type": "cispo", "epsilon_high": 1.5}, {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.5}),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
        {"ratio": "sequence", "reduce": "sample_mean", "clip_low": 0.05, "clip_high": 0.1},
    ),
    "dual clip": ({"loss_type": "bnpo", "delta": 1.3}, {"dual_clip": 1.3}),
    "batch std": ({"loss_type": "bnpo", "scale_rewards": "batch"}, {"scale": "batch_std"}),
    "KL per token": ({"loss_type": "bnpo", "beta": 0.3}, {"kl_weight": 0.3}),
    "KL per sample": ({"loss_type": "grpo", "beta": 0.3}, {"kl_weight": 0.3, "reduce": "sample_mean"}),
    "KL weighed by ratios": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
        {"kl_weight": 0.3, "kl_corrected": True, "reduce": "sample_mean"},
    ),
    "KL by a constant": (
        {"loss_type": "dr_grpo", "beta": 0.3, "max_completion_length": LONGEST},
        {"kl_weight": 0.3, "reduce": "constant", "units_per_sample": LONGEST},
    ),
    "KL with CISPO": (
        {"loss_type": "cispo", "epsilon_high": 3.0, "beta": 0.3},
        {"objective": "cispo", "clip_low": 1.0, "clip_high": 2.0, "kl_weight": 0.3},
    ),
    "KL with GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3},
        {"ratio": "sequence", "reduce": "sample_mean", "kl_weight": 0.3},
    ),
    "entropy": ({"loss_type": "grpo", "entropy_coef": 0.2}, {"reduce": "sample_mean", "entropy_weight": 0.2}),
}


@pytest.mark.parametrize("case", SAME)
def test_advantages_loss_and_gradient_are_trl_s(case: str, theirs: Make) -> None:
    """In samples of two decisions, which are turns with a tool's words between them to TRL."""
    numbers, (their_words, our_words) = Numbers.of_turns(), SAME[case]
    trainer, inputs = theirs("GRPO", numbers, **{"beta": 0.0, "epsilon": 0.2, "use_bias_correction_kl": False, **their_words})
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    advantages_N, our_loss, gradient, entropy_gradient = ours(numbers, **our_words)
    close(advantages_N, inputs["advantages"])
    assert our_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    close(gradient, trainer.log_probs.grad)
    assert gradient.any() and not gradient[~numbers.mask].any()
    if "entropy_weight" in our_words:
        close(entropy_gradient, trainer.entropy.grad)
    # The case says something: without its words the numbers are others.
    if case not in ("mean over tokens",):
        _, plain, plain_gradient, _ = ours(numbers)
        assert plain != pytest.approx(our_loss, rel=1e-3) or not torch.allclose(plain_gradient, gradient, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 1e5])
def test_leave_one_out_and_a_kl_in_the_reward_are_rloo_s(beta: float, theirs: Make) -> None:
    numbers = Numbers.of_lengths()
    _, inputs = theirs("RLOO", numbers, beta=beta)
    kl = {"kl_weight": beta, "kl_in": "reward", "kl_kind": "k1"} if beta else {}
    advantages_N, *_ = ours(numbers, baseline="leave_one_out", scale="none", **kl)
    close(advantages_N, inputs["advantages"])
    without_N, *_ = ours(numbers, baseline="leave_one_out", scale="none")
    assert torch.allclose(without_N, advantages_N, rtol=1e-3) is (beta == 0)


def test_the_punishment_of_long_samples_is_trl_s(installed: Callable[[str], None]) -> None:
    installed("trl")
    from trl.rewards import get_soft_overlong_punishment

    lengths = range(0, 40)
    wanted = get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=12)([[0] * length for length in lengths])
    assert overlong_penalty(torch.tensor(lengths), limit=30, buffer=12).tolist() == pytest.approx(wanted)
