"""Bugs to plant in vLLM's place in the policies that talk; rows as in beyond_numerics.py. They need vLLM."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_ENGINE, _RUNNING = "policies/vllm_engine.py", "policies/vllm_parts/running.py"
_TESTS = "tests/policies/test_vllm_engine.py"
_FAMILIES = "tests/policies/test_vllm_families.py"
_NOTICED = f"{_TESTS}::test_weights_that_change_in_silence_are_noticed"

VLLM: tuple[Row, ...] = (
    (
        "vllm: keys and values of the old weights are kept",
        _RUNNING,
        "        engine.reset_prefix_cache()\n",
        "",
        f"{_TESTS}::test_new_weights_are_taken_in_place",
    ),
    (
        "vllm: the output head keeps the old weights",
        _RUNNING,
        "        engine.collective_rpc(_repack_head)\n",
        "",
        f"{_TESTS}::test_drawn_tokens_have_the_policy_s_own_log_probs",
    ),
    (
        "vllm: weights that change in silence are not noticed",
        _ENGINE,
        "tuple((p.data_ptr(), p._version) for p in self.network.model.parameters())",
        "()",
        _NOTICED,
    ),
    (
        "vllm: another policy's weights speak",
        _ENGINE,
        "if runner.loaded is self and not self._stale",
        "if not self._stale",
        f"{_TESTS}::test_adapters_are_merged",
    ),
    (
        "vllm: adapters are left out",
        "policies/shared/adapters.py",
        ' if kind == "weight" else 0',
        " if kind is None else 0",
        f"{_TESTS}::test_adapters_are_merged",
    ),
    (
        "vllm: tokens for pictures may be said",
        _ENGINE,
        "            runner.rules.forbidden = self.sampling.forbidden\n",
        "",
        f"{_TESTS}::test_tokens_are_drawn_as_often_as_they_are_likely",
    ),
    (
        "vllm: the likeliest token's log-probability at temperature 1",
        _ENGINE,
        "1.0 if draws is not None else self.sampling.temperature",
        "1.0",
        f"{_TESTS}::test_the_likeliest_tokens_are_the_local_engine_s",
    ),
    (
        "vllm: the stamp is that of the first weights",
        _ENGINE,
        "None, self._holds[0])",
        "None, 3)",
        f"{_TESTS}::test_new_weights_are_taken_in_place",
    ),
    (
        "vllm: a picture is put where the one before it stands",
        _RUNNING,
        "            at += seen.tokens\n",
        "",
        f"{_FAMILIES}::test_vllm_is_told_where_each_picture_stands[qwen3_vl]",
    ),
    (
        "vllm: the canary sees no picture",
        _ENGINE,
        "        if self.network.processor is None:\n",
        "        if True:\n",
        f"{_FAMILIES}::test_the_canary_hears_of_every_part[qwen3_vl]",
    ),
    (
        "vllm: the canary does not compare",
        _ENGINE,
        "    if not gap <= GAPS[dtype]:\n",
        "    if False:\n",
        f"{_TESTS}::test_the_canary_sees_weights_of_which_some_do_not_arrive",
    ),
    (
        "torchvision: the schemas vanish at once",
        "mmrl/torchvision_shim.py",
        "            _declared.append(library)\n",
        "            del library\n",
        "tests/core/test_torchvision_shim.py::test_schemas_are_declared_where_the_import_fails_without",
    ),
)
