"""Planted bugs between a model's text and a tool's result, and in the image tools. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_FORMATS, _TOOLBOX, _SCHEMA = "tests/core/test_call_formats.py", "tests/core/test_calling.py", "tests/core/test_tool_schema.py"
_IMAGES = "tests/tools/test_image_tools.py"
CALLING: tuple[Row, ...] = (
    (
        "calling: a tag in a string ends the call",
        "mmrl/calling/formats.py",
        'return self._TAG.sub(lambda tag: "\\\\u003c" + tag[0][1:], line)',
        "return line",
        f"{_FORMATS}::test_hermes_rendered_parses_to_the_same_calls",
    ),
    (
        "calling: the last of two equal keys counts",
        "mmrl/calling/formats.py",
        "        if key in found:\n",
        "        if False:\n",
        f"{_FORMATS}::test_a_malformed_call_has_its_sentence_and_harms_no_other",
    ),
    (
        "calling: too many digits raise",
        "mmrl/calling/formats.py",
        "except (ValueError, RecursionError)",
        "except RecursionError",
        f"{_FORMATS}::test_no_text_raises_and_every_call_can_be_written",
    ),
    (
        "calling: a fence in the code ends the block",
        "mmrl/calling/formats.py",
        "max(3, 1 + max(map(len",
        "max(3, 0 * max(map(len",
        f"{_FORMATS}::test_code_rendered_parses_to_the_same_calls",
    ),
    (
        "calling: the context is no secret",
        "mmrl/calling/schema.py",
        "        if key == HIDDEN:\n",
        "        if False:\n",
        f"{_SCHEMA}::test_lines_of_the_docstring_describe_parameters_and_the_context_is_hidden",
    ),
    (
        "calling: an optional argument is required",
        "mmrl/calling/schema.py",
        "(key, hint, field(default=None))",
        "(key, hint)",
        f"{_SCHEMA}::test_arguments_pass_as_json_has_them_and_defaults_stay_the_tool_s",
    ),
    (
        "calling: one generator for all calls of a turn",
        "mmrl/calling/toolbox.py",
        "{conversation}/{turn}/{index}",
        "{conversation}/{turn}",
        f"{_TOOLBOX}::test_random_numbers_belong_to_the_call_and_not_to_its_threads",
    ),
    (
        "calling: results come as their calls end",
        "mmrl/calling/toolbox.py",
        "{job.place: self._outcome(job, timed)",
        "{len(outcomes): self._outcome(job, timed)",
        f"{_TOOLBOX}::test_each_failure_has_its_kind_and_sentence_and_harms_no_other",
    ),
    (
        "calling: tools that keep something run at the same time",
        "mmrl/calling/toolbox.py",
        'bool(getattr(tool, "ordered", False))',
        "False",
        f"{_TOOLBOX}::test_ordered_tools_run_in_order_and_not_beside_one_that_hangs",
    ),
    (
        "calling: calls wait for one another",
        "mmrl/calling/toolbox.py",
        "[[job] for job in jobs if not job.offer.ordered] + [[job for job in jobs if job.offer.ordered]]",
        "[jobs]",
        f"{_TOOLBOX}::test_calls_run_at_the_same_time_and_results_come_in_their_order",
    ),
    (
        "calling: a late call keeps its place for ever",
        "mmrl/calling/timed.py",
        '                piece.status = "skipped"\n            self._free.release()\n',
        '                piece.status = "skipped"\n',
        f"{_TOOLBOX}::test_a_late_call_is_left_behind_and_harms_no_other",
    ),
    (
        "calling: a late call gives its place back twice",
        "mmrl/calling/timed.py",
        '                if timed.status == "late":\n                    return\n',
        '                if timed.status == "late":\n                    self._free.release()\n                    return\n',
        f"{_TOOLBOX}::test_a_late_call_that_returns_at_last_frees_no_second_place",
    ),
    (
        "calling: threads outlive the program",
        "mmrl/calling/timed.py",
        "daemon=True",
        "daemon=False",
        f"{_TOOLBOX}::test_what_hangs_does_not_keep_the_program_from_ending",
    ),
    (
        "crop: the map forgets that the cut-out was enlarged",
        "tools/crop.py",
        "(width / size[0], 0, left, 0, height / size[1], top)",
        "(1, 0, left, 0, 1, top)",
        f"{_IMAGES}::test_the_corners_of_exact_maps",
    ),
    (
        "rotate: half a pixel off",
        "tools/rotate.py",
        "x, y = size[0] / 2, size[1] / 2",
        "x, y = (size[0] - 1) / 2, (size[1] - 1) / 2",
        f"{_IMAGES}::test_what_can_be_exact_is",
    ),
    (
        "rotate: the map is of the exact extent, not of the whole pixels",
        "tools/rotate.py",
        "return picture.derived(turned, to_this, image - 1)",
        "return picture.derived(turned, (*to_this[:2], to_this[2] + 0.4, *to_this[3:]), image - 1)",
        f"{_IMAGES}::test_a_dot_is_found_where_the_map_says",
    ),
    (
        "rotate: counter-clockwise",
        "tools/rotate.py",
        "_cos_sin(degrees)\n",
        "_cos_sin(-degrees)\n",
        f"{_IMAGES}::test_what_can_be_exact_is",
    ),
    (
        "flip: pixels are counted from their middles",
        "tools/flip.py",
        "(-1.0, 0.0, float(width), ",
        "(-1.0, 0.0, float(width - 1), ",
        f"{_IMAGES}::test_the_corners_of_exact_maps",
    ),
    (
        "read_text: boxes of the picture that was scaled down",
        "tools/read_text.py",
        "found.boxes * (width / size[0], height / size[1])",
        "found.boxes",
        f"{_IMAGES}::test_a_large_picture_is_read_scaled_down_and_a_tiny_one_at_all",
    ),
    (
        "messages: transparent pixels show what they hide",
        "mmrl/messages.py",
        "if not image.has_transparency_data:",
        "if True:",
        "tests/core/test_messages.py::test_pictures_are_what_a_person_sees",
    ),
    (
        "messages: a grey of 16 bits is white",
        "mmrl/messages.py",
        'if image.mode.startswith("I;16"):',
        "if False:",
        "tests/core/test_messages.py::test_pictures_are_what_a_person_sees",
    ),
)
