"""vLLM in the place of the policy's own generation, on tiny models of the families that test_vllm_engine.py leaves out.

vLLM starts once for each. What does not depend on the family is tested there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmrl.component import Component
from mmrl.errors import MMRLError
from policies.qwen_vl import QwenVL
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_play import play
from tests.policies.vllm_play import TALKS, VLLM, change, gap, ids_of

# Family -> weights of which each is used in another place: as they change, so must what vLLM says.
PARTS = {
    "qwen2_vl": ("visual.patch_embed", "visual.merger", "self_attn", "embed_tokens"),
    "qwen3_vl": (
        "visual.pos_embed",
        "visual.merger",
        "deepstack_merger_list.0",
        "deepstack_merger_list.1",
        "k_norm",
        "embed_tokens",
    ),
}


@pytest.fixture(scope="module")
def build(installed: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A policy of a family, whose heads are as wide as vLLM's on a CPU are; it ends its turn after some of its tokens."""
    installed("vllm")

    def make(family: str, engine: dict[str, Any] | None = VLLM) -> Any:
        folder = tiny_chat.write(tmp_path_factory.mktemp(family), family, head=32)
        config = QwenVL.Config(
            checkpoint=str(folder),
            weights="random",
            max_new_tokens=10,
            max_tokens=512,
            temperature=0.8,
            engine=None if engine is None else Component.parse(engine),
        )
        return chat_play.quick(QwenVL(config, device=tiny_chat.CPU))

    return make


@pytest.fixture(scope="module", params=PARTS)
def policy(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Any:
    made = build(request.param)
    made.family = request.param
    return made


@pytest.fixture
def weights(policy: Any) -> Iterator[None]:
    """A test may change them: they are put back."""
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    yield
    policy.load_state_dict(before)


def test_drawn_tokens_have_the_policy_s_own_log_probs(policy: Any) -> None:
    """Three turns, after pictures in the question and in the results of tools."""
    policy.version = 3
    played = play(policy, TALKS)
    assert gap(policy, played) < 1e-4
    assert all(decision.policy_version == 3 for decision in played.decisions)
    assert not torch.isin(
        torch.cat([d.trace["said"].flatten() for d in played.decisions]), policy.engine.sampling.forbidden
    ).any()


def test_the_likeliest_tokens_are_the_local_engine_s(policy: Any, build: Callable[..., Any]) -> None:
    local = build(policy.family, engine=None)
    local.load_state_dict(policy.state_dict())
    theirs, ours = play(policy, TALKS, explore=False), play(local, TALKS, explore=False)
    assert ids_of(theirs) == ids_of(ours)
    for a, b in zip(theirs.decisions, ours.decisions, strict=True):
        torch.testing.assert_close(a.log_probs_BK, b.log_probs_BK, rtol=0, atol=1e-4)


def test_vllm_is_told_where_each_picture_stands(policy: Any) -> None:
    """Every image token lies in the place of one picture, which has as many as the picture becomes."""
    for pieces in play(policy, TALKS).rows():
        prompt = policy.engine._runner().prompt(pieces, policy.model.config.image_token_id)
        places = prompt.get("mm_placeholders", {}).get("image", [])
        inside = [place for each in places for place in range(each.offset, each.offset + each.length)]
        image = policy.model.config.image_token_id
        assert inside == [place for place, token in enumerate(prompt["prompt_token_ids"]) if token == image]
        assert [each.length for each in places] == [seen.tokens for piece in pieces for seen in getattr(piece, "pictures", ())]


def test_every_part_of_new_weights_arrives_in_place(policy: Any, weights: None) -> None:
    """After each change the canary sings as the policy does, or this would end with an error; pictures are encoded again."""
    talks, runner = [tiny_chat.opening(7, 2)], policy.engine._runner()
    for part in PARTS[policy.family]:
        before = play(policy, talks, turns=1)
        change(policy, part)
        policy.version += 1
        assert gap(policy, before) > 1e-3, part
        after = play(policy, talks, turns=1)
        assert gap(policy, after) < 1e-4, part
        assert after.decisions[0].policy_version == before.decisions[0].policy_version + 1
    assert policy.engine._runner() is runner, "without a restart"


def test_the_canary_hears_of_every_part(policy: Any, weights: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of which a part does not arrive are refused, whichever it is: the canary sees a picture."""
    runner = policy.engine._runner()
    load = type(runner).load
    for part in PARTS[policy.family]:
        monkeypatch.setattr(runner, "load", lambda given, part=part: load(runner, [(n, w * (part not in n)) for n, w in given]))
        policy.engine.forget()
        with pytest.raises(MMRLError, match=r"policy\.engine: vLLM's log-probabilities are .* so it computes another model"):
            play(policy, TALKS[:1], turns=1)


def test_check_policy_tries_the_engine(policy: Any) -> None:
    assert [check for check in policy.checks() if not check.ok] == []
