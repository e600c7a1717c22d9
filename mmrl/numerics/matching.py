"""What velocity fields are regressed on, and preferences between pictures: algorithms that know no likelihood.

As in ``flow``: x_t = (1 - t) x0 + t noise, v = noise - x0, t = 1 is noise. N samples of any shape [N, ...]; t_N one time each.
Computed in float32, or float64 where x0 is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmrl.numerics.flow import clean_estimate


def shifted(u: Tensor, shift: float) -> Tensor:
    """The time at position u of a schedule with this shift, shift u / (1 + (shift - 1) u); 1: as it is (arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(t: Tensor, shift: float) -> Tensor:
    """The position of time t in such a schedule: the inverse of ``shifted``."""
    return t / (shift - (shift - 1) * t)


def per_sample(x: Tensor) -> Tensor:
    """The mean of each sample: [N]."""
    return x.flatten(1).mean(1)


def matching_error(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow matching's loss, mean (v - (noise - x0))^2 of each sample: [N]."""
    dtype = torch.promote_types(x0.dtype, torch.float32)
    return per_sample((velocity.to(dtype) - (noise.to(dtype) - x0.to(dtype))) ** 2)


def clean_error(velocity: Tensor, x_t: Tensor, x0: Tensor, t_N: Tensor, *, smallest: float = 1e-5) -> Tensor:
    """DiffusionNFT's distance, mean e^2 / sg(mean |e|) of each sample with e = x_t - t v - x0: [N]. The divisor is at least
    ``smallest``."""
    error = clean_estimate(x_t, velocity, t_N) - x0
    size_N = per_sample(error.detach().abs()).clamp(min=smallest)
    return per_sample(error**2) / size_N


def nft_loss(
    velocity: Tensor, old: Tensor, x_t: Tensor, x0: Tensor, t_N: Tensor, preference_N: Tensor, *, strength: float
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117): (r d(v+) + (1 - r) d(v-)) / B of each sample, [N], d as in ``clean_error``.

    v+ = B v + (1 - B) v_old and v- = (1 + B) v_old - B v, with B = strength; r = preference_N, 0 to 1.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    velocity, old = velocity.to(dtype), old.to(dtype)
    liked_N = clean_error(strength * velocity + (1 - strength) * old, x_t, x0, t_N)
    disliked_N = clean_error((1 + strength) * old - strength * velocity, x_t, x0, t_N)
    return (preference_N * liked_N + (1 - preference_N) * disliked_N) / strength


def matching_log_prob(error: Tensor, t: Tensor, *, weighting: str, power: float = 0.25) -> Tensor:
    """AWM's stand-in for a log-probability: minus a weighted flow-matching error l at time t, of any shape.

    uniform: -l; time: -t l; time_squared: -t^2 l; huber: -t (sqrt(l + e) - sqrt(e)); power: -t ((l + e)^p - e^p) / p, with e =
    1e-10. The last two are in the style of AWM's Huber losses, of which only the names and p = 0.25 are known.
    """
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"matching_log_prob's weighting {weighting!r} is unknown; use one of {', '.join(sorted(_WEIGHTINGS))}")
    return -_WEIGHTINGS[weighting](error, t, power)


_E = 1e-10  # so that a root has a derivative at 0


_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "uniform": lambda error, t, power: error,
    "time": lambda error, t, power: t * error,
    "time_squared": lambda error, t, power: t**2 * error,
    "huber": lambda error, t, power: t * ((error + _E).sqrt() - _E**0.5),
    "power": lambda error, t, power: t * ((error + _E) ** power - _E**power) / power,
}


def dpo_margin(best_P: Tensor, worst_P: Tensor, best_reference_P: Tensor, worst_reference_P: Tensor, *, beta: float) -> Tensor:
    """Diffusion-DPO's (arXiv 2311.12908) logit of P pairs: -beta / 2 ((e_w - e_w_ref) - (e_l - e_l_ref)), errors e: [P]."""
    return -beta / 2 * ((best_P - best_reference_P) - (worst_P - worst_reference_P))


def dpo_loss(margin_P: Tensor) -> Tensor:
    """-log sigmoid of each margin: [P]."""
    return -logsigmoid(margin_P)


def soar_point(
    clean: Tensor, noise: Tensor, rolled: Tensor, from_N: Tensor, to_N: Tensor, *, smallest: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """SOAR's further training point: what was rolled out to time s1 = from_N, noised again to s' = to_N, and where to go there.

    z_s' = (1 - a) z' + a noise with a = (s' - s1) / (1 - s1), and the velocity (z_s' - z0) / s', which leads to z0: that of flow
    matching where the rollout z' was exact. s' counts as at least ``smallest`` in the quotient.
    """
    dtype = torch.promote_types(clean.dtype, torch.float32)

    def wide(x_N: Tensor) -> Tensor:
        return x_N.to(dtype).reshape(-1, *[1] * (clean.dim() - 1))

    share = (wide(to_N) - wide(from_N)) / (1 - wide(from_N))
    point = (1 - share) * rolled.to(dtype) + share * noise.to(dtype)
    return point, (point - clean.to(dtype)) / wide(to_N).clamp(min=smallest)
