"""Planted bugs in the environment of image generators, its prompts and its readers of scenes. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_PICTURING, _PROMPTS, _SHAPES = (
    "tests/core/test_picturing.py",
    "tests/simulators/test_image_prompts.py",
    "tests/rewards/test_shapes.py",
)
_PIECES = "tests/core/test_pieces.py"
_SCENES, _READING = "simulators/image_prompts_parts/scenes.py", "mmrl/rewards/shape_reading.py"

PICTURING: tuple[Row, ...] = (
    (
        "picturing: the watch is paid as well",
        "mmrl/picturing.py",
        "block.weight * named[block.name] for block, _ in self._rewards if block.weight)",
        "(block.weight or 1) * named[block.name] for block, _ in self._rewards)",
        f"{_PICTURING}::test_a_picture_earns_the_weighted_sum_and_the_watch_nothing",
    ),
    (
        "picturing: a picture without a score counts as worth nothing",
        "mmrl/picturing.py",
        "lost_B = torch.tensor([slot.lost for slot in self._slots], device=self.device)",
        "lost_B = torch.tensor([False for slot in self._slots], device=self.device)",
        f"{_PICTURING}::test_what_could_not_be_scored_is_lost_only_if_it_counts",
    ),
    (
        "picturing: scores go to the first slots",
        "mmrl/picturing.py",
        "by_slot = dict(zip(shown, zip(*scores, strict=True), strict=True))",
        "by_slot = dict(enumerate(zip(*scores, strict=True)))",
        f"{_PICTURING}::test_a_message_without_a_picture_earns_nothing_and_is_not_scored "
        f"{_PICTURING}::test_slots_are_reset_apart",
    ),
    (
        "picturing: what is over is painted again",
        "mmrl/picturing.py",
        "if running.paid is None and message is not None:",
        "if message is not None:",
        f"{_PICTURING}::test_a_picture_earns_the_weighted_sum_and_the_watch_nothing",
    ),
    (
        "picturing: scoring does not begin before it is waited for",
        "mmrl/picturing.py",
        "{place: each.begin(transcripts) for place, each in apart.items()}",
        "{place: lambda each=each: each.begin(transcripts)() for place, each in apart.items()}",
        f"{_PICTURING}::test_scoring_begins_with_the_step_and_is_waited_for_at_its_end",
    ),
    (
        "picturing: scores of the last piece come first",
        "mmrl/picturing.py",
        "for each in handed if place in each.waits",
        "for each in handed[::-1] if place in each.waits",
        f"{_PIECES}::test_pieces_scored_apart_are_the_rollout_of_one_thing_after_the_other",
    ),
    (
        "rollout: all pieces are drawn before one is handed in",
        "mmrl/rollout.py",
        "            for rows in running:\n",
        "            for rows in (torch.cat(running),):\n",
        f"{_PIECES}::test_slots_that_do_not_run_are_not_acted_for",
    ),
    (
        "rollout: a piece is handed in for the slots of another",
        "mmrl/rollout.py",
        "environment.hand_in(action, rows_N)",
        "environment.hand_in(action, rows_N.flip(0))",
        f"{_PIECES}::test_pieces_scored_apart_are_the_rollout_of_one_thing_after_the_other",
    ),
    (
        "diffusion: pictures are decoded before the policy goes on",
        "policies/diffusion.py",
        "        return lambda: replace(undrawn, action=self._drawn(walk.clean))\n",
        "        drawn = replace(undrawn, action=self._drawn(walk.clean))\n        return lambda: drawn\n",
        f"{_PIECES}::test_diffusion_decodes_while_it_denoises_and_draws_the_same",
    ),
    (
        "playing: an answer goes to another seat's slot",
        "mmrl/playing.py",
        "seat_M = place_N[there_N] % self.act_batch",
        "seat_M = place_N[there_N].flip(0) % self.act_batch",
        f"{_PIECES}::test_an_evaluation_scores_while_it_draws_and_gives_the_same",
    ),
    (
        "playing: the metrics of an episode are those of its slot's next one",
        "mmrl/playing.py",
        "torch.where(self.done_B, self.metrics.get(name, value_B), value_B)",
        "value_B.flip(0)",
        f"{_PICTURING}::test_an_evaluation_is_the_same_whatever_plays_beside_an_episode",
    ),
    (
        "evaluation: episodes that were lost have metrics",
        "mmrl/evaluation.py",
        "metrics=_means([episode.metrics for episode in counted])",
        "metrics=_means([episode.metrics for episode in played])",
        f"{_PICTURING}::test_means_are_over_the_episodes_that_count_and_have_a_number",
    ),
    (
        "scenes: mirrored positions are other scenes",
        _SCENES,
        "first, where, second = second, OPPOSITE[where], first",
        "first, where, second = second, where, first",
        f"{_PROMPTS}::test_what_is_held_out_training_never_asks_and_each_part_of_it_is_trained",
    ),
    (
        "scenes: a part is never trained",
        _SCENES,
        "and all((at, part) in others for at, part in enumerate(combination))",
        "",
        f"{_PROMPTS}::test_nothing_is_held_out_that_would_then_not_be_trained_at_all",
    ),
    (
        "scenes: above is below",
        _SCENES,
        'return boxes if where in ("right of", "below") else boxes[::-1]',
        'return boxes if where in ("right of", "above") else boxes[::-1]',
        f"{_PROMPTS}::test_every_scene_is_what_its_prompt_says",
    ),
    (
        "scenes: two shapes may touch",
        _SCENES,
        "_gap(*boxes) >= GAP:",
        "True:",
        f"{_PROMPTS}::test_every_scene_is_what_its_prompt_says",
    ),
    (
        "prompt files: lines are counted from 0",
        "simulators/image_prompts_parts/files.py",
        "enumerate(raw, 1)",
        "enumerate(raw)",
        f"{_PROMPTS}::test_a_bad_line_is_named",
    ),
    (
        "prompt files: the split depends on where a line stands",
        "simulators/image_prompts_parts/files.py",
        'hashlib.blake2b(f"{seed}:".encode() + data.strip(), digest_size=7)',
        'hashlib.blake2b(f"{seed}:{number}:".encode() + data.strip(), digest_size=7)',
        f"{_PROMPTS}::test_lines_are_split_by_what_they_say",
    ),
    (
        "shape reading: runs that only meet at a corner are connected",
        _READING,
        "if spans[other][1] < last and first < spans[other][2]:",
        "if spans[other][1] <= last and first <= spans[other][2]:",
        f"{_SHAPES}::test_pieces_are_what_is_connected",
    ),
    (
        "shape reading: everything is some shape",
        _READING,
        "if near <= NEAR else",
        "if True else",
        f"{_SHAPES}::test_what_is_no_shape_is_no_thing",
    ),
    (
        "shape reading: boxes are those of the shrunk picture",
        _READING,
        "tuple(edge * shrink for edge in box)",
        "tuple(edge for edge in box)",
        f"{_SHAPES}::test_boxes_are_in_pixels_of_the_picture",
    ),
    (
        "picturing: a reward that only watches pays",
        "mmrl/picturing.py",
        "return any(reward.weight for reward in config.rewards)",
        "return bool(config.rewards)",
        "tests/core/test_picturing.py::test_a_stage_that_would_learn_from_no_reward_is_refused",
    ),
    (
        "config: what a stage changes of the rewards is not looked at",
        "mmrl/config.py",
        "cls.pays(environment.override(changes).config)",
        "cls.pays(environment.config)",
        "tests/core/test_picturing.py::test_a_stage_that_would_learn_from_no_reward_is_refused",
    ),
    (
        "shape match: what else is in the picture does not matter",
        "mmrl/rewards/shape_match.py",
        ".exact and len(things) == asked)",
        ".exact)",
        f"{_SHAPES}::test_the_watch_wants_nothing_else_in_the_picture",
    ),
    (
        "shapes: what cannot be judged is a silent 0",
        "mmrl/rewards/shapes.py",
        "scores.append(math.nan)",
        "scores.append(0.0)",
        f"{_SHAPES}::test_what_cannot_be_judged_is_no_number_and_says_why",
    ),
    (
        "conversations: a caption belongs to a picture of any kind",
        "mmrl/data/conversations.py",
        "other is not transcript and other.question.family == transcript.question.family]",
        "other is not transcript]",
        "tests/core/test_picturing.py::test_a_share_of_captions_may_belong_to_another_picture",
    ),
)
