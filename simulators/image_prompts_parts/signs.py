"""Signs with a word on them: which words there are, and pictures of them."""

from __future__ import annotations

import functools
import random

from PIL import Image, ImageDraw

from simulators.prompts_parts.common import WORDS as NAMES
from simulators.prompts_parts.drawing import font, pale

_SHORT = """
act add age ago aid aim air ant ape arm art ask axe bad bag bar bat bay bed bee big bin bit box boy bun bus buy cab can cap
car cat cow cry cup cut dad day den dig dog dot dry ear eat egg elf end eye fan far fat few fig fin fit fly fog fox fun fur
gap gas gem get gum gun gym ham hen hey hid hip hot how hub hug hut ice ink jam jar jaw jet job joy keg kid kit lab law leg
let lid lip log lot low mad man map mat men met mix mob mom mud mug nap net new nod nut oak oar odd off oil old one our out
pad pan paw pay pen pet pie pig pin pit pot pub put rag ram ran rat raw red rib rim rip rob rod row rub rug run sad sat saw
say sea see set she shy sip sit six ski sky son sow spy sum tab tag tap tea ten tie tin tip toe ton top toy try tub tug two
use van vet wax way web wet who why wig win wit yes zip zoo
"""
WORDS = tuple(sorted({*NAMES, *_SHORT.split()}))
DARK = ((20, 20, 20), (150, 20, 20), (15, 80, 25), (20, 35, 140))
_SIZES = (0.74, 0.82, 0.9)  # of the sign, across and down, in which the word stands
_SCALE = 2  # how much larger a word is written than it is shown
_STROKE = 2  # by which letters are bolder, as written


def words(longest: int) -> list[str]:
    """The words of three letters and more, in capitals, in order."""
    return [word.upper() for word in WORDS if 3 <= len(word) <= longest]


def paint(word: str, size: tuple[int, int], plain: bool, generator: random.Random) -> Image.Image:
    """The word as large as it fits, a little off the middle; plain: in black on white."""
    ink, paper = ((0, 0, 0), (255, 255, 255)) if plain else (generator.choice(DARK), pale(generator))
    share = generator.choice(_SIZES)
    width, height = round(size[0] * share), round(size[1] * share)
    image = Image.new("RGB", size, paper)
    left = generator.randint(1, max(1, size[0] - width - 1))
    top = generator.randint(1, max(1, size[1] - height - 1))
    image.paste(ink, (left, top), _written(word, width, height))
    return image


@functools.lru_cache(maxsize=2048)
def _written(word: str, width: int, height: int) -> Image.Image:
    """The word in the middle of a picture of its strength, 0 to 255, none of it cut off."""
    left, top, right, bottom = font(100).getbbox(word)
    room = width * _SCALE - 2 * _STROKE, height * _SCALE - 2 * _STROKE
    letters = font(max(4, int(100 * min(room[0] / (right - left), room[1] / (bottom - top)))))
    left, top, right, bottom = letters.getbbox(word)
    page = Image.new("L", (width * _SCALE, height * _SCALE))
    at = ((page.width - left - right) / 2, (page.height - top - bottom) / 2)
    ImageDraw.Draw(page).text(at, word, fill=255, font=letters, stroke_width=_STROKE)
    return page.reduce(_SCALE)
