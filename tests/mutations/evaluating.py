"""Planted bugs in how episodes are played, counted and filmed, and in ``mmrl evaluate``. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_PLAYING, _MEASURING = "tests/core/test_playing.py", "tests/core/test_measuring.py"
_COUNTING = "tests/core/test_evaluation.py::test_families_and_their_intervals"
_SAME = f"{_PLAYING}::test_rows_and_places_do_not_depend_on_num_envs"
EVALUATING: tuple[Row, ...] = (
    (
        "report: an evaluation of another task is a point of the curve",
        "mmrl/report/charts.py",
        'and not row.get("changed") ',
        "",
        "tests/core/test_report.py::test_an_evaluation_of_another_task_is_no_point_of_the_curve",
    ),
    (
        "playback: nobody knows what was changed for a measurement",
        "mmrl/playback.py",
        '{"changed": changed} if changed else {}',
        "{}",
        "tests/core/test_trainer.py::test_evaluating_a_run_again_gives_its_last_evaluation",
    ),
    (
        "playing: only the rows that run are asked about",
        "mmrl/playing.py",
        "for occupant_S in occupant_PS\n",
        "for occupant_S in torch.arange(len(task_ids_N)).split(self.act_batch)\n",
        _SAME,
    ),
    (
        "playing: a seat goes to the next in line",
        "mmrl/playing.py",
        "seat_N = task_ids_N % size",
        "seat_N = rows_N % size",
        _SAME,
    ),
    (
        "playing: random numbers belong to the slot",
        "mmrl/playing.py",
        "draws = Draws.of(self.stream, task_ids_N, decision)",
        "draws = Draws.of(self.stream, torch.arange(len(task_ids_N)), decision)",
        _SAME,
    ),
    (
        "playing: actions come back in the order of the seats",
        "mmrl/playing.py",
        "return cat(actions)[place_N]",
        "return cat(actions)[: len(place_N)]",
        "tests/core/test_evaluation.py::test_every_task_counts_once",
    ),
    (
        "playing: actions after the end are paid and counted",
        "mmrl/playing.py",
        "counts_B = valid_B & ~self.done_B",
        "counts_B = ~self.done_B",
        "tests/core/test_evaluation.py::test_every_task_counts_once",
    ),
    (
        "playing: success at the time limit is a time-out",
        "mmrl/playing.py",
        '"success" if self.success_B[slot] else "timeout" if self.truncated_B[slot] else "failure"',
        '"timeout" if self.truncated_B[slot] else "success" if self.success_B[slot] else "failure"',
        _COUNTING,
    ),
    (
        "playing: every episode without success is a time-out",
        "mmrl/playing.py",
        '"timeout" if self.truncated_B[slot] else "failure"',
        '"timeout" if self.done_B[slot] else "failure"',
        _COUNTING,
    ),
    (
        "playing: what a slot says after the end counts",
        "mmrl/playing.py",
        'torch.where(self.done_B, self.success_B, step.metrics["success"] > 0.5)',
        'step.metrics["success"] > 0.5',
        _COUNTING,
    ),
    (
        "evaluation: so many of each task are so many of one",
        "mmrl/evaluation.py",
        "for task in by_family[name][:wanted])",
        "for task in by_family[name][: wanted // len(known)])",
        "tests/core/test_evaluation.py::test_so_many_of_each_task",
    ),
    (
        "evaluation: lost episodes narrow the interval",
        "mmrl/evaluation.py",
        'wilson_interval(successes := ended.count("success"), n)',
        'wilson_interval(successes := ended.count("success"), len(played))',
        "tests/core/test_evaluation.py::test_what_the_simulator_loses_is_neither_failure_nor_time_out",
    ),
    (
        "measuring: the checkpoint of the config is measured",
        "mmrl/measuring.py",
        "changes = {_CHECKPOINT: checkpoint, **",
        "changes = {**",
        f"{_MEASURING}::test_a_run_and_its_config_give_its_last_evaluation",
    ),
    (
        "measuring: the policy keeps its random weights",
        "mmrl/measuring.py",
        '"checkpoint", {"weights": "pretrained"}',
        '"checkpoint", {"weights_": "pretrained"}',
        f"{_MEASURING}::test_a_run_and_its_config_give_its_last_evaluation",
    ),
    (
        "measuring: the run's first stage says what the environment is like",
        "mmrl/measuring.py",
        "last = run.stages[-1]",
        "last = run.stages[0]",
        f"{_MEASURING}::test_a_run_and_its_config_give_its_last_evaluation",
    ),
    (
        "measuring: videos show the first episodes",
        "mmrl/measuring.py",
        "groups[f\"{episode.family} {episode.outcome == 'success'}\"]",
        'groups[""]',
        f"{_MEASURING}::test_the_videos_show_what_was_counted_successes_and_others_of_each_task",
    ),
    (
        "measuring: results appear before they are whole",
        "mmrl/measuring.py",
        'unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")',
        "unfinished = folder",
        f"{_MEASURING}::test_again_and_with_other_num_envs_the_numbers_are_the_same "
        f"{_MEASURING}::test_what_is_interrupted_leaves_nothing",
    ),
    (
        "policies: weights that a checkpoint lacks are drawn at random",
        "policies/shared/checkpoints.py",
        "    if missing:\n",
        "    if False:\n",
        f"{_MEASURING}::test_a_checkpoint_that_lacks_weights_is_not_filled_up_at_random",
    ),
    (
        "policies: a checkpoint of another model is filled into one of pi0's own size",
        "policies/shared/checkpoints.py",
        "    if named != kind:\n",
        "    if False:\n",
        "tests/policies/test_pi0_checkpoint.py::test_a_checkpoint_of_another_model_is_refused_before_anything_is_built",
    ),
    (
        "pi0: actions of another robot are cut to size",
        "policies/pi0.py",
        "        if found > known:\n",
        "        if False:\n",
        "tests/policies/test_pi0_checkpoint.py::test_actions_of_another_robot_are_not_cut_to_size",
    ),
    (
        "trainer: a run that fails in its first evaluation stays",
        "mmrl/trainer.py",
        "        self.trained = False  # whether",
        "        self.trained = True  # whether",
        "tests/core/test_trainer.py::test_what_only_building_can_tell_ends_in_a_sentence",
    ),
    (
        "trainer: a run that fails in its second stage is removed",
        "mmrl/trainer.py",
        "                run.trained = True\n",
        "",
        "tests/core/test_trainer.py::test_what_only_building_can_tell_ends_in_a_sentence",
    ),
)
