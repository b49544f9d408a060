"""Closed-loop evaluation: LeRobot's MetaworldEnv with the light camera, driven by LeRobot's eval_policy."""

from __future__ import annotations

from typing import Any

from craft_opt.bridge.quickstart.simulation import CAMERA, IMAGE_SIDE, MAX_EPISODE_STEPS, Skill, World

# isort: split
# After simulation.py, which tells MuJoCo to look for no display.
import gymnasium as gym
import numpy as np
from lerobot.envs.metaworld import MetaworldEnv
from lerobot.envs.utils import FreezeAfterEpisodeEnd
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy
from numpy.typing import NDArray


class LightMetaworldEnv(MetaworldEnv):
    """LeRobot's MetaworldEnv with small images without OpenGL, and a shorter time limit.

    Args:
        skill: The task.
        render_every: Steps between two images; the steps in between show the last one. A policy that acts in chunks
            looks only once a chunk, so with its chunk length nothing that it sees changes.
        side: Side of the images in pixels.
    """

    def __init__(self, skill: Skill, render_every: int = 1, side: int = IMAGE_SIDE) -> None:
        super().__init__(
            task=skill.env_name,
            camera_name=CAMERA,
            obs_type="pixels_agent_pos",
            observation_width=side,
            observation_height=side,
        )
        self._skill, self._side, self._render_every = skill, side, render_every
        self._max_episode_steps = MAX_EPISODE_STEPS
        self._world: World | None = None
        self._steps = 0
        self._image: NDArray[np.uint8] = np.zeros((side, side, 3), dtype=np.uint8)

    def _ensure_env(self) -> None:
        if self._world is None:
            self._world = World(self._skill, self._side)
            self._env = self._world.env

    def render(self) -> NDArray[np.uint8]:
        """The image of the present state."""
        self._ensure_env()
        assert self._world is not None
        return self._world.image()

    def _format_raw_obs(self, raw_obs: NDArray[np.float64]) -> dict[str, Any]:
        if self._steps % self._render_every == 0:
            self._image = self.render()
        return {"pixels": self._image.copy(), "agent_pos": raw_obs[:4]}

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode with an image of it."""
        self._steps = 0
        return super().reset(seed=seed, **kwargs)

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step of 1/80 s."""
        self._steps += 1
        return super().step(np.clip(action, -1.0, 1.0))


class Evaluator:
    """Measures success rates; keeps its environments, which take a third of a second each to build.

    Args:
        envs: Episodes that run side by side in one batch of the policy.
        chunk: Steps that the policy acts without looking.
    """

    def __init__(self, envs: int, chunk: int) -> None:
        self._envs, self._chunk = envs, chunk
        self._vectors: dict[str, gym.vector.SyncVectorEnv] = {}

    def success(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        skill: Skill,
        episodes: int,
        seed: int,
    ) -> list[bool]:
        """Run episodes with the seeds ``seed, seed + 1, ...`` and return which of them succeeded."""
        if skill.name not in self._vectors:
            self._vectors[skill.name] = gym.vector.SyncVectorEnv(
                [lambda: FreezeAfterEpisodeEnd(LightMetaworldEnv(skill, self._chunk))] * self._envs
            )
        identity: PolicyProcessorPipeline = PolicyProcessorPipeline(steps=[])
        info = eval_policy(
            self._vectors[skill.name], policy, identity, identity, preprocessor, postprocessor, episodes,
            start_seed=seed,
        )  # fmt: skip
        return [bool(episode["success"]) for episode in info["per_episode"]]

    def close(self) -> None:
        """Close the environments."""
        for vector in self._vectors.values():
            vector.close()
        self._vectors.clear()
