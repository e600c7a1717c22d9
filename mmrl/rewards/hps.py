"""Human preference score v2 (Wu et al. 2023, arXiv 2306.09341):  score = cos(picture, prompt), of a CLIP ViT-H/14 tuned for it.

The published files (``HPS_v2_compressed.pt``, ``HPS_v2.1_compressed.pt``) name their weights as open_clip does; they are read
into transformers' CLIPModel, so that open_clip is not needed. Departure: there is no ``autocast``;
``dtype`` says how the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from mmrl.rewards.encoders import Clip, EncoderConfig, clip, fill, opened, weights_of
from mmrl.rewards.pictures import in_batches, prompt_of
from mmrl.transcripts import Transcript


class HPS:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.hps:HPS`` block."""

        checkpoint: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        """Folder or hub id of a CLIP model with its processor: the tuned one, or the one that it was tuned from."""
        weights: str | None = "xswu/HPSv2/HPS_v2.1_compressed.pt"
        """The tuned weights with open_clip's names: a file, or owner/repository/file of a hub; null: those of ``checkpoint``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.weights is None:
            self._clip = clip(config.checkpoint, config.checkpoint, config.device, config.dtype)
        else:
            self._clip = tuned(config)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return in_batches(
            transcripts,
            self.config.batch,
            lambda images, questions: self._clip.cosines(images, [prompt_of(question) for question in questions]).tolist(),
        )


def tuned(config: HPS.Config) -> Clip:
    """The model of ``checkpoint``'s sizes with the weights of ``weights``."""
    assert config.weights is not None
    sizes = opened("checkpoint", config.checkpoint, CLIPConfig.from_pretrained)
    model = CLIPModel(sizes)
    fill(model, from_open_clip(weights_of("weights", config.weights)), "weights", config.weights)
    return Clip(config.checkpoint, config.checkpoint, config.device, config.dtype, model)


# open_clip's names -> transformers'; both towers are alike within their blocks.
_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip model by the names of transformers' CLIPModel."""
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name in ("visual.proj", "text_projection"):  # matrices there, layers here
            named["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        elif ".attn.in_proj_" in name:  # query, key and value in one
            for part, piece in zip("qkv", torch.chunk(value, 3), strict=True):
                named[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = piece.clone()
        else:
            named[name] = value
    return named
