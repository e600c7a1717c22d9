"""What is counted in conversations, by hand, and the alarm when a policy gives up its tools."""

from __future__ import annotations

import pytest

from mmrl.conversing import Talk, ToolWatch, summary, talk_metrics
from mmrl.evaluation import result_of
from mmrl.playback import result_table
from mmrl.playing import Played
from tests.rewards.tales import question, said, tale, used

BOX = (10, 10, 30, 30)
ABOUT = question(box=BOX)
CUT, OFF, LATE = used("crop", box=BOX), used("crop", box=(50, 50, 60, 60)), said("crop", error="timeout", seconds=1.0)
TALES = [
    tale([CUT], [OFF, LATE], about=ABOUT, tokens=10),  # 3 turns, 3 calls, faithful and right
    tale([OFF], about=ABOUT, tokens=4),  # 2 turns, 1 call, right without the evidence
    tale([CUT], about=ABOUT, answer="no", tokens=4),  # faithful and wrong
    tale(answer=None, ended="length", tokens=6),  # 1 turn, nothing
    tale([said("", error="malformed"), said("xyz", error="unknown_tool")], tokens=0),  # right, evidence not known
]


def test_the_numbers_of_conversations() -> None:
    metrics = talk_metrics(TALES)
    assert metrics == pytest.approx(
        {
            "agent/tool_rate": 4 / 5,
            "agent/calls": 7 / 5,
            "agent/turns": 10 / 5,
            "agent/tokens_per_turn": (30 + 8 + 8 + 6) / 10,
            "agent/answered": 4 / 5,
            "agent/truncated": 1 / 5,
            "agent/tool_success_rate": 4 / 7,
            "agent/faithful_rate": 1 / 2,
            "agent/seconds/crop": (4 * 0.25 + 1.0) / 5,
            "agent/errors/malformed": 1.0,
            "agent/errors/timeout": 1.0,
            "agent/errors/unknown_tool": 1.0,
        }
    )


def test_rates_of_nothing_are_left_out() -> None:
    assert talk_metrics([]) == {} and summary([]) == {}
    assert not {"agent/tool_success_rate", "agent/faithful_rate"} & talk_metrics([tale()]).keys()


def test_an_evaluation_shows_how_tools_were_used() -> None:
    played = [
        Played(task, "ab"[task > 2], "", "success" if talk.mark == 1 else "failure", talk.mark, 1, Talk.of(talk))
        for task, talk in enumerate(TALES)
    ]
    result = result_of(played, 1.0)
    assert result.talk["tool_rate"] == pytest.approx(0.8) and result.families["a"].talk["tool_rate"] == 1
    row = result.row()
    assert row["faithful_rate"] == pytest.approx(0.5) and row["families"]["b"]["tool_rate"] == 0.5
    assert "talk" not in row and "faithful_rate" not in row["families"]["b"]
    assert result.sentence().endswith("; tool rate 80.0%; faithful rate 50.0%")
    assert played[0].row()["calls"] == 3 and played[0].row()["faithful"] is True and played[3].row()["answered"] is False
    columns = {str(column.header): list(column.cells) for column in result_table(result, "t").columns}
    assert columns["tool rate"] == ["100.0%", "50.0%", "80.0%"] and columns["faithful rate"] == ["50.0%", "-", "50.0%"]
    plain = result_of([Played(0, "a", "", "success", 1.0, 1)], 1.0)
    assert "tool" not in plain.sentence() and "tool_rate" not in plain.row() and "calls" not in plain.played[0].row()
    assert Played(0, "a", "", "success", 1.0, 1, Talk.of(TALES[0])) == plain.played[0]


def alarms(watch: ToolWatch, *rates: float) -> list[int]:
    return [place for place, rate in enumerate(rates) if watch.see(rate)]


def test_the_alarm_is_raised_once_for_a_collapse() -> None:
    # Means over five: 0.9 at the end of the rise; 0.9, 0.72, 0.54, 0.36, 0.18 as tools are given up.
    assert alarms(ToolWatch(), *[0.9] * 5, *[0.0] * 9) == [8]
    assert alarms(ToolWatch(), *[0.9] * 5, *[0.0, 0.9] * 9) == []
    assert alarms(ToolWatch(), *[0.3] * 5, *[0.11] * 9) == []  # 0.11 is more than a third
    assert alarms(ToolWatch(), *[0.3] * 5, *[0.09] * 9) == [9]
    assert alarms(ToolWatch(), *[0.0] * 20) == [] and alarms(ToolWatch(), 0.9, 0, 0, 0) == []


def test_after_a_recovery_it_is_raised_again() -> None:
    low, high = [0.0] * 5, [0.9] * 5
    assert alarms(ToolWatch(), *high, *low, *high, *low) == [8, 18]
    assert alarms(ToolWatch(), *high, *low, *[0.45] * 5, *low) == [8]  # back at a half is no recovery


def test_the_watch_goes_on_where_it_was() -> None:
    rates = [0.9] * 5 + [0.0] * 9
    for cut in range(len(rates)):
        first, second = ToolWatch(), ToolWatch()
        found = alarms(first, *rates[:cut])
        second.restore(first.state())
        assert found + [cut + place for place in alarms(second, *rates[cut:])] == [8]
    assert ToolWatch().see(None) is None
    watch = ToolWatch()
    sentence = [watch.see(rate) for rate in rates][8]
    assert sentence is not None and "18% of the conversations of the last 5 rollouts" in sentence and "90%" in sentence
