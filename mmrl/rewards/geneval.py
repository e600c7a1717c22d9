"""GenEval on real pictures (Ghosh et al. 2023, arXiv 2310.11513): a detector finds things, CLIP says their colours, rules judge.

The rules and their numbers are those of mmrl/rewards/geneval_rules.py. The colour of a thing is the nearest, by CLIP, of ten
colours, each the mean of the vectors of "a photo of a COLOUR THING", "a photo of a COLOUR-colored THING" and "a photo of a COLOUR
object"; the thing is cut out by its box, and where the detector gives masks its surroundings are painted #999. The prompt's
``include``, ``exclude`` and ``tag`` stand in ``question.details``.

Departures: the detector is transformers' Mask2Former (Swin-S, COCO instances, as published by its authors) in place of mmdet's
training of the same model, or any detection model of transformers. Three of GenEval's 80 classes have other names in COCO.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING

from mmrl.rewards.encoders import Clip, DType, EncoderConfig, clip, device_of, opened
from mmrl.rewards.geneval_rules import COLOURS, GENEVAL, Detected, Rules, Verdict, judge, kept, problem
from mmrl.rewards.pictures import in_batches
from mmrl.transcripts import Question, Transcript

# GenEval's name of a class -> COCO's, where they differ.
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
_AROUND = "#999"
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


@plain_dataclass(frozen=True)
class Found:
    """A thing that the detector found. mask: [height, width] of the picture, True where the thing is; None: boxes only."""

    thing: Detected
    mask: Tensor | None


class Detector:
    """A detection or instance segmentation model of transformers. names: its classes."""

    def __init__(self, checkpoint: str, device: str, dtype: DType) -> None:
        self.device = device_of(device)
        kind = type(opened("detector", checkpoint, AutoConfig.from_pretrained))
        self._masks = kind in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        auto: Any = AutoModelForUniversalSegmentation if self._masks else AutoModelForObjectDetection
        model: Any = opened("detector", checkpoint, auto.from_pretrained)
        self._model = model.to(self.device, getattr(torch, dtype)).eval()
        self._sizes: Any = opened("detector", checkpoint, functools.partial(AutoImageProcessor.from_pretrained, backend="pil"))
        self._label = {int(number): str(name) for number, name in model.config.id2label.items()}
        self.names = frozenset(self._label.values())

    @torch.inference_mode()
    def find(self, images: Sequence[Image.Image], threshold: float) -> list[list[Found]]:
        """The things in each picture of which it is surer than ``threshold``."""
        given = self._sizes(list(images), return_tensors="pt")
        pixels = {name: value.to(self.device) for name, value in given.items() if isinstance(value, Tensor)}
        pixels["pixel_values"] = pixels["pixel_values"].to(self._model.dtype)
        out = self._model(**pixels)
        sizes = [(image.height, image.width) for image in images]
        return self._segments(out, sizes, threshold) if self._masks else self._boxes(out, sizes, threshold)

    def _boxes(self, out: Any, sizes: list[tuple[int, int]], threshold: float) -> list[list[Found]]:
        out.logits, out.pred_boxes = out.logits.float(), out.pred_boxes.float()
        results = self._sizes.post_process_object_detection(out, threshold=threshold, target_sizes=sizes)
        return [
            [
                Found(self._thing(label, box, score), None)
                for label, box, score in zip(
                    each["labels"].tolist(), each["boxes"].tolist(), each["scores"].tolist(), strict=True
                )
            ]
            for each in results
        ]

    def _segments(self, out: Any, sizes: list[tuple[int, int]], threshold: float) -> list[list[Found]]:
        """Mask2Former's inference for instances: a score is a class's probability times the mean probability within the mask."""
        found = []
        for logits_QC, masks_QHW, size in zip(
            out.class_queries_logits.float(), out.masks_queries_logits.float(), sizes, strict=True
        ):
            scores_QC = logits_QC.softmax(-1)[:, :-1]
            top = scores_QC.flatten().topk(min(len(scores_QC), scores_QC.numel()))
            things = []
            for score, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                if score <= threshold:  # the mask can only make it less
                    break
                query, label = divmod(place, scores_QC.shape[1])
                logits_HW = torch.nn.functional.interpolate(masks_QHW[None, None, query], size, mode="bilinear")[0, 0]
                mask_HW = logits_HW > 0
                if not mask_HW.any():
                    continue
                score *= float(logits_HW.sigmoid()[mask_HW].mean())
                if score > threshold:
                    things.append(Found(self._thing(label, _box_of(mask_HW), score), mask_HW))
            found.append(things)
        return found

    def _thing(self, label: int, box: Sequence[float], score: float) -> Detected:
        left, top, right, bottom = box
        return Detected(self._label[label], (left, top, right, bottom), None, score)


class GenEval:
    """See the module. terms: ``correct`` and ``exact``, the shares of pictures that are."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.geneval:GenEval`` block."""

        detector: str = "facebook/mask2former-swin-small-coco-instance"
        """Folder or hub id of a detection or instance segmentation model."""
        clip: str = "openai/clip-vit-large-patch14"
        """Folder or hub id of the CLIP model that says colours."""
        score: Literal["graded", "correct", "exact"] = "graded"
        """graded: Flow-GRPO's reward, 0 to 1; correct: GenEval's own mark, 0 or 1; exact: and not one thing too many."""
        names: dict[str, str] = Field(default_factory=lambda: dict(COCO))
        """A prompt's name of a class -> the detector's, where they differ."""
        threshold: float = Field(default=GENEVAL.threshold, ge=0, lt=1)
        """How sure the detector must be."""
        counting_threshold: float = Field(default=GENEVAL.counting_threshold, ge=0, lt=1)
        """How sure it must be where the prompt's tag is 'counting'."""
        max_objects: int = Field(default=GENEVAL.max_objects, ge=1)
        """Things of a class that count, the surest."""
        position_threshold: float = Field(default=GENEVAL.position_threshold, ge=0)
        """Share of two things' sizes that is taken off the way between them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        self._detector = detector(config.detector, config.device, config.dtype)
        self._clip = clip(config.clip, config.clip, config.device, config.dtype)
        self._rules = Rules(config.threshold, config.counting_threshold, config.max_objects, config.position_threshold)
        self._verdicts: list[Verdict] = []

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        self._verdicts = []
        scores = in_batches(transcripts, self.config.batch, self._scores)
        if self._verdicts:
            count = len(self._verdicts)
            self.terms = {
                "correct": sum(verdict.correct for verdict in self._verdicts) / count,
                "exact": sum(verdict.exact for verdict in self._verdicts) / count,
            }
        return scores

    def _scores(self, images: list[Image.Image], questions: list[Question]) -> list[float]:
        lowest = min(self._rules.threshold, self._rules.counting_threshold)
        found = self._detector.find(images, lowest)
        scores = []
        for image, question, things in zip(images, questions, found, strict=True):
            wrong = self._problem(question.details)
            if wrong is not None:
                self.failure = wrong
                scores.append(math.nan)
                continue
            verdict = judge(question.details, self._coloured(image, question.details, things), self._rules)
            self._verdicts.append(verdict)
            scores.append(float(getattr(verdict, self.config.score)))
        return scores

    def _problem(self, metadata: Mapping[str, Any]) -> str | None:
        wrong = problem(metadata)
        if wrong is not None:
            return f"the question's details are not GenEval's: {wrong}"
        classes = [clause["class"] for key in ("include", "exclude") for clause in metadata.get(key, ())]
        unknown = [name for name in classes if self.config.names.get(name, name) not in self._detector.names]
        return f"{self.config.detector} does not know '{unknown[0]}'; give 'names' its word for it" if unknown else None

    def _coloured(self, image: Image.Image, metadata: Mapping[str, Any], found: Sequence[Found]) -> list[Detected]:
        """The things by the prompt's names, with the colours of those whose colour is asked for and looked at."""
        prompts = {theirs: ours for ours, theirs in self.config.names.items()}
        things = [replace(each.thing, name=prompts.get(each.thing.name, each.thing.name)) for each in found]
        owners = {id(thing): each for thing, each in zip(things, found, strict=True)}
        counted = kept(metadata, things, self._rules)
        coloured = {clause["class"] for clause in metadata["include"] if "color" in clause}
        colours: dict[int, str] = {}
        for name in coloured & counted.keys():
            cut = [_cut_out(image, owners[id(thing)]) for thing in counted[name]]
            told = colours_of(self._clip, cut, name, self.config.batch)
            colours |= {id(thing): colour for thing, colour in zip(counted[name], told, strict=True)}
        return [replace(thing, colour=colours.get(id(thing))) for thing in things]


@functools.cache
def detector(checkpoint: str, device: str, dtype: DType) -> Detector:
    """The model, loaded once in this process whoever asks."""
    return Detector(checkpoint, device, dtype)


def colours_of(model: Clip, cut: Sequence[Image.Image], name: str, batch: int) -> list[str]:
    """The colour of each thing of class ``name`` that was cut out."""
    colours_CD = _classifier(model.texts, name)
    told = []
    for start in range(0, len(cut), batch):
        nearest_N = (model.pictures(cut[start : start + batch]) @ colours_CD.T).argmax(1)
        told += [COLOURS[place] for place in nearest_N.tolist()]
    return told


def _classifier(embed: Callable[[Sequence[str]], Tensor], name: str) -> Tensor:
    """[colours, D]."""
    rows = []
    for colour in COLOURS:
        mean_D = embed([template.format(colour=colour, name=name) for template in _TEMPLATES]).mean(0)
        rows.append(mean_D / mean_D.norm())
    return torch.stack(rows)


def _cut_out(image: Image.Image, found: Found) -> Image.Image:
    if found.mask is not None:
        mask = Image.fromarray(found.mask.to(torch.uint8).mul(255).numpy(force=True))
        image = Image.composite(image, Image.new("RGB", image.size, _AROUND), mask)
    left, top, right, bottom = (round(edge) for edge in found.thing.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, min(max(right, left + 1), image.width), min(max(bottom, top + 1), image.height)))


def _box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """The smallest upright box around what is True: left, top, right, bottom, the last two just beyond it."""
    rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
