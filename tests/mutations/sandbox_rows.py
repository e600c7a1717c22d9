"""Planted bugs of the Python tool: walls that are not there, answers that are believed, figures and files of another call."""

_ZYGOTE, _WIRE, _POOL, _NOTEBOOK, _SECCOMP, _CONFINE = (
    f"tools/python_sandbox_parts/{name}.py" for name in ("zygote", "wire", "pool", "notebook", "seccomp", "confine")
)
_ATTACK = "tests/tools/test_python_sandbox_escapes.py::test_an_attack_is_contained"
_USE = "tests/tools/test_python_sandbox.py::test_"

SANDBOX = (
    ("sandbox: no filter of system calls", _ZYGOTE, "    seccomp.install(os.getpid())\n", "",
     f"{_ATTACK}[fork-landlock]"),
    ("sandbox: Landlock shows everything", _CONFINE, "for path in readable:", 'for path in ["/"]:',
     f"{_ATTACK}[shadow-namespaces]"),
    ("sandbox: the filter lets all of prctl through", _SECCOMP, '        "prctl": _one_of(0, _PRCTL),\n', "",
     f"{_ATTACK}[dumpable-landlock]"),
    ("sandbox: an old answer is believed", _WIRE, "if got != nonce or outcome", "if outcome",
     f"{_USE}an_answer_prepared_for_the_next_call_is_refused"),
    ("sandbox: sizes of pictures are believed", _WIRE, "_read_pixels(read, limits.pixels)", "_read_pixels(read)",
     "tests/tools/test_python_sandbox_parts.py::test_no_bytes_upset_the_reader_of_answers"),
    ("sandbox: no limit on memory", _CONFINE, "        resource.RLIMIT_AS: now + memory_bytes,\n", "",
     f"{_USE}memory_is_limited_and_can_be_used_up_to_there"),
    ("sandbox: jobs share the working folder", _ZYGOTE, "        confine.mount_memory(work, disk)\n", "",
     f"{_USE}files_are_not_kept_either"),
    ("sandbox: a job is not killed", _POOL, "signal.pidfd_send_signal(self._handle, signal.SIGKILL)", "pass",
     f"{_USE}the_process_of_a_call_ends_with_it"),
    ("sandbox: figures of a failed call stay open", _NOTEBOOK, 'sys.modules["matplotlib.pyplot"].close("all")', "pass",
     f"{_USE}figures_of_code_that_failed_do_not_come_with_the_next_call"),
    ("sandbox: grey of 16 bits is white", _NOTEBOOK, 'if image.mode.startswith("I;16"):', "if False:",
     f"{_USE}transparent_pixels_are_white_and_16_bits_become_8"),
)  # fmt: skip
