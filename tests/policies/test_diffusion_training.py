"""What image generators learn from pictures: flow matching against a naive loop, and the parts of it one may get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.types import Talks
from policies.diffusion import Diffusion
from tests.policies import tiny_diffusion as tiny


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(policy: Diffusion, talks: Talks) -> Tensor:
    """The pictures' latents, by diffusers' VAE and its config alone."""
    vae, rows = policy.family.pipeline.vae, []
    for talk in talks.conversations:
        pixels = torch.frombuffer(bytearray(talk[-1].pictures[0].image.tobytes()), dtype=torch.uint8)
        image = pixels.reshape(1, tiny.SIZE, tiny.SIZE, 3).permute(0, 3, 1, 2) / 127.5 - 1
        mean = vae.encode(image.to(vae.dtype)).latent_dist.mean
        rows.append((mean - vae.config.shift_factor) * vae.config.scaling_factor)
    return torch.cat(rows)


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_loss_is_flow_matching(sd3: str, times: str, dropout: float) -> None:
    policy = tiny.build(sd3, dtype="float64", flow_times=times, prompt_dropout=dropout)
    policy.family.pipeline.vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    talks = tiny.lessons(4)
    loss = policy.supervised_loss(talks, seeded(5))
    clean, generator = encoded(policy, talks), seeded(5)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(4, generator=generator, dtype=torch.float64)
    dropped = (torch.rand(4, generator=generator) < dropout).tolist()
    assert dropout == 0 or 0 < sum(dropped) < 4
    total = 0.0
    for b, talk in enumerate(talks.conversations):
        u = 1 / (1 + torch.exp(-normal[b])) if times == "logit_normal" else torch.distributions.Normal(0, 1).cdf(normal[b])
        t = 3 * u / (1 + 2 * u)  # the scheduler's shift is 3
        text = "" if dropped[b] else talk[0].text
        embeds, _, pooled, _ = policy.family.pipeline.encode_prompt(
            [text], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        x = (1 - t) * clean[b : b + 1] + t * noise[b : b + 1]
        v = policy.network(x, embeds, pooled, t[None] * 1000, return_dict=False)[0]
        total += float((v - (noise[b] - clean[b])).pow(2).mean())
    assert float(loss.value.detach()) == pytest.approx(total / 4, rel=1e-9)
    assert policy.supervised_weight(talks).tolist() == [1.0] * 4 and not policy.needs_statistics()


def test_a_perfect_velocity_has_no_loss(sd3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.build(sd3, dtype="float64", prompt_dropout=0.0)
    talks = tiny.lessons(3)
    clean = policy.clean(policy.examine(talks))

    def perfect(x: Tensor, time: Tensor, *_: Any) -> Tensor:
        t = (time / 1000)[:, None, None, None]
        return (x - clean) / t  # x = (1 - t) clean + t noise, so this is noise - clean

    monkeypatch.setattr(policy.family, "predict", perfect)
    assert float(policy.supervised_loss(talks, seeded()).value) == pytest.approx(0, abs=1e-18)


def test_shifted_times_are_the_scheduler_s(sd3: str) -> None:
    """Of uniform times, what the scheduler's own sigmas are of evenly spaced ones."""
    policy = tiny.build(sd3)
    scheduler = policy.family.pipeline.scheduler
    even = torch.arange(1000, 0, -1) / 1000
    fresh = type(scheduler)(shift=3.0)
    torch.testing.assert_close(policy.family.shift(even), fresh.sigmas, rtol=1e-5, atol=1e-6)


def test_learning_lowers_the_loss(sd3: str) -> None:
    policy = Diffusion(tiny.config(sd3, train="text_encoders", prompt_dropout=0.0), device=tiny.CPU)
    groups = policy.trainable()
    optimizer = torch.optim.Adam([p for group in groups.values() for p in group], lr=3e-3)
    talks, losses = tiny.lessons(4), []
    for step in range(40):
        loss = policy.supervised_loss(talks, seeded(step % 4)).value
        optimizer.zero_grad()
        loss.backward()
        if step == 30:
            assert all(any(float(p.grad.abs().max()) > 0 for p in group if p.grad is not None) for group in groups.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_frozen_text_encoders_get_no_gradient(sd3: str) -> None:
    policy = tiny.build(sd3)
    policy.supervised_loss(tiny.lessons(), seeded()).value.backward()
    assert all(p.grad is None for encoder in policy.family.text_encoders().values() for p in encoder.parameters())
    assert all(p.grad is None for p in policy.family.pipeline.vae.parameters())


def test_latents_are_kept_as_long_as_there_is_room(sd3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, plain, seen = tiny.build(sd3, cached_pictures=2, decode_batch=2), tiny.build(sd3), []
    encode = policy.family.encode_pixels
    monkeypatch.setattr(policy.family, "encode_pixels", lambda x: (seen.append(len(x)), encode(x))[1])
    talks = tiny.lessons(3)
    first = policy.examine(talks)
    assert seen == [2, 1]
    torch.testing.assert_close(first["clean"], plain.examine(talks)["clean"], rtol=1e-5, atol=1e-5)
    policy.examine(talks.select(torch.tensor([1, 2, 2])))
    assert seen == [2, 1]
    assert torch.equal(policy.examine(talks)["clean"][1:], first["clean"][1:]) and seen == [2, 1, 1]


def test_what_is_examined_can_be_asked_for_its_velocity(sd3: str) -> None:
    policy = tiny.build(sd3)
    talks = tiny.lessons(3)
    trace = policy.examine(talks)
    assert torch.equal(policy.clean(trace), trace["clean"]) and not policy.clean(trace).requires_grad
    torch.testing.assert_close(trace["clean"], encoded(policy, talks), rtol=1e-5, atol=1e-5)
    t = torch.tensor([0.3, 0.6, 0.9])
    x = policy.clean(trace) * 0.5
    velocity = policy.velocity(trace, x, t)
    for b, talk in enumerate(talks.conversations):
        embeds, _, pooled, _ = policy.family.pipeline.encode_prompt(
            [talk[0].text], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        alone = policy.network(x[b : b + 1], embeds, pooled, t[b, None] * 1000, return_dict=False)[0]
        torch.testing.assert_close(velocity[b : b + 1], alone, rtol=1e-4, atol=1e-5)
    velocity.sum().backward()
    assert any(p.grad is not None for p in policy.network.parameters())


def test_a_picture_of_another_size_is_resized(sd3: str) -> None:
    policy = tiny.build(sd3)
    large = (*tiny.talk("a red circle"), Message("assistant", (tiny.picture(1, 48),)))
    assert policy.clean(policy.examine(Talks((large,)))).shape == (1, *policy.family.latent_shape)


def test_a_lesson_without_a_picture_is_refused(sd3: str) -> None:
    policy = tiny.build(sd3)
    with pytest.raises(MMRLError, match="shows no picture of the assistant"):
        policy.supervised_loss(Talks(((*tiny.talk("a"), Message("assistant", ("here",))),)), seeded())
