"""The fields of a ManiSkill block, and what ManiSkill's tasks are called in words. Imports nothing of ManiSkill's."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# ManiSkill has no instructions; these follow its task descriptions.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "PushCube-v1": ("push the cube to the target", "push the blue cube forward onto the red and white target"),
    "PullCube-v1": ("pull the cube to the target", "pull the blue cube back onto the red and white target"),
    "PickCube-v1": ("pick up the cube and hold it at the goal", "lift the red cube to the goal position"),
    "StackCube-v1": ("stack the red cube on the green cube", "put the red cube on top of the green one and let go"),
    "PlaceSphere-v1": ("put the sphere into the bin", "pick up the blue sphere and place it in the bin"),
    "LiftPegUpright-v1": ("stand the peg upright",),
    "PegInsertionSide-v1": ("insert the peg into the hole in the side of the box",),
    "PokeCube-v1": ("poke the cube with the peg",),
    "PullCubeTool-v1": ("pull the cube closer with the tool",),
    "RollBall-v1": ("roll the ball to the target",),
    "StackPyramid-v1": ("stack the cubes into a pyramid",),
    "PushT-v1": ("push the T-shaped block onto its outline",),
    "PlugCharger-v1": ("plug the charger into the socket",),
    "PickSingleYCB-v1": ("pick up the object and hold it at the goal",),
    "TurnFaucet-v1": ("turn the faucet on",),
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Options:
    """Fields of a ``simulators.maniskill:ManiSkill`` block."""

    task: str = "PushCube-v1"
    """Id of a task that ManiSkill has registered."""
    registered_by: str | None = None
    """A module to import first, which registers the task; null: ManiSkill itself."""
    control_mode: str | None = "pd_ee_delta_pose"
    """What an action means to the robot's controller; experts speak pd_ee_delta_pose (7 numbers) and pd_ee_delta_pos (4);
    null: the task's own choice."""
    robot: str | None = None
    """The robot's id, such as panda_wristcam (which adds a camera at the hand); null: the task's own choice."""
    reward: Literal["sparse", "dense", "progress"] = "sparse"
    """sparse: 1 for the action that succeeds. dense: ManiSkill's normalised dense reward, at most 1 an action; an episode ends
    with success, so that whoever nearly succeeds until time is up earns more. progress: its change since the last action, which
    adds up to 1 for a success, whenever it comes (RLinf's relative reward)."""
    max_steps: int | None = Field(default=None, gt=0)
    """Actions until truncation; null: as the task is registered."""
    instructions: tuple[str, ...] | None = None
    """Sentences for the task, one drawn for each episode; null: the table's, the task's own, or its id in words."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other episodes for the same task ids."""
    render: bool = True
    """Whether observations have images; without, only state and instruction (and no graphics driver is needed)."""
    image_size: int | None = Field(default=128, ge=16)
    """Side of the camera images, in pixels; null: each camera's own width and height."""
    expert_speed: float = Field(default=1.0, gt=0, le=1)
    """Largest number in an action of the scripted expert."""
    backend: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu: one batched simulation on the run's CUDA device. cpu: worker processes. auto: gpu where the run's device is one."""
    workers: int | None = Field(default=None, gt=0)
    """Worker processes, which share the environments; null: one an environment, but no more than there are processors."""
    time_limit: float = Field(default=120.0, gt=0)
    """Seconds that a worker may take for an action or a reset of one environment before it is replaced."""


def sentences(options: Options) -> tuple[str, ...]:
    """What an episode's instruction is drawn from; empty where neither the options nor the table have any."""
    return options.instructions or INSTRUCTIONS.get(options.task) or ()


def in_words(task: str) -> str:
    """A task's id as a sentence: PutCarrotOnPlate-v1 is "put carrot on plate"."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in task.partition("-")[0]).strip()
