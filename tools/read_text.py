"""Text in images: PP-OCR through rapidocr and onnxruntime; the models in the package read Chinese and Latin script."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rapidocr import RapidOCR

from mmrl.messages import Picture, ToolContext, ToolError, ToolResult

MIN_SIDE = 64  # of what the detector is shown, in pixels


class ReadText:
    """Lines of text with their boxes. One image is read at a time, whoever asks."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.read_text:ReadText`` block."""

        min_confidence: float = Field(default=0.5, ge=0, le=1)
        """Lines that the reader is less sure of are left out."""
        max_side: int = Field(default=1280, ge=64)
        """Larger images are read scaled down to it, in pixels; a model that needs more crops first."""
        threads: int = Field(default=1, ge=1)
        """Of onnxruntime."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._lock = threading.Lock()  # rapidocr's objects keep what they work on
        onnx = "EngineConfig.onnxruntime"
        own = {f"{onnx}.intra_op_num_threads": config.threads, f"{onnx}.inter_op_num_threads": 1, "Global.log_level": "critical"}
        # rapidocr enlarges small images to 736 pixels, a thin one to many times that; what is read is scaled here instead
        sizes = {"Global.use_preprocess_img": False, "Det.limit_type": "max"}
        self._engine = RapidOCR(params={**own, **sizes, "Global.text_score": config.min_confidence})

    def __call__(self, image: int, ctx: ToolContext) -> ToolResult:
        """Read the text in an image. Gives a line for each line of text: the text and its box [left, top, right, bottom].

        image: number of the image, from 1.
        """
        picture = ctx.picture(image)
        lines = [self._line(picture, *found) for found in self._read(picture, ctx.timeout_s)]
        text = "\n".join(f"{line['text']} {line['box']}" for line in lines) or "There is no text in the image."
        source = image - 1 if picture.source is None else picture.source
        return ToolResult(text, metrics={"lines": len(lines)}, details={"source": source, "lines": lines})

    def _read(self, picture: Picture, timeout_s: float) -> list[tuple[np.ndarray, str, float]]:
        """(corners [4, 2] in the picture, text, confidence) of each line."""
        width, height = picture.image.size
        scale = min(1.0, self.config.max_side / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = picture.image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture.image
        room = [max(0, MIN_SIDE - side) for side in size]  # right of it and below, so that its coordinates stay
        pixels = np.pad(np.asarray(small), ((0, room[1]), (0, room[0]), (0, 0)), mode="edge")
        if not self._lock.acquire(timeout=timeout_s):
            raise ToolError("The reader is busy; try again.")
        try:
            found: Any = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))  # blue first, as OpenCV has it
        finally:
            self._lock.release()
        if found.boxes is None or not found.txts:
            return []
        corners = np.minimum(found.boxes * (width / size[0], height / size[1]), (width, height))
        return list(zip(corners, found.txts, (float(score) for score in found.scores), strict=True))

    @staticmethod
    def _line(picture: Picture, corners: np.ndarray, text: str, confidence: float) -> dict[str, object]:
        """box: in the image that was read, in whole pixels. box_in_source: in the picture that it was first made from."""
        inside = [(float(x), float(y)) for x, y in corners]
        return {
            "text": text,
            "confidence": confidence,
            "box": [round(edge) for edge in _upright(inside)],
            "box_in_source": _upright([picture.point_in_source(x, y) for x, y in inside]),
        }


def _upright(points: list[tuple[float, float]]) -> list[float]:
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]
