"""Bugs to plant in what policies that talk are made of; rows as in beyond_numerics.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_PARTS, _POLICY = "policies/chat_parts", "policies/chat_parts/policy.py"
_LIKELIHOOD, _PIECES = "tests/policies/test_qwen_vl_likelihood.py", "tests/policies/test_qwen_vl_pieces.py"
_TRAINING, _TEXT = "tests/policies/test_qwen_vl_training.py", "tests/policies/test_language_model.py"
_PLAIN = f"{_LIKELIHOOD}::test_what_is_said_has_the_log_probs_of_transformers_own_model"
_KEPT = f"{_LIKELIHOOD}::test_keys_and_values_of_earlier_turns_change_nothing"
_SCORED = f"{_LIKELIHOOD}::test_scoring_whole_conversations_gives_the_numbers_of_acting"

CHAT: tuple[Row, ...] = (
    (
        "chat: positions go on one too early after a picture",
        f"{_PARTS}/qwen.py",
        "return torch.stack(grids).flatten(1), max(h, w)",
        "return torch.stack(grids).flatten(1), max(h, w) - 1",
        _PLAIN,
    ),
    (
        "chat: a picture's height and width change places",
        f"{_PARTS}/qwen.py",
        "return torch.stack(grids).flatten(1), max(h, w)",
        "return torch.stack(grids).flatten(1)[[0, 2, 1]], max(h, w)",
        _PLAIN,
    ),
    (
        "chat: pictures in the order in which they were encoded",
        f"{_PARTS}/qwen.py",
        "order = [places[seen] for seen in pictures]",
        "order = sorted(places[seen] for seen in pictures)",
        f"{_LIKELIHOOD}::test_entropies_and_gradients_are_a_naive_loop_s {_SCORED}",
    ),
    (
        "chat: holes between turns are attended to",
        f"{_PARTS}/network.py",
        "mask = rows.mask_NL if past_NP is None else torch.cat([past_NP, rows.mask_NL], 1)",
        "mask = rows.mask_NL if past_NP is None else torch.cat([torch.ones_like(past_NP), rows.mask_NL], 1)",
        f"{_KEPT} {_PLAIN}",
    ),
    (
        "chat: a row that has finished goes on counting positions",
        f"{_PARTS}/engine.py",
        "batch.next_B = batch.next_B + running_R",
        "batch.next_B = batch.next_B + 1",
        _KEPT,
    ),
    (
        "chat: what was said last is never fed",
        f"{_PARTS}/engine.py",
        "said: list[Piece] = [Said(unfed)] if len(unfed) else []",
        "said: list[Piece] = []",
        _KEPT,
    ),
    (
        "chat: the end of a turn is written twice",
        f"{_PARTS}/ears.py",
        "if ended:  # the model ended its turn itself",
        "if False:",
        f"{_PIECES}::test_a_turn_that_was_cut_is_closed_once",
    ),
    (
        "chat: a turn that was cut is never closed",
        f"{_PARTS}/ears.py",
        "if ended:  # the model ended its turn itself",
        "if not begins:",
        f"{_PIECES}::test_a_turn_that_was_cut_is_closed_once",
    ),
    (
        "chat: scored without the temperature",
        f"{_PARTS}/scoring.py",
        "temperature=sampling.temperature,",
        "temperature=1.0,",
        _SCORED,
    ),
    (
        "chat: drawn without the temperature",
        f"{_PARTS}/engine.py",
        "temperature=sampling.temperature, forbidden=sampling.forbidden",
        "temperature=1.0, forbidden=sampling.forbidden",
        f"{_SCORED} {_PLAIN}",
    ),
    (
        "chat: imitation at the temperature of exploring",
        _POLICY,
        "self._sampling(1.0)",
        "self.engine.sampling",
        f"{_TRAINING}::test_the_loss_is_transformers_cross_entropy_of_what_the_assistant_says",
    ),
    (
        "chat: tokens for pictures may be said",
        _POLICY,
        "{token for token in self._unsayable() if token < rows} | ",
        "",
        f"{_LIKELIHOOD}::test_tokens_that_stand_for_pictures_are_never_said",
    ),
    (
        "chat: tokens that the tokenizer does not have may be said",
        _POLICY,
        " | set(range(len(self._tokenizer), rows))",
        "",
        f"{_LIKELIHOOD}::test_tokens_that_stand_for_pictures_are_never_said",
    ),
    (
        "chat: rows that heard the same get their neighbour's",
        f"{_PARTS}/engine.py",
        "[places[first[key]] for key in keys]",
        "[max(places[first[key]] - 1, 0) for key in keys]",
        _PLAIN,
    ),
    (
        "chat: rows that heard the same are read once each",
        f"{_PARTS}/engine.py",
        "keys = [tuple(id(piece) for piece in request.pieces) for request in requests]",
        "keys = [(id(request),) for request in requests]",
        f"{_LIKELIHOOD}::test_rows_that_heard_the_same_are_read_once",
    ),
    (
        "chat: rows that left early are kept in the order of leaving",
        f"{_PARTS}/engine.py",
        "for _, batch in self._parts), rows.argsort()",
        "for _, batch in self._parts), torch.arange(len(rows))",
        _KEPT,
    ),
    (
        "chat: random numbers stay when rows leave",
        f"{_PARTS}/engine.py",
        "draws = None if draws is None else draws.select(stay)",
        "draws = None if draws is None else draws.select(torch.arange(len(stay)))",
        f"{_LIKELIHOOD}::test_a_row_does_not_depend_on_the_rows_beside_it",
    ),
    (
        "chat: a row's limit stays behind when rows leave",
        f"{_PARTS}/engine.py",
        "chosen_R[stay], limits_R[stay]",
        "chosen_R[stay], limits_R[: len(stay)]",
        f"{_PIECES}::test_rows_of_different_limits_keep_theirs",
    ),
    (
        "chat: keys and values outlive the weights",
        _POLICY,
        "        self.engine.forget()\n        return super().load_state_dict",
        "        return super().load_state_dict",
        f"{_TRAINING}::test_new_weights_forget_what_the_old_ones_kept",
    ),
    (
        "chat: equal pictures are stored each",
        f"{_PARTS}/ears.py",
        "self._seen.get(picture.key) or self._seen.put",
        "self._seen.put",
        f"{_PIECES}::test_the_same_picture_is_stored_once",
    ),
    (
        "chat: names of special tokens in a tool's text are tokens",
        f"{_PARTS}/template.py",
        "neutral(part, self._special) if",
        "part if",
        f"{_PIECES}::test_names_of_special_tokens_in_what_is_heard_are_plain_text",
    ),
    (
        "chat: data may teach tokens that must not be said",
        f"{_PARTS}/ears.py",
        "message.text if message.token_ids else neutral(message.text, self._never)",
        "message.text",
        f"{_TRAINING}::test_data_cannot_make_the_model_learn_what_it_must_not_say",
    ),
    (
        "chat: what was said is tokenised again for imitation",
        f"{_PARTS}/ears.py",
        "self._spelled(message.token_ids) if message.token_ids else self._spell(text)",
        "self._spell(text)",
        f"{_PIECES}::test_what_was_said_is_never_tokenised_again",
    ),
    (
        "chat: spans weigh only tokens that lie within them",
        f"{_PARTS}/ears.py",
        "if first < found.end() and last > found.start():",
        "if first >= found.start() and last <= found.end():",
        f"{_TRAINING}::test_spans_weigh_the_tokens_that_they_touch",
    ),
    (
        "chat: a conversation may be one token too long",
        _POLICY,
        "self.config.max_tokens - sum(map(len, pieces))) for pieces, _ in heard]",
        "self.config.max_tokens + 1 - sum(map(len, pieces))) for pieces, _ in heard]",
        f"{_PIECES}::test_a_conversation_cut_at_any_place_is_a_sample",
    ),
    (
        "chat: thin pictures are sized by transformers' rule",
        f"{_PARTS}/qwen.py",
        "import MAX_RATIO, smart_resize\n",
        "import MAX_RATIO\nfrom transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize\n",
        f"{_PIECES}::test_pictures_are_sized_by_the_rule_of_qwen_vl_utils",
    ),
    (
        "chat: a thin picture has no height",
        f"{_PARTS}/qwen.py",
        "return max(factor, rows), max(factor, columns)",
        "return rows, columns",
        f"{_PIECES}::test_pictures_are_sized_by_the_rule_of_qwen_vl_utils",
    ),
    (
        "chat: a picture that is too long for the rule stays so",
        f"{_PARTS}/qwen.py",
        "processor, image = self.processor, _less_long(picture.image)",
        "processor, image = self.processor, picture.image",
        f"{_PIECES}::test_tokens_of_pictures_are_as_many_as_the_model_makes",
    ),
    (
        "chat: layers drop out where activations are computed again",
        _POLICY,
        "            if isinstance(module, GradientCheckpointingLayer):\n                module.training = on",
        "            module.training = on",
        f"{_LIKELIHOOD}::test_scoring_with_checkpoints_of_activations_is_the_same",
    ),
    (
        "chat: a GGUF file's weights stay bound to it",
        "policies/language_model.py",
        "            quantizer.remove_quantization_config(model)  # the weights are plain, and are saved so\n",
        "",
        f"{_TEXT}::test_a_gguf_file_is_read_and_what_is_saved_is_not_one",
    ),
    (
        "conformance: drift is not looked at",
        f"{_PARTS}/checks.py",
        "    if ours == whole:\n",
        "    if True:\n",
        "tests/core/test_conformance.py::test_a_template_that_counts_turns_drifts",
    ),
    (
        "conformance: what fails exits well",
        "mmrl/cli.py",
        "        raise typer.Exit(EXIT_FAILED)",
        "        return",
        "tests/core/test_conformance.py::test_the_command_prints_a_table_and_fails_where_something_fails",
    ),
)
