"""Skills that share a scene: their worlds begin alike, whatever the goal. Does not import LeRobot.

Worker processes import this file with ``simulation.py``, and LeRobot alone takes ten seconds to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from gymnasium.spaces import Box

from craft_opt.bridge.quickstart.simulation import Skill


@dataclass(frozen=True)
class SceneSkill(Skill):
    """A MetaWorld task whose world begins as that of another one, so that only the prompt tells which is asked for.

    MetaWorld's tasks of one model (a window, a faucet) draw the object's place from ranges of their own and set the
    joint to where the task is still to be done. Here the ranges and the joint's position are the same for all goals:
    for one seed the image and the robot's state before the first action are equal bit for bit.

    Attributes:
        low: Smallest coordinates of the object, metres.
        high: Largest.
        joint: Name of the joint that is set; empty where MetaWorld leaves it alike for every goal.
        position: Where it is set, metres or radians.
    """

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    joint: str = ""
    position: float = 0.0

    def arrange(self, env: Any) -> None:
        """Let every reset of a MetaWorld environment begin in the common scene."""
        env._random_reset_space = Box(np.array(self.low), np.array(self.high), dtype=np.float64)
        reset_model = env.reset_model

        def reset_in_scene() -> Any:
            reset_model()
            if self.joint:
                env.data.joint(self.joint).qpos = self.position
            # MetaWorld returns the sites as they were before the reset moved the object.
            mujoco.mj_forward(env.model, env.data)
            return env._get_obs()

        env.reset_model = reset_in_scene
