import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrl.errors import MMRLError
from mmrl.metrics import MetricsWriter, read


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_rows_hold_what_was_given(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False, elapsed=100.0)
    writer.train("warm_start", 0, {"loss/flow": torch.tensor(0.5, dtype=torch.bfloat16), "seconds/update": 2})
    families = {"reach": {"success": 0.75, "episodes": 4, "low": 0.3, "high": 0.95}}
    writer.evaluation("warm_start", 0, "before", {"success": 0.75, "episodes": 4, "families": families, "seconds": 3.5})
    writer.train("improve", 0, {"loss/policy": -0.25})

    # the rows are there before close, because each line is flushed
    first, evaluation, second = (json.loads(line) for line in _lines(tmp_path / "run"))
    seconds = first.pop("seconds"), evaluation.pop("seconds"), second.pop("seconds")
    assert first == {"kind": "train", "stage": "warm_start", "iteration": 0, "step": 0, "loss/flow": 0.5, "seconds/update": 2.0}
    assert second == {"kind": "train", "stage": "improve", "iteration": 0, "step": 1, "loss/policy": -0.25}
    assert evaluation == {
        "kind": "evaluation",
        "stage": "warm_start",
        "iteration": 0,
        "label": "before",
        "step": 0,
        "success": 0.75,
        "episodes": 4,
        "families": families,
        "seconds/evaluate": 3.5,
    }
    assert 100.0 <= seconds[0] <= seconds[1] <= seconds[2] < 130.0
    writer.close()


def test_numbers_that_are_not_finite_stay_valid_json_and_are_counted(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.train("improve", 0, {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": 1.0})
    writer.evaluation("improve", 0, "during", {"success": 0.5, "families": {"reach": {"success": math.nan}}})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in _lines(tmp_path)]
    assert [row["nonfinite"] for row in rows] == [3, 1]
    train, evaluation = read(tmp_path)
    assert math.isnan(train["a"]) and train["b"] == math.inf and train["c"] == -math.inf and train["d"] == 1.0
    assert math.isnan(evaluation["families"]["reach"]["success"])


def test_a_resumed_run_writes_the_file_an_unbroken_run_writes(tmp_path):
    def train(writer: MetricsWriter, iterations: range) -> None:
        for iteration in iterations:
            writer.train("improve", iteration, {"loss": 1 / (iteration + 1)})

    unbroken = MetricsWriter(tmp_path / "unbroken", tensorboard=False)
    train(unbroken, range(5))

    killed = MetricsWriter(tmp_path / "killed", tensorboard=False)
    train(killed, range(2))
    position = killed.position()
    assert position == (tmp_path / "killed/metrics.jsonl").stat().st_size
    train(killed, range(2, 4))
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # killed while writing
    resumed = MetricsWriter(tmp_path / "killed", tensorboard=False, position=position, elapsed=50.0)
    train(resumed, range(2, 5))

    rows = read(tmp_path / "killed")
    assert rows[2]["seconds"] >= 50.0
    strip = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert strip == [{name: value for name, value in row.items() if name != "seconds"} for row in read(tmp_path / "unbroken")]


def test_without_a_position_rows_are_appended_after_the_last_whole_one(tmp_path):
    first = MetricsWriter(tmp_path, tensorboard=False)
    first.train("improve", 0, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"half')
    second = MetricsWriter(tmp_path, tensorboard=False)
    second.evaluation("improve", 0, "after", {"success": 1.0})
    assert [row["kind"] for row in read(tmp_path)] == ["train", "evaluation"]


@pytest.mark.parametrize(("position", "words"), [(10_000, "10000"), (7, "byte 7")])
def test_a_position_of_another_file_is_refused_and_changes_nothing(tmp_path, position, words):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.train("improve", 0, {"loss": 1.0})
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(MMRLError, match=r"metrics\.jsonl") as raised:
        MetricsWriter(tmp_path, tensorboard=False, position=position)
    assert words in str(raised.value) and "checkpoint" in str(raised.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_half_written_last_line_is_ignored_but_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read(tmp_path) == []
    path.write_text('{"kind": "train", "step": 0}\n{"kind": "train", "st')
    assert read(tmp_path) == [{"kind": "train", "step": 0}]
    path.write_text('{"kind": "train", "step": 0}\nrubbish\n{"kind": "train", "step": 1}\n')
    with pytest.raises(MMRLError, match=r"line 2 of .*metrics\.jsonl"):
        read(tmp_path)
    path.write_text("[1, 2]\n")
    with pytest.raises(MMRLError, match="line 1"):
        read(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, the disk that is always full (Linux)")
def test_a_full_disk_is_one_sentence(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer._file.close()
    writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(MMRLError, match=r"cannot write .*metrics\.jsonl: No space left on device; free some space"):
        writer.train("improve", 0, {"loss": 1.0})
    writer.close()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MMRLError, match=r"cannot write .*metrics\.jsonl: .*choose another folder"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)


def test_a_short_write_is_completed_and_a_failed_one_leaves_no_half_row(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.train("improve", 0, {"loss": 1.0})
    real = writer._file

    class Disk:
        """Takes five bytes a call, as often as ``room`` allows."""

        def __init__(self, room: int) -> None:
            self.room = room

        def write(self, data: bytes) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            self.room -= 1
            return real.write(data[:5])

        def truncate(self, size: int) -> int:
            return real.truncate(size)

    writer._file = Disk(room=1000)  # type: ignore[assignment]
    writer.train("improve", 1, {"loss": 2.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    writer._file = Disk(room=2)  # type: ignore[assignment]
    with pytest.raises(MMRLError, match="No space left"):
        writer.train("improve", 2, {"loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert [row["loss"] for row in read(tmp_path)] == [1.0, 2.0]
    assert writer.position() == len(whole)


def test_a_metric_may_not_take_a_header_name(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="'step'"):
        writer.train("improve", 0, {"step": 3.0})
    assert read(tmp_path) == []


def test_tensorboard_shows_the_same_numbers_and_resuming_purges(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.train("improve", 0, {"loss/policy": 0.25})
    position = writer.position()
    writer.train("improve", 1, {"loss/policy": 99.0})
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=True, position=position)
    writer.train("improve", 1, {"loss/policy": 0.5})
    writer.evaluation("improve", 1, "after", {"success": 0.75, "families": {"reach": {"success": 1.0}}})
    writer.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("improve/loss/policy")] == [(0, 0.25), (1, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("improve/evaluation/families/reach/success")] == [(1, 1.0)]
