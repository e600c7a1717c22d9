"""Text in images: PP-OCR through rapidocr and onnxruntime, whose models come with the package (Chinese, Japanese, Latin script)."""

from __future__ import annotations

import threading

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rapidocr import RapidOCR

from mmrl.messages import Picture, ToolContext, ToolError, ToolResult


class ReadText:
    """Lines of text with their boxes. One image is read at a time, whoever asks."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.read_text:ReadText`` block."""

        min_confidence: float = Field(default=0.5, ge=0, le=1)
        """Lines that the reader is less sure of are left out."""
        threads: int = Field(default=1, ge=1)
        """Of onnxruntime."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._lock = threading.Lock()  # rapidocr's objects keep what they work on
        onnx = "EngineConfig.onnxruntime"
        threads = {f"{onnx}.intra_op_num_threads": config.threads, f"{onnx}.inter_op_num_threads": 1}
        self._engine = RapidOCR(params={**threads, "Global.text_score": config.min_confidence, "Global.log_level": "critical"})

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
        """(corners [4, 2], text, confidence) of each line."""
        if not self._lock.acquire(timeout=timeout_s):
            raise ToolError("The reader is busy; try again.")
        try:
            found = self._engine(np.ascontiguousarray(np.asarray(picture.image)[:, :, ::-1]))  # blue first, as OpenCV has it
        finally:
            self._lock.release()
        if found.boxes is None or not found.txts:
            return []
        return list(zip(found.boxes, found.txts, (float(score) for score in found.scores), strict=True))

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
