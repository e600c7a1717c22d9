# ruff: noqa: E501 (source lines are copied as they stand)
"""Planted bugs in stored data sets: reading, writing, their statistics, and recording episodes. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

DATA: tuple[Row, ...] = (
    (
        "data: an action late",
        "mmrl/data/lerobot.py",
        "actions_HA = frames.numbers(entry, self._config.action, time, time + real)",
        "actions_HA = frames.numbers(entry, self._config.action, min(time + 1, entry.length - real), min(time + 1, entry.length - real) + real)",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: padding is real",
        "mmrl/data/lerobot.py",
        "torch.arange(self._horizon) < real",
        "torch.arange(self._horizon) <= real",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: pictures stay in the order of the files",
        "mmrl/data/lerobot.py",
        "images[name][i] = frames.picture(entry, key, time)",
        "images[name][order.index(i)] = frames.picture(entry, key, time)",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: every frame of an episode is its first",
        "mmrl/data/lerobot_frames.py",
        "self._pictures.get((entry.index, key, frame), load)",
        "self._pictures.get((entry.index, key), load)",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: the key picture instead of the one asked for",
        "mmrl/data/lerobot_frames.py",
        "if picture.time is not None and picture.time > seconds - 0.5 / fps:",
        "if picture.time is not None:",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: a video's start is ignored",
        "mmrl/data/lerobot_frames.py",
        "seconds = span.start + float(",
        "seconds = 0 * span.start + float(",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: rows are counted from the start of the set",
        "mmrl/data/lerobot_format.py",
        "data, first - starts[data], spans, success)",
        "data, first, spans, success)",
        "tests/core/test_lerobot.py::test_every_frame_is_the_recorded_one",
    ),
    (
        "data: the last episode of a range is taken",
        "mmrl/data/lerobot_format.py",
        "<= e.index < (int(last)",
        "<= e.index <= (int(last)",
        "tests/core/test_lerobot.py::test_frames_are_drawn_uniformly_and_only_from_chosen_episodes",
    ),
    (
        "data: failures are drawn too",
        "mmrl/data/lerobot.py",
        "return bool(frames.numbers(entry, SUCCESS).any())",
        "return True",
        "tests/core/test_lerobot.py::test_frames_are_drawn_uniformly_and_only_from_chosen_episodes",
    ),
    (
        "data: long videos are taken for theirs",
        "mmrl/data/lerobot_frames.py",
        "if frames and (frames < wanted or (frames > wanted and self.data.one_episode_per_file)):",
        "if frames and frames < wanted:",
        "tests/core/test_lerobot_damage.py::test_damage_is_a_sentence_with_file_and_episode",
    ),
    (
        "data: the generator is not restored",
        "mmrl/data/lerobot.py",
        'self._generator.set_state(state["generator"])',
        "pass",
        "tests/core/test_lerobot.py::test_a_source_goes_on_from_its_state",
    ),
    (
        "data: the cache never forgets",
        "mmrl/data/lerobot_frames.py",
        "while self.size > self._budget and len(self._values) > 1:",
        "while False:",
        "tests/core/test_lerobot.py::test_the_cache_forgets_what_was_used_longest_ago",
    ),
    (
        "data: batches weigh the same whatever their size",
        "mmrl/data/running.py",
        "self.mean_D += delta_D * (added / total)",
        "self.mean_D += delta_D / 2",
        "tests/core/test_running.py::test_moments_are_numpy_s",
    ),
    (
        "data: quantiles without interpolation",
        "mmrl/data/running.py",
        "return low + share * (high - low)",
        "return low",
        "tests/core/test_running.py::test_quantiles_are_numpy_s",
    ),
    (
        "data: negative numbers sort backwards",
        "mmrl/data/running.py",
        "torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))",
        "bits ^ (1 << 31)",
        "tests/core/test_running.py::test_quantiles_of_many_and_of_ties",
    ),
    (
        "data: videos begin where the last one ended",
        "mmrl/data/lerobot_write.py",
        '"crf": str(self._config.crf)}\n        self._frames = 0\n',
        '"crf": str(self._config.crf)}\n',
        "tests/core/test_lerobot_write.py::test_large_sets_are_spread_over_files",
    ),
    (
        "data: success everywhere",
        "mmrl/data/lerobot_write.py",
        "SUCCESS: last_T & episode.success",
        "SUCCESS: last_T",
        "tests/core/test_lerobot_write.py::test_the_description_is_lerobot_s",
    ),
    (
        "data: a failure leaves its folder",
        "mmrl/data/lerobot_write.py",
        "            self._close()\n        shutil.rmtree(self._writing, ignore_errors=True)\n",
        "            self._close()\n",
        "tests/core/test_lerobot_write.py::test_nothing_is_left_of_a_failure",
    ),
    (
        "data: what is seen after the action is recorded",
        "mmrl/collecting.py",
        "            step = environment.step(action_B1A)\n",
        "            step = environment.step(action_B1A)\n            observation = step.observation\n",
        "tests/core/test_collecting.py::test_every_moment_is_recorded_and_nothing_after_the_end",
    ),
    (
        "data: idle slots are recorded",
        "mmrl/collecting.py",
        "own = [moment for moment in moments if bool(moment.valid_B[slot])]",
        "own = moments",
        "tests/core/test_collecting.py::test_every_moment_is_recorded_and_nothing_after_the_end",
    ),
)
