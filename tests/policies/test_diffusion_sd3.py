"""A tiny Stable Diffusion 3: what it draws is what diffusers' own pipeline draws, and its likelihoods are the formulas'."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.protocols import LikelihoodPolicy, SupervisedPolicy, VelocityPolicy
from mmrl.types import Observation
from policies.diffusion import Diffusion
from tests.policies import tiny_diffusion as tiny


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


def pipelined(policy: Diffusion, draws: Draws, *, steps: int, guidance: float, output: str = "latent", tokens: int = 0) -> Any:
    """What diffusers' pipeline makes of the same noise and prompts."""
    kind = torch.promote_types(policy.network.dtype, torch.float32)
    noise = draws.normal(*policy.family.latent_shape, dtype=kind).to(policy.network.dtype)
    pipeline = policy.family.pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(tiny.TEXTS),
        height=tiny.SIZE,
        width=tiny.SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type=output,
        max_sequence_length=tokens,
    ).images


# -- against diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "steps", "guidance"),
    [
        ({}, tiny.STEPS, 3.0),
        ({"guidance_detached": True}, tiny.STEPS, 3.0),
        ({"guidance": 1.0}, tiny.STEPS, 1.0),
        ({"evaluation_steps": 7, "evaluation_guidance": 5.0}, 7, 5.0),
    ],
    ids=["guided", "branches apart", "no guidance", "steps of evaluation"],
)
def test_without_exploration_it_draws_what_the_pipeline_draws(
    sd3: str, fields: dict[str, Any], steps: int, guidance: float
) -> None:
    policy = tiny.build(sd3, **fields)
    made = policy.act(tiny.observe(), tiny.draws(), explore=False)
    images = pipelined(policy, tiny.draws(), steps=steps, guidance=guidance, output="np")
    theirs = torch.from_numpy(images * 255).round().long()
    assert (tiny.pixels(made.action) - theirs).abs().max() <= 1
    assert theirs.float().std() > 5


@pytest.mark.parametrize("scheduler", [{}, {"shift": 1.0}, {"use_dynamic_shifting": True, "shift": 1.0}])
def test_the_ode_ends_where_the_pipeline_ends(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    policy = tiny.build(tiny.write_sd3(tmp_path, **scheduler), sampler="ode")
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    theirs = pipelined(policy, tiny.draws(), steps=tiny.STEPS, guidance=3.0)
    torch.testing.assert_close(made.trace["clean"], theirs, rtol=0, atol=1e-5)


def test_noise_that_vanishes_leads_where_the_pipeline_leads(sd3: str) -> None:
    policy = tiny.build(sd3, noise_level=1e-7)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    theirs = pipelined(policy, tiny.draws(), steps=tiny.STEPS, guidance=3.0)
    torch.testing.assert_close(made.trace["clean"], theirs, rtol=0, atol=1e-5)


def test_max_text_tokens_are_the_pipeline_s(sd3: str) -> None:
    policy, other = tiny.build(sd3, max_text_tokens=None, sampler="ode"), tiny.build(sd3, sampler="ode")
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    theirs = pipelined(policy, tiny.draws(), steps=tiny.STEPS, guidance=3.0, tokens=256)
    torch.testing.assert_close(made.trace["clean"], theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(other.act(tiny.observe(), tiny.draws(), explore=True).trace["clean"], theirs, atol=1e-3)


# -- likelihoods -------------------------------------------------------------------------------------------------------


def formula(rule: str, x: float, v: float, t: float, t_next: float, a: float) -> tuple[float, float]:
    """Mean and std of one number, as the papers print them (METHODS 4.1 to 4.3), with the guard of the first step."""
    dt = t_next - t
    if rule == "cps":
        std = t_next * math.sin(a * math.pi / 2)
        return (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - std**2) * (x + (1 - t) * v), std
    sigma = a if rule == "constant" else a * math.sqrt(t / (1 - (t_next if t == 1 else t)))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * math.sqrt(-dt)


@pytest.mark.parametrize("rule", ["flow_sde", "cps", "constant"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_probs_are_the_formulas(sd3: str, rule: str, reduction: str) -> None:
    """A loop over single numbers in float64, with velocities from the network itself."""
    policy = tiny.build(sd3, sampler=rule, noise_level=0.6, dtype="float64", guidance=1.0, reduction=reduction)
    policy.family.pipeline.scheduler.set_timesteps(tiny.STEPS)
    sigmas = policy.family.pipeline.scheduler.sigmas.double()
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    for b, text in enumerate(tiny.TEXTS[:2]):
        embeds, _, pooled, _ = policy.family.pipeline.encode_prompt(
            [text], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        assert made.trace["step"][b].tolist() == [0, 1, 2]
        for k in range(3):
            x, x_next = made.trace["x_before"][b, k], made.trace["x_after"][b, k]
            v = policy.network(x[None], embeds, pooled, sigmas[k, None] * 1000, return_dict=False)[0][0]
            t, t_next = float(sigmas[k]), float(sigmas[k + 1])
            total, means = 0.0, []
            for x_i, v_i, next_i in zip(x.flatten().tolist(), v.flatten().tolist(), x_next.flatten().tolist(), strict=True):
                mean, std = formula(rule, x_i, v_i, t, t_next, 0.6)
                means.append(mean)
                total += -math.log(std) - 0.5 * math.log(2 * math.pi) - 0.5 * ((next_i - mean) / std) ** 2
            expected = total / x.numel() if reduction == "mean" else total
            assert float(made.log_probs_BK[b, k]) == pytest.approx(expected, rel=1e-9)
            assert made.means_BKD is not None
            torch.testing.assert_close(made.means_BKD[b, k], torch.tensor(means, dtype=torch.float64), rtol=1e-9, atol=1e-9)
            scored = policy.evaluate(made.trace)
            assert scored.stds_NK is not None and scored.deltas_NK is not None
            assert float(scored.stds_NK[b, k]) == pytest.approx(formula(rule, 0, 0, t, t_next, 0.6)[1])
            assert float(scored.deltas_NK[b, k]) == pytest.approx(t - t_next)


FIELDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
    "no guidance": {"guidance": 1.0},
    "branches apart": {"guidance_detached": True},
    "adapters": {"train": "lora"},
    "text encoders learn": {"train": "text_encoders"},
    "checkpointing": {"checkpointing": True},
    "all steps": {"trained_steps": {"which": "all"}},
    "window": {"trained_steps": {"which": "window", "size": 2, "start": 1}},
    "one prefix": {"trained_steps": {"which": "window", "size": 2, "start": 1, "shared_prefix": True}},
    "random steps": {"trained_steps": {"which": "random", "size": 2}},
    "cps": {"sampler": "cps"},
    "no cache": {"cached_prompts": 0},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=list(FIELDS))
def test_scoring_again_equals_acting(sd3: str, fields: dict[str, Any]) -> None:
    tiny.assert_replays(tiny.build(sd3, **fields))


def test_in_bf16_states_are_rounded_before_they_are_scored(sd3: str) -> None:
    policy = tiny.build(sd3, dtype="bfloat16")
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    after = made.trace["x_after"]
    assert isinstance(after, Tensor) and after.dtype == torch.bfloat16
    assert made.log_probs_BK.dtype == made.means_BKD.dtype == torch.float32  # type: ignore[union-attr]
    std = policy.evaluate(made.trace).stds_NK
    assert std is not None
    residual = (after.flatten(2).float() - made.means_BKD) / std[..., None]
    expected = -std.log() - 0.5 * math.log(2 * math.pi) - 0.5 * residual.pow(2).mean(2)
    torch.testing.assert_close(made.log_probs_BK, expected, rtol=1e-5, atol=1e-5)


def test_what_is_drawn_has_the_mean_and_std_it_is_scored_with(sd3: str) -> None:
    policy = tiny.build(sd3, trained_steps={"which": "window", "size": 1, "start": 1}, guidance=1.0)
    made = policy.act(tiny.observe(("a red circle",) * 64), tiny.draws(2, 64), explore=True)
    scored = policy.evaluate(made.trace)
    assert scored.stds_NK is not None and made.means_BKD is not None
    after = made.trace["x_after"]
    assert isinstance(after, Tensor)
    unit = (after.flatten(2) - made.means_BKD) / scored.stds_NK[..., None]
    assert abs(float(unit.mean())) < 0.03 and float(unit.std()) == pytest.approx(1, abs=0.03)


def test_what_is_drawn_goes_on_from_where_it_was_drawn(sd3: str) -> None:
    made = tiny.build(sd3).act(tiny.observe(), tiny.draws(), explore=True)
    assert torch.equal(made.trace["x_after"][:, :-1], made.trace["x_before"][:, 1:])


@pytest.mark.parametrize(("rule", "trained"), [("flow_sde", True), ("cps", False)])
def test_a_last_step_without_noise_is_not_trained(sd3: str, rule: str, trained: bool) -> None:
    policy = tiny.build(sd3, sampler=rule, trained_steps={"which": "all"})
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert made.mask_BK.tolist() == [[True] * (tiny.STEPS - 1) + [trained]] * len(tiny.TEXTS)
    assert trained or bool((made.log_probs_BK[:, -1] == 0).all())
    left_out = tiny.build(sd3, sampler=rule).act(tiny.observe(), tiny.draws(), explore=True)
    assert left_out.mask_BK.shape == (len(tiny.TEXTS), tiny.STEPS - 1) and bool(left_out.mask_BK.all())


# -- batches and random numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("fields", [{}, FIELDS["one prefix"], FIELDS["text encoders learn"]], ids=["plain", "prefix", "text"])
def test_a_picture_does_not_depend_on_the_batch(sd3: str, explore: bool, fields: dict[str, Any]) -> None:
    policy = tiny.build(sd3, **fields)
    seen, index = tiny.observe(), torch.tensor([3, 1])
    together = policy.act(seen, tiny.draws(1), explore=explore)
    apart = policy.act(seen.select(index), tiny.draws(1).select(index), explore=explore)
    assert (tiny.pixels(apart.action) - tiny.pixels(together.action)[index]).abs().max() <= 1
    torch.testing.assert_close(apart.log_probs_BK, together.log_probs_BK[index], rtol=1e-4, atol=1e-4)
    if explore:
        torch.testing.assert_close(apart.trace["clean"], together.trace["clean"][index], rtol=1e-4, atol=1e-4)
    other = policy.act(seen, tiny.draws(2), explore=explore)
    assert (tiny.pixels(other.action) - tiny.pixels(together.action)).abs().max() > 5


def test_without_exploration_the_same_draws_give_the_same_first_noise(sd3: str) -> None:
    policy = tiny.build(sd3)
    first, again = (policy.act(tiny.observe(), tiny.draws(1), explore=False) for _ in range(2))
    assert torch.equal(tiny.pixels(first.action), tiny.pixels(again.action))


def test_scoring_alone_equals_scoring_together(sd3: str) -> None:
    policy = tiny.build(sd3)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    whole = policy.evaluate(made.trace).log_probs_NK
    for b in range(len(tiny.TEXTS)):
        alone = policy.evaluate({name: values[b : b + 1] for name, values in made.trace.items()}).log_probs_NK
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-5, atol=1e-5)


# -- prompts ---------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once_as_long_as_there_is_room(sd3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = tiny.build(sd3, cached_prompts=2), []
    encode = policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda texts, **how: (asked.extend(texts), encode(texts, **how))[1])

    def act(*texts: str) -> list[str]:
        asked.clear()
        policy.act(tiny.observe(texts), tiny.draws(0, len(texts)), explore=True)
        return list(asked)

    assert act("a", "b", "a") == ["a", "b", ""]
    assert act("b", "a", "a") == []
    assert act("c") == ["c"]
    assert act("a") == [] and act("b") == ["b"]  # b was used longest ago


def test_the_prompt_matters(sd3: str) -> None:
    policy = tiny.build(sd3)
    first, second = (policy.act(tiny.observe((t,)), tiny.draws(0, 1), explore=False) for t in ("a red circle", "one"))
    assert not torch.equal(tiny.pixels(first.action), tiny.pixels(second.action))


# -- guidance ------------------------------------------------------------------------------------------------------------


def test_a_detached_branch_changes_the_gradient_and_nothing_else(sd3: str) -> None:
    """The gradient is that of scale times the conditional branch, which a naive sum of both shows."""
    policy, whole = (tiny.build(sd3, guidance_detached=detached, dtype="float64") for detached in (True, False))
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    scored, both = policy.evaluate(made.trace), whole.evaluate(made.trace)
    torch.testing.assert_close(scored.log_probs_NK, both.log_probs_NK, rtol=1e-10, atol=1e-10)
    scored.log_probs_NK.sum().backward()
    both.log_probs_NK.sum().backward()
    ours = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    theirs = torch.cat([p.grad.flatten() for p in whole.parameters() if p.grad is not None])
    assert (ours - theirs).abs().max() > 1e-3
    # The unconditional branch alone, as far as it is differentiated: the difference of the two gradients.
    twin = tiny.build(sd3, dtype="float64")
    x, t = made.trace["x_before"][:, 1], torch.full((5,), 0.7, dtype=torch.float64)
    velocity = [p.velocity(made.trace, x, t, guidance=3.0) for p in (policy, twin)]
    torch.testing.assert_close(velocity[0], velocity[1], rtol=1e-10, atol=1e-10)


def test_guidance_is_that_of_the_paper(sd3: str) -> None:
    policy = tiny.build(sd3)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    x, t = made.trace["x_before"][:, 1], torch.linspace(0.2, 0.9, 5)
    conditional = policy.velocity(made.trace, x, t)
    assert torch.equal(policy.velocity(made.trace, x, t, guidance=1.0), conditional)
    nothing = policy.act(tiny.observe(("",) * 5), tiny.draws(), explore=True)
    unconditional = policy.velocity(nothing.trace, x, t)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(policy.velocity(made.trace, x, t, guidance=2.5), expected, rtol=1e-4, atol=1e-5)


# -- references, twins and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "lora", "text_encoders"])
def test_a_reference_scores_alike_and_does_not_learn(sd3: str, train: str) -> None:
    policy = tiny.build(sd3, train=train)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    reference = policy.reference()
    assert reference.family.network is reference.network
    assert not any(p.requires_grad for p in reference.parameters())
    scored = reference.evaluate(made.trace).log_probs_NK
    assert torch.equal(scored, made.log_probs_BK)
    with torch.no_grad():
        for parameters in policy.trainable().values():
            for p in parameters:
                p += 0.1 * torch.randn_like(p)
    assert torch.equal(reference.evaluate(made.trace).log_probs_NK, scored)
    assert not torch.allclose(policy.evaluate(made.trace).log_probs_NK, scored, atol=1e-3)


def test_a_reference_shares_what_does_not_learn(sd3: str) -> None:
    policy = tiny.build(sd3, train="lora")
    reference = policy.reference()
    ours, theirs = dict(policy.network.named_parameters()), dict(reference.network.named_parameters())
    assert all((theirs[name] is p) != ("lora" in name) for name, p in ours.items()) and any("lora" in name for name in ours)
    assert reference.family.pipeline.vae is policy.family.pipeline.vae
    assert reference.family.pipeline.text_encoder is policy.family.pipeline.text_encoder


def test_adapters_alone_learn(sd3: str) -> None:
    policy = Diffusion(tiny.config(sd3, train="lora"), device=tiny.CPU)
    plain = Diffusion(tiny.config(sd3), device=tiny.CPU)
    groups = policy.trainable()
    assert set(groups) == {"actor"} and {id(p) for p in groups["actor"]} == {
        id(p) for n, p in policy.named_parameters() if "lora" in n
    }
    made = [p.act(tiny.observe(), tiny.draws(), explore=True).trace["clean"] for p in (policy, plain)]
    torch.testing.assert_close(made[0], made[1])  # a fresh adapter adds nothing


@pytest.mark.parametrize("train", ["all", "lora", "text_encoders"])
def test_what_is_saved_is_a_pipeline_of_diffusers(
    sd3: str, tmp_path: Path, train: str, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = tiny.build(sd3, train=train)
    if train == "text_encoders":
        with torch.no_grad():
            policy.family.pipeline.text_encoder.text_model.embeddings.token_embedding.weight.mul_(1.5)
    capfd.readouterr()
    policy.save(tmp_path / "saved")
    assert "cannot be saved" not in capfd.readouterr().err  # an SD3 without T5 is whole
    opened = DiffusionPipeline.from_pretrained(tmp_path / "saved", text_encoder_3=None, tokenizer_3=None)
    assert isinstance(opened, StableDiffusion3Pipeline)
    opened.set_progress_bar_config(disable=True)
    made = policy.act(tiny.observe(), tiny.draws(), explore=False)
    noise = tiny.draws().normal(*policy.family.latent_shape)
    images = opened(
        list(tiny.TEXTS),
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise,
        output_type="np",
        max_sequence_length=0,
    ).images
    assert (tiny.pixels(made.action) - torch.from_numpy(images * 255).round().long()).abs().max() <= 1
    loaded = Diffusion(tiny.config(str(tmp_path / "saved"), weights="pretrained"), device=tiny.CPU)
    again = loaded.act(tiny.observe(), tiny.draws(), explore=False)
    assert (tiny.pixels(made.action) - tiny.pixels(again.action)).abs().max() <= 1
    assert policy.family.network is policy.network  # saving left the policy as it was
    tiny.assert_replays(policy)


def test_a_state_dict_makes_the_same_policy(sd3: str) -> None:
    policy, twin = tiny.build(sd3), tiny.build(sd3)
    tiny.stir(twin, seed=11)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert not torch.equal(twin.evaluate(made.trace).log_probs_NK, made.log_probs_BK)
    assert twin.fingerprint() == policy.fingerprint() and "\n" not in policy.fingerprint()
    twin.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    assert torch.equal(twin.evaluate(made.trace).log_probs_NK, made.log_probs_BK)


def test_a_vae_that_is_there_is_kept_by_random_weights(sd3: str, tmp_path: Path) -> None:
    policy = tiny.build(sd3)
    policy.save(tmp_path / "saved")
    fresh = [Diffusion(tiny.config(str(tmp_path / "saved"), seed=seed), device=tiny.CPU) for seed in (1, 2)]
    for other in fresh:
        ours, theirs = policy.family.pipeline.vae.state_dict(), other.family.pipeline.vae.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        weight = other.network.state_dict()["transformer_blocks.0.attn.to_q.weight"]
        assert not torch.equal(weight, policy.network.state_dict()["transformer_blocks.0.attn.to_q.weight"])
    assert not torch.equal(*(f.network.state_dict()["transformer_blocks.0.attn.to_q.weight"] for f in fresh))


def test_trainable_groups_are_disjoint_and_complete(sd3: str) -> None:
    for train in ("all", "lora", "text_encoders"):
        policy = tiny.build(sd3, train=train)
        listed = [id(p) for parameters in policy.trainable().values() for p in parameters]
        assert len(listed) == len(set(listed)) > 0 and set(listed) == {id(p) for p in policy.parameters() if p.requires_grad}
    assert set(policy.trainable()) == {"actor", "embedding", "text_encoders"}


# -- promises and refusals -------------------------------------------------------------------------------------------------


def test_it_keeps_the_protocols(sd3: str) -> None:
    policy = tiny.build(sd3)
    assert isinstance(policy, LikelihoodPolicy) and isinstance(policy, SupervisedPolicy) and isinstance(policy, VelocityPolicy)
    assert policy.act(policy.example_observation(3), tiny.draws(0, 3), explore=False).trace == {}
    policy.version = 17
    made = policy.act(policy.example_observation(3), tiny.draws(0, 3), explore=True)
    assert made.policy_version == 17 and not made.log_probs_BK.requires_grad


def test_what_only_follows_the_ode_lacks_a_likelihood(sd3: str) -> None:
    assert set(Diffusion.lacks(tiny.config(sd3, sampler="ode"))) == {"critic", "likelihood"}
    assert set(Diffusion.lacks(tiny.config(sd3))) == {"critic"}
    assert set(Diffusion.lacks(tiny.config(sd3, reduction="sum"))) == {"critic", "means"}
    policy = tiny.build(sd3, sampler="ode")
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert set(made.trace) == {"clean", "prompt"} and made.log_probs_BK.tolist() == [[0.0]] * 5
    assert policy.evaluate(made.trace).log_probs_NK.tolist() == [[0.0]] * 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"noise_level": None}, "noise_level must be above 0"),
        ({"sampler": "ode", "noise_level": 0.5}, "noise_level is not used"),
        ({"sampler": "cps", "noise_level": 1.5}, "at most 1"),
        ({"sampler": "ode", "noise_level": None, "evaluation_sampler": "rollout"}, "evaluation_sampler must be 'ode'"),
        ({"evaluation_sampler": "rollout", "evaluation_steps": 8}, "evaluation_steps is not used with"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"trained_steps": {"which": "window"}}, "size is missing"),
        ({"trained_steps": {"which": "all", "size": 2}}, "size is not used"),
        ({"trained_steps": {"which": "random", "size": 2, "shared_prefix": True}}, "shared_prefix is not used"),
        ({"trained_steps": {"which": "window", "size": 4}}, "more than the 3"),
        ({"trained_steps": {"which": "window", "size": 1, "stop": 4}}, "at most 3"),
        ({"sampler": "ode", "noise_level": None, "trained_steps": {"which": "all"}}, "trained_steps is not used"),
    ],
)
def test_fields_that_do_not_fit_are_refused(sd3: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Diffusion.Config(**{"checkpoint": sd3, "noise_level": 0.7, "steps": 4, **fields})


def test_what_it_cannot_read_is_refused_in_a_sentence(sd3: str, tmp_path: Path) -> None:
    with pytest.raises(MMRLError, match="is no checkpoint in diffusers' format"):
        Diffusion(tiny.config(str(tmp_path)), device=tiny.CPU)
    with pytest.raises(MMRLError, match="is no folder here, and the hub gave no checkpoint in diffusers' format"):
        Diffusion(tiny.config(str(tmp_path / "nowhere")), device=tiny.CPU)
    with pytest.raises(MMRLError, match="cannot be loaded"):
        Diffusion(tiny.config(sd3, weights="pretrained"), device=tiny.CPU)
    with pytest.raises(MMRLError, match=r"policy\.height = 20 is no multiple of 8"):
        Diffusion(tiny.config(sd3, height=20), device=tiny.CPU)
    with pytest.raises(MMRLError, match=r"policy\.sampler = 'ddim' is not for a StableDiffusion3Pipeline"):
        Diffusion(tiny.config(sd3, sampler="ddim"), device=tiny.CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    with pytest.raises(MMRLError, match="is a AllegroPipeline, not one of"):
        Diffusion(tiny.config(str(tmp_path)), device=tiny.CPU)
    policy = tiny.build(sd3)
    with pytest.raises(MMRLError, match="the environment shows none"):
        policy.act(Observation({}, None, ("draw",)), tiny.draws(0, 1), explore=True)
    with pytest.raises(MMRLError, match="reads text alone"):
        policy.act(tiny.observe(("a",), (tiny.picture(0),)), tiny.draws(0, 1), explore=True)
    with pytest.raises(MMRLError, match="no message of the user"):
        policy.act(Observation({}, None, ("",), conversations=((Message("system", ("x",)),),)), tiny.draws(0, 1), explore=True)
