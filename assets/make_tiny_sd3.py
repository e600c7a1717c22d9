"""Write the architecture and tokenizers of a tiny Stable Diffusion 3 (no weights): ``python assets/make_tiny_sd3.py [FOLDER]``.

The classes are diffusers' and transformers' own; only the numbers are small. Pictures have up to 64 x 64 pixels, that is 16 x 16
latents of 8 channels, or 64 tokens. There is no T5, which SD3's pipeline allows; it puts zeros in its place, so policies are told
``max_text_tokens: 0``. With ``--compact`` a latent stands for 8 x 8 pixels and is a token: as many tokens, of a quarter of the
numbers, which is too little for letters.

Whatever is listed in WORDS is one token; any other word is spelled, in letters and such groups of letters as the list has often.

``policies.diffusion:Diffusion`` with ``weights: random`` builds transformer and text encoders from this folder. Its VAE has fresh
weights as well, unless ``vae/diffusion_pytorch_model.safetensors`` lies there: a VAE is trained before the rest and is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, __version__
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

WIDTH, HEADS, LAYERS, PATCH = 96, 3, 5, 2
TEXT_WIDTH, TEXT_LAYERS, TEXT_TOKENS = 64, 2, 16
LATENTS, VAE_WIDTHS, COMPACT_WIDTHS, IMAGE = 8, (32, 48, 48), (16, 32, 48, 64), 64
WORDS = (
    *(
        "a",
        "an",
        "and",
        "at",
        "in",
        "of",
        "on",
        "the",
        "with",
        "is",
        "to",
        "photo",
        "picture",
        "drawing",
        "background",
        "big",
        "small",
    ),
    *(
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "left",
        "right",
        "above",
        "below",
        "top",
        "bottom",
        "middle",
        "corner",
        "behind",
    ),
    *("red", "green", "blue", "yellow", "orange", "purple", "white", "black", "grey", "pink", "brown", "cyan"),
    *("circle", "circles", "square", "squares", "triangle", "triangles", "star", "stars", "cross", "crosses", "ring", "rings"),
    *("diamond", "diamonds", "heart", "hearts", "bar", "bars", "disc", "discs", "moon", "moons", "hexagon", "hexagons"),
    *("word", "words", "says", "reading", "sign", "text", "letters", "that", "shape", "shapes", "next", "side", "under", "over"),
)


def build_tokenizer(words: Iterable[str] = WORDS, tokens: int = TEXT_TOKENS) -> CLIPTokenizer:
    """CLIP's tokenizer: bytes, and merges that make each of ``words`` (lower case) one token; texts have ``tokens`` at most."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    # As many merges as there are to make: then each word is one token, whatever pieces it shares with others.
    trainer = trainers.BpeTrainer(vocab_size=1_000_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False)
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(sorted(set(words)), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=tokens)  # type: ignore[arg-type]


def text_config(
    tokenizer: CLIPTokenizer, *, width: int = TEXT_WIDTH, layers: int = TEXT_LAYERS, heads: int = 2
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["CLIPTextModelWithProjection"],
    )


def transformer_config(
    *,
    text_width: int = TEXT_WIDTH,
    heads: int = HEADS,
    head_dim: int = WIDTH // HEADS,
    layers: int = LAYERS,
    patch: int = PATCH,
    side: int = IMAGE // 4,
) -> dict[str, Any]:
    """side: of the largest picture, in latents."""
    return {
        "sample_size": side,
        "patch_size": patch,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": 2 * text_width,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": 2 * text_width,
        "pos_embed_max_size": side // patch,
        "qk_norm": "rms_norm",
    }


def vae_config(*, widths: tuple[int, ...] = VAE_WIDTHS) -> dict[str, Any]:
    """Each width but the last halves both sides."""
    blocks = len(widths)
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": 1,
        "latent_channels": LATENTS,
        "norm_num_groups": 8,
        "sample_size": IMAGE,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def write(
    folder: Path,
    *,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    tokenizer: CLIPTokenizer,
    text: CLIPTextConfig,
    shift: float = 1.0,
) -> None:
    """A folder as ``DiffusionPipeline.save_pretrained`` writes it, without weights; both text encoders are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    configs = {
        "transformer": {"_class_name": SD3Transformer2DModel.__name__, **transformer},
        "vae": {"_class_name": AutoencoderKL.__name__, **vae},
    }
    for name, config in configs.items():
        (folder / name).mkdir(exist_ok=True)
        whole = {"_diffusers_version": __version__, **config}
        (folder / name / "config.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    for number in ("", "_2"):
        text.save_pretrained(folder / f"text_encoder{number}")
        tokenizer.save_pretrained(folder / f"tokenizer{number}")
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "tiny_sd3_architecture")
    parser.add_argument("--compact", action="store_true", help="a latent for every 8 x 8 pixels instead of 4 x 4")
    arguments = parser.parse_args()
    folder, tokenizer = arguments.folder, build_tokenizer()
    widths = COMPACT_WIDTHS if arguments.compact else VAE_WIDTHS
    side = IMAGE // 2 ** (len(widths) - 1)
    transformer = transformer_config(side=side, patch=side // (IMAGE // 4 // PATCH))
    write(folder, transformer=transformer, vae=vae_config(widths=widths), tokenizer=tokenizer, text=text_config(tokenizer))
    size = sum(p.numel() for p in SD3Transformer2DModel.from_config(transformer).parameters())
    print(f"wrote {folder}: {len(tokenizer)} tokens, {size / 1e6:.2f} M parameters in the transformer")


if __name__ == "__main__":
    main()
