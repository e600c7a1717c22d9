"""Streams are independent of the order of use, reproducible across processes, and restored exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mmrl import seeding
from mmrl.errors import CheckpointError
from mmrl.seeding import Streams, derive_seed, seed_everything


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    """Leave the global generators as they were found."""
    before = Streams(0).state()
    yield
    Streams(0).load(before)


def draw(generator: torch.Generator, count: int = 5) -> Tensor:
    return torch.rand(count, generator=generator)


def global_draws() -> list[float]:
    """Numbers of the global generators; one Gaussian each of python and numpy, which keep the second of a pair."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(2).tolist()]


def test_streams_differ_by_name_and_by_seed() -> None:
    first = {
        (seed, name): tuple(draw(Streams(seed).get(name)).tolist())
        for seed in range(3)
        for name in ("collect", "data", "minibatch")
    }
    assert len(set(first.values())) == len(first)


def test_a_stream_does_not_depend_on_what_others_draw() -> None:
    alone, beside = Streams(7), Streams(7)
    draw(beside.get("collect"), 1000)
    draw(beside.get("minibatch"), 3)
    assert torch.equal(draw(alone.get("data")), draw(beside.get("data")))


def test_get_continues_and_fresh_starts_over() -> None:
    streams = Streams(1)
    whole = draw(Streams(1).get("evaluation"), 10)
    assert torch.equal(torch.cat([draw(streams.get("evaluation")), draw(streams.get("evaluation"))]), whole)
    assert torch.equal(draw(streams.fresh("evaluation"), 10), whole)
    assert torch.equal(draw(streams.fresh("evaluation"), 10), whole)


def test_salts_open_substreams() -> None:
    streams = Streams(1)
    substreams = [(), (0,), (1,), ("0",), (0, 1), ("01",), ("0", "1")]
    draws = {tuple(draw(streams.fresh("evaluation", *salt)).tolist()) for salt in substreams}
    assert len(draws) == len(substreams)


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    """The first eight bytes of ``printf '3\\037str:collect\\037int:4' | sha256sum``, little-endian, halved."""
    assert derive_seed(3, "collect", 4) == 4149515184742991682


def test_seed_everything_repeats_python_numpy_and_torch() -> None:
    seed_everything(5)
    first = global_draws()
    seed_everything(5)
    assert global_draws() == first
    seed_everything(6)
    assert not set(global_draws()) & set(first)


def test_a_resumed_run_draws_what_an_unbroken_one_draws() -> None:
    seed_everything(0)
    unbroken = Streams(3)
    draw(unbroken.get("collect"), 17)
    torch.randn(3, generator=unbroken.get("data"))
    global_draws()  # an odd number of Gaussians, so python and numpy keep one
    state = {name: tensor.clone() for name, tensor in unbroken.state().items()}
    expected = [draw(unbroken.get("collect")), draw(unbroken.get("data")), draw(unbroken.get("later"))]
    expected_global = global_draws()

    seed_everything(99)
    global_draws()
    resumed = Streams(3)
    draw(resumed.get("later"), 4)  # drawn before the load, for instance while building: forgotten
    held = resumed.get("collect")
    resumed.load(state)
    assert resumed.get("collect") is held
    for name, value in zip(("collect", "data", "later"), expected, strict=True):
        assert torch.equal(draw(resumed.get(name)), value), name
    assert global_draws() == expected_global


def test_the_state_is_a_snapshot_of_tensors() -> None:
    streams = Streams(0)
    stream = streams.get("collect")
    state = streams.state()
    assert all(isinstance(value, Tensor) for value in state.values())
    expected = draw(stream)
    streams.load(state)
    assert torch.equal(draw(streams.get("collect")), expected)


@pytest.mark.parametrize(
    ("change", "named"), [({"global/nunpy": torch.zeros(1)}, "global/nunpy"), ({"global/torch": None}, "global/torch")]
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Tensor | None], named: str) -> None:
    streams = Streams(0)
    state = {key: value for key, value in (streams.state() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=named):
        streams.load(state)


def test_a_name_with_a_slash_is_refused() -> None:
    with pytest.raises(ValueError, match="'a/b'"):
        Streams(0).get("a/b")


def test_configure_torch_sets_threads_and_determinism() -> None:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        seeding.configure_torch(1, deterministic=True)
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        seeding.configure_torch(None, deterministic=False)
        assert torch.get_num_threads() == 1
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        seeding.configure_torch(threads, deterministic)
