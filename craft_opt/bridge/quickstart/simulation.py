"""MetaWorld without a screen: worlds, scripted experts and demonstrations. Does not import LeRobot.

Worker processes import this file, and LeRobot alone takes ten seconds to import.
"""

import functools
import multiprocessing
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any

# Nothing here renders through OpenGL (see renderer.py); without this MuJoCo looks for a display at import.
os.environ.setdefault("MUJOCO_GL", "disable")

import metaworld
import metaworld.policies
import numpy as np
from numpy.typing import NDArray

from craft_opt.bridge.quickstart.renderer import RayRenderer

CAMERA = "corner2"
IMAGE_SIDE = 64
FPS = 80  # MetaWorld's control rate
STATE_DIM = ACTION_DIM = 4
# Standard deviations of the noise on the executed action, episode by episode in turn; the label stays the expert's
# clean action. Off the expert's path the labels lead back to it: what makes a cloned policy robust.
NOISE_LEVELS = (0.0, 0.3, 0.6)
# The experts need at most 110 steps with the largest noise (30 episodes of each skill).
MAX_EPISODE_STEPS = 150
TRIES = 3
RETRY_STRIDE = 100_000_000  # far from every seed that something else takes


@dataclass(frozen=True)
class Skill:
    """A MetaWorld task as a skill.

    Attributes:
        name: Short name for tables and files.
        env_name: MetaWorld's name of the task.
        prompt: What the policy is told: LeRobot's description of that task.
        expert: Class of the scripted expert in ``metaworld.policies``.
    """

    name: str
    env_name: str
    prompt: str
    expert: str

    def arrange(self, env: Any) -> None:
        """Change what MetaWorld's environment begins with; this class leaves it as it is."""


DRAWER_CLOSE = Skill("drawer-close", "drawer-close-v3", "Push and close a drawer", "SawyerDrawerCloseV3Policy")
BUTTON_PRESS = Skill(
    "button-press", "button-press-topdown-v3", "Press a button from the top", "SawyerButtonPressTopdownV3Policy"
)
WINDOW_CLOSE = Skill("window-close", "window-close-v3", "Push and close a window", "SawyerWindowCloseV3Policy")
OLD_SKILLS = (DRAWER_CLOSE, BUTTON_PRESS)
NEW_SKILLS = (WINDOW_CLOSE,)


@dataclass(frozen=True)
class Demonstration:
    """One successful episode.

    Attributes:
        images: [T, side, side, 3] uint8, before each action.
        states: [T, 4] fp32: position of the hand in metres, opening of the gripper.
        actions: [T, 4] fp32 in [-1, 1]: the expert's clean actions.
    """

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]


@functools.cache
def _benchmark(env_name: str) -> Any:
    # Shared by the worlds of a task: it places objects for 50 variations, nine tenths of the time to build a world.
    return metaworld.MT1(env_name, seed=42)


class World:
    """A MetaWorld task with random object positions from a seed, and a camera that needs no OpenGL."""

    def __init__(self, skill: Skill, side: int = IMAGE_SIDE) -> None:
        benchmark = _benchmark(skill.env_name)
        self.env = benchmark.train_classes[skill.env_name](camera_name=CAMERA)
        self.env.set_task(benchmark.train_tasks[0])
        self.env.model.cam_pos[2] = [0.75, 0.075, 0.7]  # closer to the table, as in LeRobot's environment
        self.env.reset()
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True  # reset(seed) decides where the objects lie
        skill.arrange(self.env)
        self._renderer = RayRenderer(self.env.model, CAMERA, side)

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Place the objects and return MetaWorld's observation."""
        self.env.seed(seed)
        observation, _ = self.env.reset(seed=seed)
        return observation

    def image(self) -> NDArray[np.uint8]:
        """The camera's image, upright: this camera hangs upside down."""
        return np.ascontiguousarray(np.flip(self._renderer.render(self.env.data), (0, 1)))


def expert_action(expert: Any, observation: NDArray[np.float64]) -> NDArray[np.float32]:
    """The scripted expert's action, clipped to [-1, 1] as MetaWorld itself would."""
    with warnings.catch_warnings():
        # The experts warn that MetaWorld clips what they ask for; that is how they are written.
        warnings.filterwarnings("ignore", message="Constant.s. may be too high")
        return np.clip(expert.get_action(observation), -1, 1).astype(np.float32)


def end_with_parent() -> None:
    """Let a worker process end when the one that started it is killed; its pool would let it wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_worlds: dict[tuple[Skill, int], World] = {}


def demonstrate(skill: Skill, seed: int, noise: float, side: int = IMAGE_SIDE) -> Demonstration:
    """Let the scripted expert do a task once, with noise on what is executed.

    An episode in which the noise defeats the expert is thrown away and the next placement is tried.

    Args:
        skill: The task.
        seed: Places the objects and draws the noise.
        noise: Standard deviation on the three axes of motion, in units of the action's range [-1, 1].
        side: Side of the images in pixels.

    Raises:
        RuntimeError: The expert failed ``TRIES`` times within ``MAX_EPISODE_STEPS`` steps each.
    """
    for attempt in range(TRIES):
        episode = _attempt(skill, seed + attempt * RETRY_STRIDE, noise, side)
        if episode is not None:
            return episode
    raise RuntimeError(
        f"the expert of {skill.name} failed {TRIES} times in {MAX_EPISODE_STEPS} steps (seed {seed}, noise {noise})"
    )


def _attempt(skill: Skill, seed: int, noise: float, side: int) -> Demonstration | None:
    key = (skill, side)
    if key not in _worlds:
        _worlds[key] = World(skill, side)
    world = _worlds[key]
    expert = getattr(metaworld.policies, skill.expert)()
    rng = np.random.default_rng(seed)
    images, states, actions = [], [], []
    observation = world.reset(seed)
    for _ in range(MAX_EPISODE_STEPS):
        action = expert_action(expert, observation)
        images.append(world.image())
        states.append(observation[:STATE_DIM].astype(np.float32))
        actions.append(action)
        executed = action.copy()
        executed[:3] += noise * rng.standard_normal(3)
        observation, _, _, _, info = world.env.step(np.clip(executed, -1, 1))
        if info["success"]:
            return Demonstration(np.stack(images), np.stack(states), np.stack(actions))
    return None
