"""A rollout as a small animated picture that any browser plays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from mmrl.report.files import replacing

SUCCESS, FAILURE = (10, 138, 94), (206, 66, 32)  # a green and an orange-red that red-green blindness tells apart by lightness
LAST_FRAME_MS = 1200


def write_animation(path: Path, frames_THWC: Tensor, fps: float, success: bool | None = None) -> None:
    """Write uint8 frames [T, height, width, 3] as an animated WebP that loops; ``path`` appears whole or not at all.

    The last frame stays for 1.2 s and, where ``success`` is given, wears a border that shows the outcome.
    Raises MMRLError if the file cannot be written.
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or not frames_THWC.shape[0] or frames_THWC.dtype.itemsize != 1:
        raise ValueError(
            f"an animation needs uint8 frames [T, H, W, 3], T > 0, not {tuple(frames_THWC.shape)} {frames_THWC.dtype}"
        )
    images = [Image.fromarray(frame.numpy()) for frame in frames_THWC.cpu().contiguous()]
    if success is not None:
        _border(images[-1], SUCCESS if success else FAILURE)
    durations = [round(1000 / fps)] * (len(images) - 1) + [LAST_FRAME_MS]
    with replacing(path) as unfinished:
        # mixed: flat renderings become lossless frames (exact, and a third of the size), photographs lossy ones
        encoding: dict[str, Any] = {"quality": 80, "method": 3, "allow_mixed": True}
        images[0].save(unfinished, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, **encoding)


def _border(image: Image.Image, colour: tuple[int, int, int]) -> None:
    width, height = image.size
    thickness = max(2, min(width, height) // 24)
    ImageDraw.Draw(image).rectangle((0, 0, width - 1, height - 1), outline=colour, width=thickness)
