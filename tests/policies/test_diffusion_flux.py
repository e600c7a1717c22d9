"""A tiny FLUX.1 and a tiny FLUX.1 Kontext: they draw what diffusers' pipelines draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline

from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.types import Observation, Talks
from tests.policies import tiny_diffusion as tiny

PICTURES = tuple(tiny.picture(i) for i in range(len(tiny.TEXTS)))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_flux(tmp_path_factory.mktemp("flux"), FluxPipeline)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_flux(tmp_path_factory.mktemp("kontext"), FluxKontextPipeline)


def drawn(**how: Any) -> Any:
    def images(pipeline: Any, noise: torch.Tensor) -> Any:
        size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": tiny.STEPS}
        return pipeline(prompt=list(tiny.TEXTS), latents=noise, output_type="np", max_sequence_length=8, **size, **how).images

    return images


def test_a_distilled_flux_is_told_the_guidance(flux: str) -> None:
    policy = tiny.load(flux, max_text_tokens=8, guidance=3.5)
    tiny.assert_follows(policy, drawn(guidance_scale=3.5))
    tiny.assert_replays(policy)
    rows: list[int] = []
    predict = policy.family.predict
    policy.family.predict = lambda x, *rest: (rows.append(len(x)), predict(x, *rest))[1]
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert rows == [5] * tiny.STEPS  # no branch without prompt
    t, x = torch.full((5,), 0.5), policy.clean(made.trace)
    assert torch.equal(policy.velocity(made.trace, x, t), policy.velocity(made.trace, x, t, guidance=3.5))
    assert not torch.allclose(policy.velocity(made.trace, x, t), policy.velocity(made.trace, x, t, guidance=1.0), atol=1e-4)


def test_a_flux_without_such_an_input_has_two_branches(tmp_path: Path) -> None:
    policy = tiny.load(tiny.write_flux(tmp_path, FluxPipeline, distilled=False), max_text_tokens=8, guidance=2.0)
    tiny.assert_follows(policy, drawn(true_cfg_scale=2.0, negative_prompt=[""] * 5))
    tiny.assert_replays(policy)


def test_flux_imitates_and_travels(flux: str, tmp_path: Path) -> None:
    tiny.assert_learns_and_travels(tiny.load(flux, max_text_tokens=8, train="lora"), tmp_path)


def test_latents_of_a_wide_picture_are_decoded_as_they_were_encoded(flux: str) -> None:
    """Packing and unpacking are inverse, and rows stay rows."""
    policy = tiny.load(flux, height=16, width=32)
    encoded = torch.randn(2, 4, 8, 16)
    packed = policy.family.to_latents(encoded)
    assert packed.shape == (2, *policy.family.latent_shape)
    torch.testing.assert_close(policy.family.from_latents(packed), encoded)
    made = policy.act(tiny.observe(), tiny.draws(), explore=False)
    assert tiny.pixels(made.action).shape == (5, 16, 32, 3)


def test_kontext_edits_what_it_is_shown(kontext: str) -> None:
    policy = tiny.load(kontext, max_text_tokens=8, guidance=3.5)
    seen = tiny.observe(pictures=PICTURES)

    def images(pipeline: Any, noise: torch.Tensor) -> Any:
        size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": tiny.STEPS, "max_area": tiny.SIZE**2}
        shown = {"image": [picture.image for picture in PICTURES], "guidance_scale": 3.5, "_auto_resize": False}
        return pipeline(prompt=list(tiny.TEXTS), latents=noise, output_type="np", max_sequence_length=8, **size, **shown).images

    tiny.assert_follows(policy, images, seen)
    tiny.assert_replays(policy, seen)
    # The picture is part of what a prompt is.
    first = tiny.observe(("a red circle",) * 2, (PICTURES[0], PICTURES[1]))
    made = policy.act(first, tiny.draws().select(torch.tensor([0, 0])), explore=True)
    assert not torch.allclose(made.trace["clean"][0], made.trace["clean"][1], atol=1e-3)


def test_kontext_draws_from_text_alone_as_well(kontext: str) -> None:
    policy = tiny.load(kontext, max_text_tokens=8, guidance=3.5)
    tiny.assert_follows(policy, drawn(guidance_scale=3.5, max_area=tiny.SIZE**2))
    assert policy.example_observation(2).conversations[0][0].pictures  # type: ignore[index]


def test_kontext_imitates_and_travels(kontext: str, tmp_path: Path) -> None:
    talks = Talks(tuple((*tiny.talk("one", PICTURES[i]), Message("assistant", (tiny.picture(10 + i),))) for i in range(3)))
    tiny.assert_learns_and_travels(tiny.load(kontext, max_text_tokens=8), tmp_path, talks)


def test_several_pictures_are_refused(kontext: str) -> None:
    policy = tiny.load(kontext)
    two = Observation({}, None, ("x",), conversations=((Message("user", (*PICTURES[:2], "x")),),))
    with pytest.raises(MMRLError, match="shows several pictures"):
        policy.act(two, tiny.draws(0, 1), explore=True)
    mixed = Observation({}, None, ("x", "y"), conversations=(tiny.talk("x", PICTURES[0]), tiny.talk("y")))
    with pytest.raises(MMRLError, match="some prompts of a batch show a picture and others do not"):
        policy.act(mixed, tiny.draws(0, 2), explore=True)
