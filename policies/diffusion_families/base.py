"""What a family of diffusers' pipelines says of itself. A new family is a file with a subclass, and a line in the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.messages import Picture
from policies.diffusion_parts.schedule import FlowSchedule, Schedule

Embedding = Mapping[str, Tensor]  # what the network is told of B prompts: name -> [B, ...]


class Family(ABC):
    """A pipeline and how its parts are called; latents are what the network takes, [B, *latent_shape].

    pipeline: diffusers' own object, which encodes text and holds the scheduler. height and width are in pixels.
    """

    network_name = "transformer"  # the part that denoises
    edits = False  # whether prompts may show pictures

    def __init__(self, pipeline: Any, *, height: int | None, width: int | None, max_text_tokens: int | None) -> None:
        self.pipeline, self.max_text_tokens = pipeline, max_text_tokens
        self.vae_alone = Lock()  # a thread may decode pictures while others are encoded, and some VAEs remember what they are at
        self.height, self.width = height or self.default_size(), width or self.default_size()
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.multiple():
                raise MMRLError(f"policy.{name} = {size} is no multiple of {self.multiple()}, as {type(pipeline).__name__} needs")
        self.schedule = self.make_schedule()

    # -- sizes -------------------------------------------------------------------------------------------------------------

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, self.network_name)

    @property
    def distilled(self) -> bool:
        """Whether the scale of guidance is an input of the network, which then has no branch without prompt."""
        return bool(self.network.config.get("guidance_embeds", False))

    def text_encoders(self) -> dict[str, nn.Module]:
        """Those there are, by their names in the pipeline."""
        return {
            name: part
            for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }

    def default_size(self) -> int:
        return self.network.config.sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        """What both sides are multiples of, in pixels."""
        return self.pipeline.vae_scale_factor * self.network.config.patch_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return (self.network.config.in_channels, self.height // factor, self.width // factor)

    # -- times -------------------------------------------------------------------------------------------------------------

    def make_schedule(self) -> Schedule:
        return FlowSchedule(self.pipeline.scheduler, self.set_timesteps, self.shift)

    def set_timesteps(self, steps: int) -> None:
        """Fill in the scheduler's timesteps and sigmas, as the pipeline does."""
        options = {"mu": self.mu()} if self.pipeline.scheduler.config.get("use_dynamic_shifting") else {}
        self.pipeline.scheduler.set_timesteps(steps, **options)

    def tokens(self) -> int:
        """Pieces of a picture that the network sees, on which dynamic shifting depends."""
        _, height, width = self.latent_shape
        return (height // self.network.config.patch_size) * (width // self.network.config.patch_size)

    def mu(self) -> float:
        config = self.pipeline.scheduler.config
        return calculate_shift(
            self.tokens(),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def shift(self, t_N: Tensor) -> Tensor:
        """Times from 0 to 1 as the scheduler shifts them."""
        scheduler = self.pipeline.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            return scheduler.time_shift(self.mu(), 1.0, t_N)
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        return shift * t_N / (1 + (shift - 1) * t_N)

    # -- text and pictures ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        """What the network is told of texts; ``negative``: of the empty ones that guidance leads away from."""

    def read(self, text: str, pictures: Sequence[Picture], *, negative: bool = False) -> Embedding:
        """What the network is told of one prompt."""
        return {**self.encode([text], negative=negative), **(self.show([pictures]) if pictures else {})}

    def show(self, pictures: Sequence[Sequence[Picture]]) -> Embedding:
        """What the network is told of the pictures of B prompts, beside their texts."""
        raise MMRLError(f"a prompt shows a picture, but {type(self.pipeline).__name__} reads text alone; use a model that edits")

    def collate(self, rows: Sequence[Embedding]) -> dict[str, Tensor]:
        """Embeddings of one prompt each as those of a batch."""
        if any(row.keys() != rows[0].keys() for row in rows):
            raise MMRLError("some prompts of a batch show a picture and others do not; keep them in runs of their own")
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def text_options(self) -> dict[str, Any]:
        return {} if self.max_text_tokens is None else {"max_sequence_length": self.max_text_tokens}

    # -- the network and the VAE -----------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        """What the network says; x [B, *latent_shape] in its type. guidance_B: its input, where it is distilled."""

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598), as the pipeline has it."""
        return unconditional + scale * (conditional - unconditional)

    def to_latents(self, encoded: Tensor) -> Tensor:
        """What the VAE encodes -> what the network takes."""
        config = self.pipeline.vae.config
        return (encoded - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """What the network gives -> what the VAE decodes, as the pipeline has it."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The VAE's most likely latents of pixels [B, 3, height, width] from -1 to 1."""
        with self.vae_alone:
            encoded = self.pipeline.vae.encode(pixels.to(self.pipeline.vae.dtype)).latent_dist.mode()
        return self.to_latents(encoded)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, height, width], from about -1 to about 1."""
        encoded = self.from_latents(latents.to(self.pipeline.vae.dtype))
        with self.vae_alone:
            return self.pipeline.vae.decode(encoded, return_dict=False)[0]
