"""Bugs to plant in what image generators are made of; rows as in beyond_numerics.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_PARTS, _POLICY, _FAMILIES = "policies/diffusion_parts", "policies/diffusion.py", "policies/diffusion_families"
_SD3, _STEPS = "tests/policies/test_diffusion_sd3.py", "tests/policies/test_diffusion_steps.py"
_TRAINING, _RULE = "tests/policies/test_diffusion_training.py", "tests/numerics/test_diffusion.py"
_DISK = "tests/policies/test_diffusion_disk.py"
_REPLAY = f"{_SD3}::test_scoring_again_equals_acting"

DIFFUSION: tuple[Row, ...] = (
    (
        "diffusion: states are scored before they are rounded",
        f"{_PARTS}/sampling.py",
        "x_next = (mean + std * draws.normal(*x.shape[1:], dtype=mean.dtype)).to(x.dtype)",
        "x_next = mean + std * draws.normal(*x.shape[1:], dtype=mean.dtype)",
        f"{_SD3}::test_in_bf16_states_are_rounded_before_they_are_scored",
    ),
    (
        "diffusion: the first point of the next step is the mean",
        f"{_PARTS}/sampling.py",
        "            x = x_next\n",
        "            x = mean.to(x.dtype)\n",
        f"{_SD3}::test_what_is_drawn_goes_on_from_where_it_was_drawn",
    ),
    (
        "diffusion: the window begins again a stride too late",
        f"{_PARTS}/schedule.py",
        "firsts = range(trained.start, stop - size + 1, trained.stride)",
        "firsts = range(trained.start, stop - size + 2, trained.stride)",
        f"{_STEPS}::test_a_progressive_window_moves_and_begins_again",
    ),
    (
        "diffusion: a window that decays does so from the beginning",
        f"{_PARTS}/schedule.py",
        "max(first - trained.decay_from, 0)",
        "first",
        f"{_STEPS}::test_a_window_stays_shorter_the_further_it_has_moved",
    ),
    (
        "diffusion: the last step may be chosen",
        f"{_PARTS}/schedule.py",
        "stop = steps - 1 if trained.stop is None else trained.stop",
        "stop = steps if trained.stop is None else trained.stop",
        f"{_STEPS}::test_random_steps_are_any_but_the_last",
    ),
    (
        "diffusion: a group's prefix does not change with the iteration",
        _POLICY,
        "iteration = (self.iteration, self.version)",
        "iteration = (0, self.version)",
        f"{_STEPS}::test_a_shared_prefix_is_walked_once_and_shared_by_the_pictures_of_a_prompt",
    ),
    (
        "diffusion: both branches of guidance change places",
        f"{_PARTS}/guided.py",
        "without, conditional = self._ask(",
        "conditional, without = self._ask(",
        f"{_SD3}::test_guidance_is_that_of_the_paper",
    ),
    (
        "diffusion: the branch without prompt is not detached",
        f"{_PARTS}/guided.py",
        "with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):",
        "with torch.set_grad_enabled(torch.is_grad_enabled()):",
        f"{_SD3}::test_a_detached_branch_changes_the_gradient_and_nothing_else",
    ),
    (
        "diffusion: latents are scaled before they are shifted",
        f"{_FAMILIES}/base.py",
        '(encoded - (config.get("shift_factor") or 0.0)) * config.scaling_factor',
        'encoded * config.scaling_factor - (config.get("shift_factor") or 0.0)',
        f"{_TRAINING}::test_the_loss_is_flow_matching[0.0-uniform]",
    ),
    (
        "diffusion: the network is told times without the shift",
        f"{_PARTS}/schedule.py",
        "t_N = self._shift(u_N)",
        "t_N = u_N",
        f"{_TRAINING}::test_the_loss_is_flow_matching[0.0-uniform]",
    ),
    (
        "diffusion: a reference shares its adapters",
        _POLICY,
        "if id(thing) not in learning:",
        "if True:",
        f"{_SD3}::test_a_reference_scores_alike_and_does_not_learn[lora]",
    ),
    (
        "diffusion: adapters are saved beside the weights",
        _POLICY,
        "setattr(pipeline, name, merged(self.network))",
        "pass",
        f"{_SD3}::test_what_is_saved_is_a_pipeline_of_diffusers[lora]",
    ),
    (
        "diffusion: what was used last is forgotten first",
        f"{_PARTS}/prompts.py",
        "            self._values.move_to_end(key)\n        return",
        "            pass\n        return",
        f"{_SD3}::test_a_prompt_is_encoded_once_as_long_as_there_is_room",
    ),
    (
        "disk: a damaged file is read all the same",
        f"{_PARTS}/disk.py",
        'if header["__metadata__"]["checksum"] != _checksum(tensors):',
        "if False:",
        f"{_DISK}::test_a_damaged_file_is_dropped_counted_and_made_again",
    ),
    (
        "disk: another encoder reads what this one has left",
        f"{_PARTS}/disk.py",
        "        whole.update(data)\n",
        "",
        f"{_DISK}::test_another_encoder_reads_nothing_of_it",
    ),
    (
        "disk: what was used last goes first",
        f"{_PARTS}/disk.py",
        "in sorted(files):",
        "in sorted(files, reverse=True):",
        f"{_DISK}::test_what_was_used_longest_ago_goes_first",
    ),
    (
        "disk: reading a file does not count as using it",
        f"{_PARTS}/disk.py",
        "            os.utime(path)\n",
        "            pass\n",
        f"{_DISK}::test_what_was_used_longest_ago_goes_first",
    ),
    (
        "disk: the branch without text reads what an empty prompt says",
        f"{_PARTS}/prompts.py",
        "digest(self._encoders, negative, prompt.key)",
        "digest(self._encoders, prompt.key)",
        f"{_DISK}::test_a_second_policy_asks_no_encoder_and_draws_the_same",
    ),
    (
        "qwen image edit: the picture stands before the noise",
        f"{_FAMILIES}/qwen_image.py",
        "torch.cat([x, *shown], 1)",
        "torch.cat([*shown, x], 1)",
        "tests/policies/test_diffusion_qwen_image.py::test_qwen_image_edit_edits_what_it_is_shown",
    ),
    (
        "ddim: the noise of the whole variance",
        "mmrl/numerics/diffusion.py",
        "(1 - share / share_next)).clamp",
        "(1 - share)).clamp",
        f"{_RULE}::test_a_step_is_diffusers",
    ),
    (
        "ddim: the direction forgets the noise that is added",
        "mmrl/numerics/diffusion.py",
        "(1 - share_next - variance)",
        "(1 - share_next)",
        f"{_RULE}::test_a_step_is_diffusers",
    ),
    (
        "diffusion: what a detached branch said stands after an update",
        _POLICY,
        "return hash((self._number, self.version, *trained))",
        "return hash((self._number, self.version))",
        "tests/policies/test_diffusion_apart.py::test_changed_weights_ask_again",
    ),
    (
        "diffusion: a reference says what the policy said",
        _POLICY,
        "twin._number = next(_NUMBERS)",
        "twin._number, twin._weights = self._number, self._weights",
        "tests/policies/test_diffusion_apart.py::test_a_reference_and_weights_that_are_worn_ask_for_themselves[all]",
    ),
)
