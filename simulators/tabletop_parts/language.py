"""Instructions: templates with paraphrases, some of them held out, all made of the same few words."""

from __future__ import annotations

from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("cube", "disc", "prism")


@dataclass(frozen=True)
class Templates:
    """The sentences of a family. {a} is the named block, {b} the second named thing, {z} the colour of the goal zone."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]  # other sentences, made of words that occur in training


TEMPLATES = {
    "reach": Templates(
        ("reach the {a}", "move to the {a}", "touch the {a}", "go to the {a}", "move the gripper to the {a}"),
        ("go and touch the {a}", "move and reach the {a}", "bring the gripper to the {a}"),
    ),
    "push": Templates(
        (
            "push the {a} to the {z} zone",
            "slide the {a} into the {z} zone",
            "push the {a} into the {z} area",
            "slide the {a} to the {z} area",
            "move the {a} to the {z} zone",
        ),
        ("slide the {a} into the {z} area", "push the {a} and move it to the {z} zone", "move the {a} into the {z} area"),
    ),
    "pick_place": Templates(
        (
            "put the {a} on the {b}",
            "place the {a} on the {b}",
            "pick up the {a} and put it on the {b}",
            "set the {a} down on the {b}",
            "pick up the {a} and place it on top of the {b}",
        ),
        ("put the {a} on top of the {b}", "pick up the {a} and set it down on the {b}", "place the {a} down on the {b}"),
    ),
    "sort": Templates(
        (
            "sort the {a} and the {b}",
            "sort the {a} and the {b} by colour",
            "bring the {a} and the {b} to the zones of their colour",
            "put the {a} and the {b} into the zones of their colour",
        ),
        ("sort the {a} and the {b} by the colour of the zones", "move the {a} and the {b} to the zones of their colour"),
    ),
}


def block_name(colour: int, shape: int) -> str:
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def vocabulary() -> list[str]:
    """Every word an instruction can contain, in either split, sorted."""
    sentences = [s for t in TEMPLATES.values() for s in t.train + t.held_out]
    words = {word for sentence in sentences for word in sentence.split() if not word.startswith("{")}
    return sorted(words | set(COLOURS) | set(SHAPES) | {"tray"})
