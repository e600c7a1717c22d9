"""Other weights of the policy that is trained: those it had at the last rollout, or a running average of them.

A copy of a whole policy would hold encoders and decoders twice. Only what is trained differs, so only that is kept, and the
policy puts it on for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mmrl.protocols import Decay, VelocityPolicy
from mmrl.types import Trace


class Frozen:
    """The velocity field of a policy that is not trained, without gradients (see mmrl.protocols.VelocityField)."""

    def __init__(self, policy: VelocityPolicy) -> None:
        self._policy = policy

    def velocity(self, trace: Trace, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        with self._policy.compute_mode(train=False), torch.no_grad():
            return self._policy.velocity(trace, x_t, t_N, guidance=guidance)


class Snapshot:
    """Trained weights of ``policy`` as they were: a running average of which ``decay(n)`` is kept at iteration n.

    It starts with the weights as they are. Kept in float32 or better, so that an average of weights in bfloat16 moves at all.
    """

    def __init__(self, policy: VelocityPolicy, decay: Decay) -> None:
        self._policy, self._decay = policy, decay
        parameters = {id(p): p for group in policy.trainable().values() for p in group}
        self._parameters = list(parameters.values())
        self._weights = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters]

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """Go on to the weights as they are, as far as the decay lets it."""
        decay = self._decay(iteration)
        for kept, now in zip(self._weights, self._parameters, strict=True):
            kept.lerp_(now.to(kept.dtype), 1 - decay)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The policy has these weights within the scope, and what it had before after it. Nothing of it may be trained there.

        Autocast keeps what it has cast of a parameter until its outermost scope ends, so it is told to forget it.
        """
        trained = [p.data for p in self._parameters]
        try:
            torch.clear_autocast_cache()
            for parameter, kept in zip(self._parameters, self._weights, strict=True):
                parameter.data = kept.to(parameter.dtype)
            yield
        finally:
            torch.clear_autocast_cache()
            for parameter, data in zip(self._parameters, trained, strict=True):
                parameter.data = data

    def velocity(self, trace: Trace, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        """The field of these weights, without gradients (see mmrl.protocols.VelocityField)."""
        with self.worn():
            return Frozen(self._policy).velocity(trace, x_t, t_N, guidance=guidance)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{index:06d}": weight for index, weight in enumerate(self._weights)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.state_dict().items():
            weight.copy_(state[name])
