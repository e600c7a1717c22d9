"""How a vision-language model is shown camera images and a sentence: token ids, and what its ``forward`` takes beside them.

Images become what the model's own image processor makes of them, but in torch, for the whole batch, on its device. Each family of
models that this is written for has a class here; any other goes through its own ``AutoProcessor``, row by row on the CPU.

The prompt is the model's own: its chat template where it has one, with the images before the text. So the tokens before the text
are the same in every prompt, which ``policies.token_vla_parts.backbone`` relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmrl.errors import MMRLError
from policies.shared.checkpoints import first_line

_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
PADDING = -1  # in place of a token id, so that it cannot be mistaken for one


class Eyes(ABC):
    """One family. ``read`` makes what a decision's trace keeps, ``see`` turns it into arguments of the model's ``forward``."""

    first_position: ClassVar[int] = 0  # of a token in the language model, where positions are simply counted

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: str,
        *,
        cameras: Sequence[str],
        prompt: str,
        max_text_tokens: int,
    ) -> None:
        self.config, self.tokenizer, self.cameras, self.prompt = model.config, tokenizer, cameras, prompt
        self.image_id: int = self.config.image_token_id
        self.image_token = str(tokenizer.convert_ids_to_tokens(self.image_id))
        self.max_text_tokens = max_text_tokens
        self.processor = self._load(checkpoint)

    @abstractmethod
    def _load(self, checkpoint: str) -> Any:
        """The checkpoint's processor, which is saved with the policy."""

    @abstractmethod
    def read(self, images: Mapping[str, Tensor], sentences: Sequence[str]) -> dict[str, Tensor]:
        """``prompt`` int64 [B, P], padded with PADDING, and what ``see`` needs of the images, each entry [B, ...]."""

    @abstractmethod
    def see(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arguments that carry the images of B rows; where a row has several, they follow one another."""

    def token_types(self, prompt_BP: Tensor) -> dict[str, Tensor]:
        """The argument that tells kinds of tokens apart, where ``forward`` takes one."""
        return {}

    def save(self, folder: Any) -> None:
        self.processor.save_pretrained(folder)


class TorchEyes(Eyes):
    """Images prepared in torch, with the numbers of the checkpoint's image processor; the trace keeps them as they came."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seen: dict[tuple[str, tuple[int, ...]], list[int]] = {}  # the same few hundred sentences come back all the time

    def _load(self, checkpoint: str) -> Any:
        """The image processor, whose numbers are read; it is not called."""
        try:
            return AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            raise MMRLError(f"policy.checkpoint = {checkpoint}: has no image processor ({first_line(error)})") from error

    @abstractmethod
    def tokens_of(self, height: int, width: int) -> int:
        """How many tokens an image of this size becomes."""

    def read(self, images: Mapping[str, Tensor], sentences: Sequence[str]) -> dict[str, Tensor]:
        """``image_CAMERA`` uint8 [B, h, w, 3] as they are, and ``prompt``."""
        counts = tuple(self.tokens_of(*image.shape[1:3]) for image in images.values())
        rows = [self._ids(sentence, counts) for sentence in sentences]
        device = next(iter(images.values())).device
        return {
            **{f"image_{camera}": image for camera, image in images.items()},
            "prompt": padded(rows, sum(counts) + self.max_text_tokens, device),
        }

    def _pixels(self, image_BHWC: Tensor, height: int, width: int) -> Tensor:
        """uint8 [B, h, w, 3] -> float32 [B, 3, height, width], resized and normalised with the processor's numbers."""
        mean, std, scale = self.processor.image_mean, self.processor.image_std, self.processor.rescale_factor
        pixels = resize(image_BHWC, height, width, _FILTERS[int(self.processor.resample)])
        mean_3, std_3 = (pixels.new_tensor(numbers)[:, None, None] / scale for numbers in (mean, std))
        return (pixels - mean_3) / std_3

    def _ids(self, sentence: str, counts: tuple[int, ...]) -> list[int]:
        """The prompt of a sentence, every image token repeated as often as the image has tokens."""
        ids = self._seen.get((sentence, counts))
        if ids is None:
            text = self._text(self.prompt.replace("{instruction}", sentence))
            plain: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
            if plain.count(self.image_id) != len(counts):
                raise MMRLError(
                    f"the model's prompt shows {plain.count(self.image_id)} images, but there are {len(counts)} cameras"
                )
            most, found = self.max_text_tokens, len(plain) - len(counts)
            if found > most:
                raise MMRLError(f"policy.max_text_tokens = {most}, but the prompt of {sentence!r} has {found} tokens; raise it")
            images = iter(counts)
            ids = [copy for token in plain for copy in [token] * (next(images) if token == self.image_id else 1)]
            self._seen[sentence, counts] = ids
        return ids

    def _text(self, request: str) -> str:
        if self.tokenizer.chat_template is None:
            return self.image_token * len(self.cameras) + request
        return str(
            self.tokenizer.apply_chat_template(
                conversation(len(self.cameras), request), tokenize=False, add_generation_prompt=True
            )
        )


class PaliGemmaEyes(TorchEyes):
    """Images of one fixed size; positions from 1; the whole prompt, which ends in a newline, attends to itself both ways."""

    first_position = 1

    def tokens_of(self, height: int, width: int) -> int:
        return self.config.text_config.num_image_tokens

    def see(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size = self.processor.size
        pixels = [self._pixels(trace[f"image_{camera}"], size["height"], size["width"]) for camera in self.cameras]
        return {"pixel_values": torch.stack(pixels, 1).flatten(0, 1)}

    def token_types(self, prompt_BP: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(prompt_BP)}

    def _text(self, request: str) -> str:
        return f"{self.image_token * len(self.cameras)}{self.tokenizer.bos_token}{request}\n"


class QwenEyes(TorchEyes):
    """Images of any size in patches, which are merged into tokens; Qwen2-VL and Qwen2.5-VL."""

    def tokens_of(self, height: int, width: int) -> int:
        rows, columns = self._grid(height, width)
        return rows * columns // self.processor.merge_size**2

    def see(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = [trace[f"image_{camera}"] for camera in self.cameras]
        grids = torch.tensor([(1, *self._grid(*image.shape[1:3])) for image in images], device=images[0].device)
        patches = torch.cat([self._patches(image) for image in images], 1)
        return {"pixel_values": patches.flatten(0, 1), "image_grid_thw": grids.repeat(len(images[0]), 1)}

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches in a column and in a row of the resized image."""
        patch, size = self.processor.patch_size, self.processor.size
        merged = patch * self.processor.merge_size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        new_height, new_width = smart_resize(height, width, factor=merged, **limits)
        return new_height // patch, new_width // patch

    def _patches(self, image_BHWC: Tensor) -> Tensor:
        """uint8 [B, h, w, 3] -> float32 [B, patches, numbers in a patch]; the patches that are merged stand together."""
        patch, merge, times = self.processor.patch_size, self.processor.merge_size, self.processor.temporal_patch_size
        rows, columns = self._grid(*image_BHWC.shape[1:3])
        pixels = self._pixels(image_BHWC, rows * patch, columns * patch)
        split = pixels.reshape(len(pixels), 3, rows // merge, merge, patch, columns // merge, merge, patch)
        split = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [B, rows, columns, merge, merge, 3, 1, patch, patch]
        return split.expand(*split.shape[:6], times, patch, patch).reshape(len(pixels), rows * columns, -1)


class ProcessorEyes(Eyes):
    """Any other model, through its own processor: exactly what it would see elsewhere, but slow (row by row, on the CPU)."""

    def _load(self, checkpoint: str) -> Any:
        try:
            return AutoProcessor.from_pretrained(checkpoint)
        except (OSError, ValueError, ImportError) as error:
            raise MMRLError(f"policy.checkpoint = {checkpoint}: has no processor ({first_line(error)})") from error

    def read(self, images: Mapping[str, Tensor], sentences: Sequence[str]) -> dict[str, Tensor]:
        """``prompt``, and what the processor made of the images: each entry [B, ...] under ``vision_NAME``."""
        rows = [self._process([image[b].cpu() for image in images.values()], text) for b, text in enumerate(sentences)]
        texts = [row.pop("input_ids")[0].tolist() for row in rows]
        most, found = self.max_text_tokens, [len(ids) - ids.count(self.image_id) for ids in texts]
        if max(found) > most:
            raise MMRLError(f"policy.max_text_tokens = {most}, but a prompt has {max(found)} tokens; raise it")
        device = next(iter(images.values())).device
        return {
            **{f"vision_{name}": torch.stack([row[name] for row in rows]).to(device) for name in rows[0]},
            "prompt": padded(texts, texts[0].count(self.image_id) + most, device),
        }

    def see(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("vision_"): x.flatten(0, 1) for name, x in trace.items() if name.startswith("vision_")}

    def token_types(self, prompt_BP: Tensor) -> dict[str, Tensor]:
        names = {"token_type_ids", "mm_token_type_ids"} & set(self.processor.model_input_names)
        return {name: (prompt_BP == self.image_id).long() for name in names}

    def _process(self, images: list[Tensor], sentence: str) -> dict[str, Tensor]:
        request = self.prompt.replace("{instruction}", sentence)
        text = self.image_token * len(images) + request
        if self.processor.chat_template is not None:
            text = self.processor.apply_chat_template(conversation(len(images), request), add_generation_prompt=True)
        made = self.processor(images=[image.numpy() for image in images], text=text, return_tensors="pt")
        unused = {"attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}  # derived from the prompt
        return {name: value for name, value in made.items() if name not in unused}


# model_type of a checkpoint's config -> its family; any other model is ProcessorEyes'.
FAMILIES: dict[str, type[Eyes]] = {"paligemma": PaliGemmaEyes, "qwen2_vl": QwenEyes, "qwen2_5_vl": QwenEyes}


def conversation(images: int, request: str) -> list[dict[str, Any]]:
    """One message of a user, as chat templates take it."""
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": request}]}]


def padded(rows: Sequence[Sequence[int]], length: int, device: torch.device) -> Tensor:
    """int64 [B, length], PADDING behind each row.

    Not before it, where a causal model's padding would see nothing at all, which is NaN in some implementations of attention.
    """
    return torch.tensor([[*row, *[PADDING] * (length - len(row))] for row in rows], device=device)


def resize(image_BHWC: Tensor, height: int, width: int, how: str) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, height, width], whole numbers from 0 to 255.

    As PIL and torchvision resize bytes: antialiased, rows before columns, rounded and cut after each. They compute in fixed
    point, so that single pixels may differ by one.
    """
    pixels = image_BHWC.permute(0, 3, 1, 2).float()
    for size in ((pixels.shape[2], width), (height, width)):
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode=how, align_corners=False, antialias=True).round().clamp(0, 255)
    return pixels
