"""Planted bugs in what is kept of conversations. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_KEPT, _TEXTS = "tests/core/test_keeping.py", "tests/policies/test_chat_texts.py"

KEEPING: tuple[Row, ...] = (
    (
        "keeping: what follows a turn is read beside it",
        "mmrl/keeping.py",
        "enumerate(transcript.turns, first)",
        "enumerate(transcript.turns, first + 1)",
        f"{_KEPT}::test_tokens_have_the_numbers_of_the_rollout",
    ),
    (
        "keeping: pictures of examples are counted on",
        "mmrl/keeping.py",
        'before = len(kept) if message.role == "user" and place <= transcript.begins else before',
        "before = 0",
        f"{_KEPT}::test_pictures_have_the_numbers_that_calls_name_them_by",
    ),
    (
        "keeping: a source is a place in its example",
        "mmrl/keeping.py",
        "else before + picture.source",
        "else picture.source",
        f"{_KEPT}::test_pictures_have_the_numbers_that_calls_name_them_by",
    ),
    (
        "keeping: tokens that are masked seem to carry loss",
        "mmrl/keeping.py",
        "if kept and trained else None]",
        "if kept else None]",
        f"{_KEPT}::test_tokens_have_the_numbers_of_the_rollout",
    ),
    (
        "keeping: decisions that were filtered out seem to carry loss",
        "mmrl/keeping.py",
        "bool(advantages.keep_TB[t, slot] & rollout.valid_TB[t, slot])",
        "bool(rollout.valid_TB[t, slot])",
        f"{_KEPT}::test_tokens_have_the_numbers_of_the_rollout",
    ),
    (
        "keeping: numbers of another episode",
        "mmrl/keeping.py",
        "spans_M3[place].tolist()",
        "spans_M3[0].tolist()",
        f"{_KEPT}::test_tokens_have_the_numbers_of_the_rollout",
    ),
    (
        "keeping: the group that differs least",
        "mmrl/keeping.py",
        "max(groups, key=",
        "min(groups, key=",
        f"{_KEPT}::test_who_is_chosen",
    ),
    (
        "keeping: a reply stands one place too early",
        "mmrl/keeping.py",
        "_replies(turn, len(messages) + 1)",
        "_replies(turn, len(messages))",
        f"{_KEPT}::test_calls_that_fail_say_how",
    ),
    (
        "keeping: the last iteration is forgotten",
        "mmrl/keeping.py",
        " or iteration == self._stage.iterations - 1",
        "",
        f"{_KEPT}::test_when_conversations_are_kept",
    ),
    (
        "rewarding: scores of episodes are weighted twice",
        "mmrl/rewarding.py",
        "{column.name: column.totals_M for column",
        "{column.name: column.weight * column.totals_M for column",
        f"{_KEPT}::test_a_run_keeps_the_best_and_the_worst_of_a_group",
    ),
    (
        "chat: tokens are decoded by themselves",
        "policies/chat_parts/policy.py",
        "self._decoded(ids[max(done - 1, 0) : done]), self._decoded(ids[max(done - 1, 0) : end])",
        '"", self._decoded(ids[done:end])',
        f"{_TEXTS}::test_a_tokenizer_that_drops_the_first_space_loses_none",
    ),
    (
        "chat: halves of characters are shown",
        "policies/chat_parts/policy.py",
        'whole = end == len(ids) or not text.endswith("\\N{REPLACEMENT CHARACTER}")',
        "whole = True",
        f"{_TEXTS}::test_a_character_stands_at_the_token_that_completes_it",
    ),
)
