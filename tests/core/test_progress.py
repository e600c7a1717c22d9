import io
import math

import pytest
from rich.console import Console

from mmrl import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_steady_pace_gives_the_exact_time_left_from_the_first_iteration_on(clock):
    pace = progress.Pace(10, clock=clock)
    assert pace.seconds_left() is None
    for done in range(1, 11):
        clock.now += 2.0
        pace.update(done)
        assert pace.seconds_left() == pytest.approx(2.0 * (10 - done))


def test_the_pace_is_smoothed_as_a_naive_weighted_mean_is(clock):
    durations = [1.0, 4.0, 2.0, 8.0]
    pace = progress.Pace(100, smoothing=0.5, clock=clock)
    for done, duration in enumerate(durations, start=1):
        clock.now += duration
        pace.update(done)
    weights = [0.5 ** (len(durations) - i) for i in range(len(durations))]
    mean = sum(w * d for w, d in zip(weights, durations, strict=True)) / sum(weights)
    assert pace.seconds_left() == pytest.approx(96 * mean)


def test_a_resumed_stage_does_not_count_the_iterations_before_it(clock):
    pace = progress.Pace(10, done=8, clock=clock)
    clock.now += 3.0
    pace.update(9)
    assert pace.seconds_left() == pytest.approx(3.0)


def test_a_log_gets_the_first_and_last_line_and_one_every_few_seconds(clock):
    stream = io.StringIO()
    lines = progress.Lines(stream, clock=clock)
    with lines.stage("improve", 20) as stage:
        for iteration in range(1, 21):
            clock.now += 1.0
            stage.update(iteration, {"success": 0.53, "env_steps_per_s": 1812.4, "loss": 0.1234})
    shown = stream.getvalue().splitlines()
    assert shown[0] == "improve  1/20  success 53.0 %  1,812 env steps/s  loss 0.123  0:19 left"
    assert [line.split()[1] for line in shown] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert shown[-1].endswith("0:00 left")


def test_a_task_reports_how_far_it_is(clock):
    stream = io.StringIO()
    lines = progress.Lines(stream, clock=clock)
    with lines.track("evaluating", 40) as advance:
        for _ in range(4):
            clock.now += 6.0
            advance(10, "reach")
    assert stream.getvalue().splitlines() == [f"evaluating  {n}/40  reach" for n in (10, 20, 30, 40)]


def test_a_terminal_shows_stage_task_and_note_and_survives_markup_in_names():
    stream = io.StringIO()
    display = progress.Live(Console(file=stream, force_terminal=True, width=160))
    with display.stage("improve [/bold]", 2) as stage:
        with display.task("evaluating", 8) as advance:
            advance(8)
        stage.update(1, {"success": math.nan})
        display.note("saved [checkpoint]")
        stage.update(2, {"success": 0.75})
    text = stream.getvalue()
    for words in ("improve [/bold]", "evaluating", "success 75.0 %", "saved [checkpoint]", "2/2"):
        assert words in text
    assert display._display is None


def test_the_display_closes_when_the_work_fails():
    stream = io.StringIO()
    display = progress.Live(Console(file=stream, force_terminal=True))
    with pytest.raises(RuntimeError), display.stage("improve", 2):
        raise RuntimeError
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_make_picks_the_display_that_suits_the_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(progress.make(io.StringIO()), progress.Lines)
    assert isinstance(progress.make(Terminal()), progress.Live)


def test_quiet_is_quiet(capsys):
    quiet = progress.Quiet()
    with quiet.stage("improve", 1) as stage, quiet.task("evaluating", 1) as advance:
        advance(1)
        stage.update(1, {})
        quiet.note("unseen")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "0:07"), (750, "12:30"), (3723, "1:02:03"), (0, "0:00")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
