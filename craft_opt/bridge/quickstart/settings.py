"""Numbers of the quickstart, and the fingerprints that name what it keeps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from typing import Any

from craft_opt.bridge.features import DEFAULT_POOLING
from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.simulation import (
    FPS,
    IMAGE_SIDE,
    MAX_EPISODE_STEPS,
    NEW_SKILLS,
    NOISE_LEVELS,
    OLD_SKILLS,
    Skill,
)

# Raised when the code of a stage changes what it makes: kept stages of before are then made anew.
STAGE_VERSION = 1

# Seeds of objects and noise: apart for what is trained on, measured on and was tuned on.
SEED_STRIDE = 10_000
OLD_SEED, NEW_SEED, HELD_OUT_SEED = 0, 4_000, 8_000
ROLLOUT_SEED = 3_000_000  # 500 000 to 2 999 999 was used for tuning


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes of a quickstart run.

    Attributes:
        seed: Seed of everything: demonstrations, teacher, anchors, fine-tuning, rollouts.
        episodes: Demonstrations of each skill.
        held_out_episodes: Demonstrations of each skill that only the cross-entropy is measured on.
        teacher_steps: Steps of pre-training on the old skills.
        teacher_lr: Its largest learning rate.
        steps: Steps of fine-tuning on the new skill.
        lr: Its largest learning rate.
        batch_size: Samples a step, in both.
        anchors: Anchors of each old skill.
        rollouts: Closed-loop episodes of each skill, before and after.
        pooling: Where ``hidden`` takes its features.
        top_k: The teacher's most probable tokens that ``token_ce`` keeps at each position.
        normalization_stats: ``teacher`` or ``dataset``: whose statistics the fine-tuning takes.
    """

    seed: int = 0
    episodes: int = 48
    held_out_episodes: int = 4
    teacher_steps: int = 2000
    teacher_lr: float = 1e-3
    steps: int = 1000
    lr: float = 3e-4
    batch_size: int = 32
    anchors: int = 200
    rollouts: int = 20
    pooling: str = DEFAULT_POOLING
    top_k: int = 8
    normalization_stats: str = "teacher"
    old: tuple[Skill, ...] = OLD_SKILLS
    new: tuple[Skill, ...] = NEW_SKILLS

    @property
    def skills(self) -> tuple[Skill, ...]:
        """Old and new skills."""
        return self.old + self.new

    def first_seed(self, offset: int) -> int:
        """First seed of a kind of episodes."""
        return self.seed * SEED_STRIDE + offset


def fingerprint(**parts: Any) -> str:
    """Ten hexadecimal digits that stand for how a stage was made, versions of the simulator and LeRobot included."""
    made_with = {name: version(name) for name in ("lerobot", "metaworld", "mujoco", "torch")}
    world = (FPS, IMAGE_SIDE, MAX_EPISODE_STEPS, NOISE_LEVELS, SEED_STRIDE)
    # The network's and tokenizers' sizes are the defaults of this class.
    policy = {field.name: str(field.default) for field in fields(PI0FastTinyConfig) if field.default is not MISSING}
    everything = {"stage": STAGE_VERSION, "made_with": made_with, "world": world, "policy": policy, **parts}
    text = json.dumps(everything, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
