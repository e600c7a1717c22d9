"""Planted bugs in the environment that holds conversations, and in conversations to imitate. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_USE, _DATA = "tests/core/test_tool_use.py", "tests/core/test_conversation_data.py"

TOOL_USE: tuple[Row, ...] = (
    (
        "tool_use: a group's slots have messages of their own",
        "mmrl/tool_use.py",
        "if task not in begun:",
        "if True:",
        f"{_USE}::test_calls_are_run_and_answers_marked",
    ),
    (
        "tool_use: a message that was cut calls tools",
        "mmrl/tool_use.py",
        'calls = [] if message.finish == "length" or not self.config.tools',
        "calls = [] if not self.config.tools",
        f"{_USE}::test_the_ways_in_which_a_conversation_ends",
    ),
    (
        "tool_use: one turn too many",
        "mmrl/tool_use.py",
        "len(slot.turns) == self.config.max_turns",
        "len(slot.turns) > self.config.max_turns",
        f"{_USE}::test_the_ways_in_which_a_conversation_ends",
    ),
    (
        "tool_use: what ended is answered again",
        "mmrl/tool_use.py",
        'if self._slots[slot].ended == "running" and message is not None:',
        "if message is not None:",
        f"{_USE}::test_calls_are_run_and_answers_marked",
    ),
    (
        "tool_use: tools see the question's pictures alone",
        "mmrl/tool_use.py",
        "pictures=slot.transcript.pictures,",
        "pictures=[part for part in slot.question.parts if not isinstance(part, str)],",
        f"{_USE}::test_pictures_of_tools_can_be_named_in_later_calls",
    ),
    (
        "tool_use: calls count the pictures of examples",
        "mmrl/transcripts.py",
        "for message in self.messages[self.begins :] for picture",
        "for message in self.messages for picture",
        f"{_USE}::test_pictures_are_numbered_from_1_in_every_example_and_in_the_question",
    ),
    (
        "tool_use: what tools keep outlives the conversation",
        "mmrl/tool_use.py",
        'if running.ended != "running":',
        "if False:",
        f"{_USE}::test_tools_keep_things_for_their_conversation_alone",
    ),
    (
        "tool_use: the tag is not looked for",
        "mmrl/tool_use.py",
        "extract(turn.message.text, self.config.answer_tag)",
        "extract(turn.message.text, None)",
        f"{_USE}::test_an_answer_may_stand_within_a_tag_and_marks_may_be_partial",
    ),
    (
        "conversations: failures are imitated",
        "mmrl/data/conversations.py",
        "enumerate(right) if well]",
        "enumerate(right)]",
        f"{_DATA}::test_conversations_that_end_badly_are_left_out {_DATA}::test_only_the_right_ones_of_a_round_are_given",
    ),
    (
        "conversations: a resumed source skips what was left of a round",
        "mmrl/data/conversations.py",
        "self._spare = self._spare[len(self._spare) - spare :]",
        "self._spare = []",
        f"{_DATA}::test_a_resumed_source_gives_what_an_unbroken_one_would",
    ),
    (
        "conversations: a line's tools are not told of",
        "mmrl/data/conversations.py",
        "        if not about:\n            return messages\n",
        "        if about:\n            return messages\n",
        f"{_DATA}::test_a_line_s_tools_are_told_as_the_environment_tells_of_its_own",
    ),
    (
        "conversations: a second system message tells of a line's tools",
        "mmrl/data/conversations.py",
        'if messages[0].role != "system":',
        "if True:",
        f"{_DATA}::test_a_line_s_tools_are_told_as_the_environment_tells_of_its_own",
    ),
    (
        "conversations: pictures lie as the camera held them",
        "mmrl/data/conversations.py",
        "as_seen(ImageOps.exif_transpose(image))",
        "as_seen(image)",
        f"{_DATA}::test_pictures_stand_as_their_camera_says",
    ),
    (
        "questions: what was said before is left out",
        "mmrl/tool_use.py",
        "*question.before, Message",
        "Message",
        "tests/simulators/test_prompts_jsonl.py::test_a_question_may_follow_a_system_message_and_a_conversation",
    ),
    (
        "questions: pictures shown before have no number",
        "mmrl/transcripts.py",
        "len(self.opening) - 1 - len(self.question.before)",
        "len(self.opening) - 1",
        "tests/simulators/test_prompts_jsonl.py::test_a_question_may_follow_a_system_message_and_a_conversation",
    ),
    (
        "evidence: the question's first picture is the conversation's",
        "mmrl/transcripts.py",
        "(*(part for message in self.before for part in message.parts), *self.parts)",
        "self.parts",
        "tests/simulators/test_prompts_jsonl.py::test_a_question_may_follow_a_system_message_and_a_conversation",
    ),
    (
        "questions: training asks for inks of letters that are held out",
        "simulators/prompts_parts/looking.py",
        "== 0) == held_out)",
        "== 0) >= held_out)",
        "tests/simulators/test_prompts_looking.py::test_orientations_held_out_are_never_trained_on",
    ),
    (
        "examples: their answers are learned",
        "mmrl/tool_use.py",
        "replace(message, weight=0.0)",
        "message",
        f"{_DATA}::test_the_answers_of_examples_are_not_learned",
    ),
    (
        "imitation: a message weighs nothing",
        "policies/chat_parts/ears.py",
        "torch.full((len(ids),), float(message.weight))",
        "torch.ones(len(ids))",
        "tests/policies/test_qwen_vl_training.py::test_a_message_without_weight_is_heard_and_not_learned",
    ),
    (
        "conversations: weights of messages are not read",
        "mmrl/data/conversations.py",
        "return float(weight)",
        "return 1.0",
        f"{_DATA}::test_messages_weigh_what_their_line_says",
    ),
)
