"""Actions to tokens and back: a naive twin of OpenVLA's ActionTokenizer, quantiles of the data, dimensions that hardly vary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl.errors import MMRLError
from policies.shared.checkpoints import STATISTICS_FILE
from policies.token_vla_parts.bins import Bins, Statistics, load_statistics, spread
from tests.policies import tiny_vla


class OpenVLA:
    """ActionTokenizer and the un-normalisation of predict_action, written again from their description, in numpy."""

    def __init__(self, low: list[float], high: list[float], vocabulary: int, bins: int = 256) -> None:
        self.low, self.high, self.vocabulary = np.array(low), np.array(high), vocabulary
        self.edges = np.linspace(-1, 1, bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2

    def ids(self, actions: np.ndarray) -> np.ndarray:
        scaled = np.clip(2 * (actions - self.low) / (self.high - self.low) - 1, -1, 1)
        return self.vocabulary - np.digitize(scaled, self.edges)

    def actions(self, ids: np.ndarray) -> np.ndarray:
        places = np.clip(self.vocabulary - ids - 1, 0, len(self.centres) - 1)
        return 0.5 * (self.centres[places] + 1) * (self.high - self.low) + self.low


LOW, HIGH, VOCABULARY = [-0.3, 0.0, -2.0], [0.7, 1.5, 3.0], 32000


def bins(count: int = 256) -> Bins:
    return Bins(tuple(LOW), tuple(HIGH), ((), (), ()), count)


def ids_of(tokens: torch.Tensor) -> np.ndarray:
    return VOCABULARY - 1 - tokens.numpy()


@pytest.mark.parametrize("count", [256, 16, 2])
def test_edges_are_numpy_s(count: int) -> None:
    assert np.array_equal(spread(count).numpy(), np.linspace(-1, 1, count))


@pytest.mark.parametrize("count", [256, 16, 2])
def test_encoding_is_openvla_s(count: int) -> None:
    twin, ours = OpenVLA(LOW, HIGH, VOCABULARY, count), bins(count)
    inside = np.random.default_rng(0).uniform(-0.2, 1.2, (4000, 3)) * (np.array(HIGH) - LOW) + LOW
    exact = (np.linspace(-1, 1, count)[:, None] + 1) / 2 * (np.array(HIGH) - LOW) + LOW  # edges, up to rounding
    for actions in (inside, np.array([LOW, HIGH])):
        assert np.array_equal(ids_of(ours.encode(torch.from_numpy(actions))), twin.ids(actions))
    assert np.abs(ids_of(ours.encode(torch.from_numpy(exact))) - twin.ids(exact)).max() <= 1
    assert ids_of(ours.encode(torch.tensor([LOW]))).tolist() == [[VOCABULARY - 1] * 3], "the lowest is the last entry"
    assert ids_of(ours.encode(torch.tensor([HIGH], dtype=torch.float64))).tolist() == [[VOCABULARY - count] * 3]


@pytest.mark.parametrize("count", [256, 16, 2])
def test_decoding_is_openvla_s(count: int) -> None:
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    expected = OpenVLA(LOW, HIGH, VOCABULARY, count).actions(ids_of(tokens))
    np.testing.assert_allclose(bins(count).decode(tokens).numpy(), expected, rtol=1e-6, atol=1e-7)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.integers(2, 300))
def test_there_and_back_is_off_by_half_a_bin_at_most(scaled: list[float], count: int) -> None:
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    actions = low + (torch.tensor([scaled], dtype=torch.float64) + 1) / 2 * (high - low)
    back = bins(count).decode(bins(count).encode(actions))
    half = (high - low) / (count - 1) / 2
    assert ((back - actions).abs() <= half + 1e-6).all()


def test_what_lies_beyond_the_quantiles_is_cut() -> None:
    tokens = bins().encode(torch.tensor([[-9.0, 9.0, 0.5]]))
    assert tokens[0, :2].tolist() == [0, 255]


def test_decoding_what_was_decoded_changes_nothing() -> None:
    tokens = torch.arange(255)[:, None].expand(-1, 3)
    assert torch.equal(bins().encode(bins().decode(tokens)), tokens)


# -- dimensions that hardly vary ---------------------------------------------------------------------------------------


def test_a_gripper_has_two_tokens_which_mean_exactly_its_values() -> None:
    gripper = Bins((0.0, -1.0), (0.1, 1.0), ((), (-1.0, 1.0)), 256)
    assert gripper.allowed_AV[1].nonzero().flatten().tolist() == [0, 255]
    assert gripper.encode(torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 0.9], [0.0, -0.2]]))[:, 1].tolist() == [0, 255, 255, 0]
    assert gripper.decode(torch.tensor([[3, 0], [3, 255]]))[:, 1].tolist() == [-1.0, 1.0]
    assert gripper.varies_A.tolist() == [True, True] and bool(gripper.allowed_AV[0].all())


def test_a_dimension_that_never_varies_has_one_token() -> None:
    still = Bins((0.25, 0.0), (0.25, 1.0), ((0.25,), ()), 256)
    assert still.allowed_AV[0].nonzero().flatten().tolist() == [128]
    assert still.varies_A.tolist() == [False, True]
    assert still.encode(torch.tensor([[0.25, 0.5], [7.0, 0.5]]))[:, 0].tolist() == [128, 128]
    assert still.decode(torch.tensor([[128, 4]]))[0, 0] == 0.25
    assert still.values_AV.isfinite().all()


# -- from data ---------------------------------------------------------------------------------------------------------


def test_quantiles_are_numpy_s() -> None:
    draw = np.random.default_rng(1)
    actions, state = draw.normal(size=(777, 2)), draw.normal(size=(777, 3))
    found = Statistics.fit(torch.from_numpy(actions), torch.from_numpy(state))
    np.testing.assert_allclose([found.actions_q01, found.actions_q99], np.quantile(actions, [0.01, 0.99], axis=0))
    assert found.state_q01 is not None and found.state_q99 is not None
    np.testing.assert_allclose([found.state_q01, found.state_q99], np.quantile(state, [0.01, 0.99], axis=0))
    assert found.actions_choices == ((), ())


def test_choices_are_found_in_the_data() -> None:
    x = torch.zeros(1000, 4)
    x[3, 0] = 1.0  # a gripper that hardly ever closes: its quantiles are equal
    x[:, 1] = 0.5
    x[:, 2] = torch.linspace(0, 1, 1000)
    x[:3, 3] = torch.tensor([0.1, 0.2, 0.3])  # three values, of which quantiles see one
    found = Statistics.fit(x, None)
    assert found.actions_choices == ((0.0, 1.0), (0.5,), (), ())
    assert (found.actions_q01[3], found.actions_q99[3]) == (0.0, pytest.approx(0.3))
    made = Bins(found.actions_q01, found.actions_q99, found.actions_choices, 16)
    torch.testing.assert_close(made.decode(made.encode(x[:3]))[:, :2], x[:3, :2], rtol=0, atol=0)
    assert found.state_q01 is None


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / STATISTICS_FILE).write_text(tiny_vla.STATISTICS.text())
    assert load_statistics(str(tmp_path)) == tiny_vla.STATISTICS
    assert load_statistics(str(tmp_path / "elsewhere")) is None


def test_the_command_s_statistics_are_read_too(tmp_path: Path) -> None:
    """``mmrl statistics`` writes moments and quantiles, and no choices."""
    numbers = {"actions_mean": [0.0, 0.0], "actions_q01": [-1.0, 0.5], "actions_q99": [1.0, 0.5], "state_mean": [0.0]}
    (tmp_path / STATISTICS_FILE).write_text(json.dumps(numbers))
    assert load_statistics(str(tmp_path)) == Statistics((-1.0, 0.5), (1.0, 0.5), ((), (0.5,)))


def test_a_dimension_that_rarely_moves_is_not_taken_for_one_that_never_does(tmp_path: Path) -> None:
    """As ``Statistics.fit`` has it: here from the numbers that ``mmrl statistics`` writes."""
    ends = {"actions_min": [-2.0, 0.0, 0.5], "actions_max": [2.0, 0.25, 0.5]}
    numbers = {"actions_q01": [-1.0, 0.0, 0.5], "actions_q99": [1.0, 0.0, 0.5], **ends}
    (tmp_path / STATISTICS_FILE).write_text(json.dumps(numbers))
    assert load_statistics(str(tmp_path)) == Statistics((-1.0, 0.0, 0.5), (1.0, 0.25, 0.5), ((), (), (0.5,)))


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / STATISTICS_FILE).write_text('{"actions_mean": [0.0]}')
    with pytest.raises(MMRLError, match="not a statistics file with actions_q01 and actions_q99"):
        load_statistics(str(tmp_path))
