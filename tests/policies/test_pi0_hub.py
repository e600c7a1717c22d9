"""The layout of lerobot/pi0_base, written tiny: names of weights as there, LeRobot's config.json, the tokenizer elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PI0Config

from mmrl.errors import MMRLError
from policies.pi0 import Pi0
from policies.pi0_parts.weights import Statistics
from tests.policies import tiny

# transformers' names -> those of the published weights (openpi's PyTorch port and LeRobot write the same).
PUBLISHED = (
    (r"^model\.vlm\.language_model\.embed_tokens", "paligemma_with_expert.paligemma.lm_head"),
    (r"^model\.vlm\.vision_tower\.", "paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
    (r"^model\.vlm\.", "paligemma_with_expert.paligemma.model."),
    (r"^model\.dit\.embed_tokens", "paligemma_with_expert.gemma_expert.lm_head"),
    (r"^model\.dit\.", "paligemma_with_expert.gemma_expert.model."),
    (r"^embed_action_time\.", ""),
)


def published(name: str) -> str:
    for pattern, replacement in PUBLISHED:
        name, found = re.subn(pattern, replacement, name)
        if found:
            return name
    return name


@pytest.fixture(scope="module")
def original(architecture: str) -> Pi0:
    return tiny.build(architecture)


@pytest.fixture
def hub(original: Pi0, tmp_path: Path) -> Path:
    """A folder with LeRobot's config.json, which names no ``model_type``, and weights; no tokenizer, no statistics."""
    folder = tmp_path / "pi0_base"
    folder.mkdir()
    weights = {published(name): tensor.contiguous() for name, tensor in original.model.state_dict().items()}
    assert {name.partition(".")[0] for name in weights} >= {"paligemma_with_expert", "action_in_proj", "state_proj"}
    save_file(weights, folder / "model.safetensors")
    config = PI0Config.from_dict(original.model.config.to_dict()).to_dict()
    ours = ("chunk_size", "max_state_dim", "max_action_dim", "vlm_config", "dit_config")
    lerobot = {"type": "pi0", "n_obs_steps": 1, "device": "cpu", "use_amp": False, "num_inference_steps": 10, "empty_cameras": 0}
    (folder / "config.json").write_text(json.dumps({**lerobot, **{name: config[name] for name in ours}}))
    return folder


def opened(checkpoint: Path, **fields: object) -> Pi0:
    return Pi0(tiny.config(str(checkpoint), weights="pretrained", **fields), device=tiny.CPU)


def test_published_weights_are_loaded_to_the_last_one(original: Pi0, hub: Path, architecture: str) -> None:
    policy = opened(hub, tokenizer=architecture)
    loaded, expected = policy.model.state_dict(), original.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)] == []
    assert policy.needs_statistics()


def test_statistics_saved_beside_the_weights_are_used(original: Pi0, hub: Path, architecture: str) -> None:
    """What ``mmrl statistics --output`` writes there has more in it than a pi0 reads."""
    assert original.statistics is not None
    numbers = dict(original.statistics.__dict__)
    more = {f"{of}_{q}": [0.0] * len(numbers[f"{of}_mean"]) for of in ("state", "actions") for q in ("q01", "q99")}
    (hub / "statistics.json").write_text(json.dumps({**numbers, **more}))
    policy = opened(hub, tokenizer=architecture, action_dim=None)
    assert policy.statistics == original.statistics and policy.action_dim == tiny.ACTION
    seen = tiny.observation(5)
    ours, theirs = (of.act(seen, tiny.draws(1), explore=False).action for of in (policy, original))
    assert torch.equal(ours, theirs)


def test_a_policy_saved_from_it_needs_the_other_folder_no_more(hub: Path, architecture: str, tmp_path: Path) -> None:
    policy = opened(hub, tokenizer=architecture)
    policy.statistics = Statistics((0.0,) * 4, (1.0,) * 4, (0.0,) * 3, (1.0,) * 3)
    policy.save(tmp_path / "saved")
    twin = opened(tmp_path / "saved")
    seen = tiny.observation(5)
    ours, theirs = (of.act(seen, tiny.draws(1), explore=True).action for of in (policy, twin))
    assert torch.equal(ours, theirs)


def test_a_checkpoint_without_tokenizer_is_told_where_one_may_be_named(hub: Path) -> None:
    with pytest.raises(MMRLError, match=r"no tokenizer could be loaded from there .*; name one with policy\.tokenizer"):
        opened(hub)
