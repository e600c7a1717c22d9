"""Planted bugs in what is kept of generated pictures and in what the report shows of them. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_PAGE, _KEPT, _PLAYED = (f"tests/core/test_{name}.py" for name in ("report_pictures", "keeping", "playing"))

PICTURES_KEPT: tuple[Row, ...] = (
    (
        "playing: conversations are kept between iterations",
        "mmrl/playing.py",
        "if told.shown or not reel.pictures_alone:",
        "if True:",
        f"{_KEPT}::test_between_iterations_conversations_are_not_written_down",
    ),
    (
        "playing: films are made between iterations",
        "mmrl/playing.py",
        "_RECORDERS[:1] if reel is not None and reel.pictures_alone else _RECORDERS",
        "_RECORDERS",
        f"{_PLAYED}::test_between_iterations_nothing_is_filmed",
    ),
    (
        "trainer: an evaluation between iterations keeps other prompts",
        "mmrl/trainer.py",
        "filmed=self._filmed,",
        "filmed=None,",
        f"{_PAGE}::test_every_evaluation_keeps_pictures_of_the_same_prompts",
    ),
    (
        "keeping: the group is the whole rollout",
        "mmrl/keeping.py",
        "episodes.returns_M[episodes.task_ids_M == task].double()",
        "episodes.returns_M.double()",
        f"{_KEPT}::test_a_group_that_was_answered_with_pictures_says_what_it_earned",
    ),
    (
        "keeping: tiny pictures lose their colours",
        "mmrl/keeping.py",
        "(True,) if max(image.size) <= TINY else (True, False)",
        "(False,)",
        f"{_KEPT}::test_tiny_pictures_lose_nothing",
    ),
)

PICTURES_SHOWN: tuple[Row, ...] = (
    (
        "report: an evaluation that repeats another is shown again",
        "mmrl/report/pictures.py",
        "if not repeats or",
        "if True or",
        f"{_PAGE}::test_an_evaluation_that_only_repeats_the_one_before_it_is_left_out",
    ),
    (
        "report: the worst picture is called the best",
        "mmrl/report/pictures.py",
        "else -shot.earned",
        "else shot.earned",
        f"{_PAGE}::test_groups_show_the_best_and_the_worst_and_what_they_were_worth",
    ),
    (
        "report: evaluations of a stage in the order of their names",
        "mmrl/report/pictures.py",
        "known = _LABELS.get(shot.label, len(_LABELS))",
        "known = 0",
        f"{_PAGE}::test_the_grid_shows_prompts_by_evaluations_with_their_scores",
    ),
    (
        "report: a record reaches outside its folder",
        "mmrl/report/pictures.py",
        'if file.suffix not in MIME or file.is_absolute() or ".." in file.parts:',
        "if file.suffix not in MIME:",
        f"{_PAGE}::test_damaged_pictures_are_counted_and_the_others_shown",
    ),
    (
        "report: a score that a stage names seems to watch",
        "mmrl/report/trained.py",
        'str(block.get("score", _name(block)))',
        "_name(block)",
        f"{_PAGE}::test_which_scores_something_is_trained_on",
    ),
    (
        "report: trained scores and watched ones change places",
        "mmrl/report/charts.py",
        "trained is not None and name not in trained",
        "trained is not None and name in trained",
        f"{_PAGE}::test_scores_of_evaluations_share_a_chart_that_says_which_only_watch",
    ),
)
