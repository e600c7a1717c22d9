"""What rewards say of the scripted experts of the questions that ship, who use tools as they should, and of those who do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmrl.columns import Column
from mmrl.component import validate
from mmrl.messages import Message
from mmrl.rewards.code_vision import CodeVision
from mmrl.rewards.evidence import faithful
from mmrl.rewards.faithful import Faithful
from mmrl.tool_use import ToolEnvironment
from mmrl.transcripts import Transcript

CPU = torch.device("cpu")
IMAGE_TOOLS = ["tools.crop:crop", "tools.rotate:rotate", "tools.flip:flip"]
DETAIL = {"target": "simulators.prompts:DetailQuestions", "turned": ["rotate_90", "rotate_180", "rotate_270"]}
ORIENTATION = {"target": "simulators.prompts:OrientationQuestions", "upright": 0.0}


def played(questions: dict[str, Any], message: str | None = None, tasks: int = 12) -> list[Transcript]:
    """The expert's conversations, or those of a policy that says ``message`` and then a wrong answer."""
    config = validate(ToolEnvironment.Config, {"questions": questions, "tools": IMAGE_TOOLS})
    environment = ToolEnvironment(config, num_envs=tasks, device=CPU)
    try:
        environment.reset(torch.arange(tasks))
        for turn in range(config.max_turns):
            said = environment.expert_action()
            if message is not None:
                text = message if turn == 0 else "I cannot say"
                said = Column.of([Message("assistant", (text,))] * tasks)
            environment.step(said)
        return [environment.transcript(slot) for slot in range(tasks)]
    finally:
        environment.close()


@pytest.mark.parametrize("questions", [DETAIL, ORIENTATION])
def test_an_expert_is_faithful_and_uses_what_is_expected(questions: dict[str, Any]) -> None:
    tales = played(questions)
    assert [tale.mark for tale in tales] == [1] * len(tales) and all(tale.calls for tale in tales)
    assert [faithful(tale) for tale in tales] == [True] * len(tales)
    assert Faithful(Faithful.Config())(tales) == [1] * len(tales)
    reward = CodeVision(CodeVision.Config(form=0.0))
    reward(tales)
    assert reward.terms["exact"] == pytest.approx(0.1) and reward.terms["usage"] == reward.terms["spurious"] == 0
    # A turn counts as a whole, a crop by its IoU with the sign, around which an expert leaves room.
    assert reward.terms["mandatory"] == 1 if questions is ORIENTATION else 0.5 < reward.terms["mandatory"] < 1


@pytest.mark.parametrize(
    ("questions", "call"),
    [
        (DETAIL, '{"name": "crop", "arguments": {"image": 1, "box": [0, 0, 8, 8]}}'),
        (DETAIL, '{"name": "rotate", "arguments": {"image": 1, "degrees": 45}}'),
        (DETAIL, '{"name": "crop", "arguments": {"image": 1, "box": [0, 0, 96, 96]}}'),
        (ORIENTATION, '{"name": "crop", "arguments": {"image": 1, "box": [0, 0, 9, 9]}}'),
        (ORIENTATION, '{"name": "rotate", "arguments": {"image": 1, "degrees": 45}}'),
    ],
)
def test_another_call_is_not_faithful(questions: dict[str, Any], call: str) -> None:
    tales = played(questions, f"<tool_call>\n{call}\n</tool_call>")
    assert all(tale.calls for tale in tales) and [faithful(tale) for tale in tales] == [False] * len(tales)
    assert max(Faithful(Faithful.Config())(tales)) < 0.8
