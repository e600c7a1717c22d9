"""What encoding pi0's image-text prefix once per decision is worth: acting, learning, and both together.

    python benchmarks/pi0.py [--checkpoint assets/tiny_pi0] [--batch 32 128] [--steps 4] [--epochs 2] [--seconds 2]

``once`` is what policies/pi0.py does: one prefix pass per decision, whose keys and values all denoising steps attend to and, the
vision-language model being frozen, all epochs of the update too. ``again`` encodes the prefix anew for every denoising step and
every pass of the update. Acting explores with Flow-SDE; an update scores one stochastic step per decision, there and back.
Acting and learning together are one decision acted and learned from ``--epochs`` times.

The floor is what no cache removes: the expert's passes. Its parts are timed apart - a prefix pass P, an expert pass E, an expert
pass with gradient G - and give what to expect: acting P + K E against K (P + E), learning G against P + G.

On a CPU the clock is the process's own processor time, so other programs hardly disturb it; on a GPU it is wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.numerics.draws import Draws
from mmrl.types import Observation
from policies.pi0 import Pi0
from policies.pi0_parts.prefix import Prefix

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Bench:
    """Two policies of equal weights, with and without the cached prefix, and what they look at."""

    once: Pi0
    again: Pi0
    seen: Observation
    seconds: float

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one call, the least disturbed of several."""
        cuda = self.once.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        run()
        calls, best, end = 0, float("inf"), clock() + self.seconds
        while calls < 3 or clock() < end:
            start = clock()
            run()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, clock() - start)
            calls += 1
        return best


def build(checkpoint: Path, steps: int, device: torch.device, **fields: Any) -> Pi0:
    pretrained = (checkpoint / "model.safetensors").is_file()
    config = Pi0.Config(
        checkpoint=str(checkpoint),
        weights="pretrained" if pretrained else "random",
        action_dim=None if pretrained else 4,
        sampler="flow_sde",
        noise_level=0.5,
        denoising_steps=steps,
        max_text_tokens=16,
        attention="eager" if device.type == "cpu" else "sdpa",
        **fields,
    )
    return Pi0(config, device=device)


@contextmanager
def encoding_at_every_step(policy: Pi0, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, every expert pass but the first of a decision (whose prefix is fresh) encodes the prefix before it runs."""
    expert, passes = policy._expert, 0

    def encode_first(prefix: Prefix, state_BS: Tensor, x_BHD: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal passes
        fresh = passes % policy.config.denoising_steps == 0
        passes += 1
        return expert(prefix if fresh else policy._encode(inputs), state_BS, x_BHD, t_B)

    policy._expert = encode_first  # type: ignore[method-assign]
    try:
        yield
    finally:
        policy._expert = expert  # type: ignore[method-assign]


def rows_of(bench: Bench) -> Draws:
    """Random numbers for the rows of the observation."""
    return Draws.of(0, torch.arange(bench.seen.batch_size, device=bench.seen.images["front"].device))


def act(bench: Bench, policy: Pi0) -> Callable[[], object]:
    draws = rows_of(bench)
    return lambda: policy.act(bench.seen, draws, explore=True)


def learn(bench: Bench, policy: Pi0) -> Callable[[], object]:
    """Forward and backward over a rollout of one decision per row."""
    trace: Any = policy.act(bench.seen, rows_of(bench), explore=True).trace

    def run() -> None:
        policy.zero_grad(set_to_none=True)
        with policy.compute_mode(train=True):
            policy.evaluate(trace).log_probs_NK.sum().backward()

    return run


def parts(bench: Bench) -> tuple[float, float, float]:
    """Seconds of a prefix pass, of an expert pass, and of an expert pass with its gradient."""
    policy = bench.once
    inputs = policy._inputs(bench.seen)
    with policy.compute_mode(train=False):
        prefix = policy._encode(inputs)
    x = torch.zeros(bench.seen.batch_size, policy.horizon, policy.model.config.max_action_dim, device=policy.device)
    t_B = x.new_full((len(x),), 0.5)

    def expert(*, train: bool) -> None:
        with policy.compute_mode(train=train):
            velocity, _ = policy._expert(prefix, inputs["state"], x, t_B)
            if train:
                policy.zero_grad(set_to_none=True)
                velocity.sum().backward()

    def encode() -> None:
        with policy.compute_mode(train=False):
            policy._encode(inputs)

    return bench.time(encode), bench.time(lambda: expert(train=False)), bench.time(lambda: expert(train=True))


def report(bench: Bench, epochs: int) -> None:
    batch, steps = bench.seen.batch_size, bench.once.config.denoising_steps
    prefix, expert, learning = parts(bench)
    act_once, learn_once = bench.time(act(bench, bench.once)), bench.time(learn(bench, bench.once))
    with encoding_at_every_step(bench.again, bench.again._inputs(bench.seen)):
        act_again = bench.time(act(bench, bench.again))
    learn_again = bench.time(learn(bench, bench.again))
    expected_act = (prefix + expert, prefix / steps + expert)
    rows = (
        ("act", act_again, act_once, expected_act[0] / expected_act[1]),
        ("learn", learn_again, learn_once, (prefix + learning) / learning),
        (
            f"act + {epochs} x learn",
            act_again + epochs * learn_again,
            act_once + epochs * learn_once,
            (steps * (prefix + expert) + epochs * (prefix + learning)) / (prefix + steps * expert + epochs * learning),
        ),
    )
    floor = f"prefix {1000 * prefix:.1f} ms, expert {1000 * expert:.1f} ms, with gradient {1000 * learning:.1f} ms"
    print(f"\nbatch {batch}: one pass of {floor}")
    print(f"{'decisions/s':>16} {'again':>10} {'once':>10} {'gain':>7} {'expected':>9}")
    for name, again, once, expected in rows:
        print(f"{name:>16} {batch / again:10,.0f} {batch / once:10,.0f} {again / once:6.2f}x {expected:8.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The gain from encoding pi0's prefix once per decision")
    default = ASSETS / ("tiny_pi0" if (ASSETS / "tiny_pi0").is_dir() else "tiny_pi0_architecture")
    parser.add_argument("--checkpoint", type=Path, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--epochs", type=int, default=2, help="updates from each decision")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    once = build(arguments.checkpoint, arguments.steps, device)
    again = build(arguments.checkpoint, arguments.steps, device, cache_prefix=False)
    where = f"{device}, {arguments.threads} thread(s), torch {torch.__version__}"
    print(f"{arguments.checkpoint.name}, {arguments.steps} steps, {where}")
    for batch in arguments.batch:
        report(Bench(once, again, once.example_observation(batch), arguments.seconds), arguments.epochs)


if __name__ == "__main__":
    main()
