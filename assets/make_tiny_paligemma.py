"""Write tiny_paligemma: a vision-language model that has seen the tabletop before, for action tokens to start from.

    python assets/make_tiny_paligemma.py [FOLDER]

It is the vision-language half of assets/tiny_pi0 in the architecture of assets/tiny_paligemma_architecture. The action tokens,
and whatever else tiny_pi0's tokenizer lacks, are random. ``configs/tabletop/ppo_token_vla.yaml`` trains a token VLA from it, as
OpenVLA is trained from a vision-language model that has seen the world.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from policies.pi0_parts.weights import load_model as load_pi0
from policies.shared.checkpoints import load_tokenizer
from policies.shared.vision_language import load_model

ASSETS = Path(__file__).parent
ARCHITECTURE, TAUGHT = ASSETS / "tiny_paligemma_architecture", ASSETS / "tiny_pi0"
WORDS = "language_model.embed_tokens.weight"


def write(folder: Path) -> Path:
    model: Any = load_model(str(ARCHITECTURE), "random", torch.float32, "eager", seed=0)
    taught: Any = load_pi0(str(TAUGHT), "pretrained", torch.float32, "eager", seed=0).model.vlm
    known, own = (load_tokenizer(str(path)).get_vocab() for path in (TAUGHT, ARCHITECTURE))
    shared = sorted(known.keys() & own.keys())
    words_VW, state = model.model.state_dict()[WORDS].clone(), taught.state_dict()
    words_VW[[own[word] for word in shared]] = state[WORDS][[known[word] for word in shared]]
    model.model.load_state_dict({**state, WORDS: words_VW})
    model.save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ARCHITECTURE / name, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS / "tiny_paligemma")
    print(f"wrote {write(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
