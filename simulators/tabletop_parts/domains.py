"""The two worlds: ``sim``, and ``real``, a stand-in for the physical one that a policy knows only from demonstrations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """How a world looks and moves. Lengths are in workspace units, image quantities in fractions of the image size."""

    # camera
    zoom: float  # image widths per workspace unit
    left: float  # where x = 0 is drawn, from the left edge
    bottom: float  # where y = 0, z = 0 is drawn, from the top edge
    squash: float  # image height of one unit of y, relative to one unit of x
    # light and table
    gain: tuple[float, float, float]  # of red, green and blue
    gain_spread: float  # each episode is brighter or darker by up to this much
    gradient: float  # brightness lost from the left edge of the table to the right one
    table: tuple[tuple[int, int, int], tuple[int, int, int]]  # the two tones of the texture
    stripes: bool  # stripes, else a chequerboard
    # dynamics
    delayed: bool  # an action takes effect one step late
    action_noise: float  # standard deviation added to each motion command
    push_grip: float  # share of a push that the block follows at once
    push_drift: float  # largest sideways slip of a pushed block, relative to the push
    patience: float  # default time limits, relative to those of the simulated world


DOMAINS = {
    "sim": Domain(
        zoom=0.92,
        left=0.04,
        bottom=0.95,
        squash=0.84,
        gain=(1.0, 1.0, 1.0),
        gain_spread=0.04,
        gradient=0.0,
        table=((176, 170, 160), (168, 162, 152)),
        stripes=False,
        delayed=False,
        action_noise=0.0,
        push_grip=1.0,
        push_drift=0.0,
        patience=1.0,
    ),
    "real": Domain(
        zoom=0.86,
        left=0.09,
        bottom=0.91,
        squash=0.80,
        gain=(0.92, 0.84, 0.74),
        gain_spread=0.12,
        gradient=0.35,
        table=((150, 118, 84), (128, 98, 68)),
        stripes=True,
        delayed=True,
        action_noise=0.05,
        push_grip=0.9,
        push_drift=0.1,
        patience=1.5,
    ),
}
