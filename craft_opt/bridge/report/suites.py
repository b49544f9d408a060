"""Suites of the benchmark: sequences of stages, each with the skills that are learned in it.

Stage 0 is the pre-training; the policy after it is the teacher of the first stage of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from craft_opt.bridge.quickstart.simulation import (
    BUTTON_PRESS,
    DRAWER_CLOSE,
    NEW_SKILLS,
    OLD_SKILLS,
    WINDOW_CLOSE,
    Skill,
)
from craft_opt.bridge.report.scenes import SceneSkill


@dataclass(frozen=True)
class Suite:
    """A sequence of skills.

    Attributes:
        name: A letter.
        title: What it is, for headings.
        stages: The skills of each stage, pre-training first.
    """

    name: str
    title: str
    stages: tuple[tuple[Skill, ...], ...]

    @property
    def skills(self) -> tuple[Skill, ...]:
        """All skills, in the order of the stages: the columns of R."""
        return tuple(skill for stage in self.stages for skill in stage)

    @property
    def learned(self) -> tuple[int, ...]:
        """The stage in which each skill is learned."""
        return tuple(number for number, stage in enumerate(self.stages) for _ in stage)


HANDLE_PRESS = Skill("handle-press", "handle-press-v3", "Press a handle down", "SawyerHandlePressV3Policy")
FAUCET_OPEN = Skill("faucet-open", "faucet-open-v3", "Rotate the faucet counter-clockwise", "SawyerFaucetOpenV3Policy")

# The window half open, the faucet in the middle: what a camera sees before the first action tells nothing of the goal.
_WINDOW = {"low": (0.0, 0.75, 0.2), "high": (0.0, 0.9, 0.2), "joint": "window_slide", "position": 0.1}
_FAUCET = {"low": (-0.1, 0.8, 0.0), "high": (0.1, 0.85, 0.0)}


def _scene(name: str, prompt: str, expert: str, scene: Mapping[str, Any]) -> SceneSkill:
    return SceneSkill(name, f"{name}-v3", prompt, expert, **scene)


_OPEN_WINDOW = _scene("window-open", "Push and open a window", "SawyerWindowOpenV3Policy", _WINDOW)
_CLOSE_WINDOW = _scene("window-close", WINDOW_CLOSE.prompt, WINDOW_CLOSE.expert, _WINDOW)
_OPEN_FAUCET = _scene("faucet-open", FAUCET_OPEN.prompt, FAUCET_OPEN.expert, _FAUCET)
_CLOSE_FAUCET = _scene("faucet-close", "Rotate the faucet clockwise", "SawyerFaucetCloseV3Policy", _FAUCET)

# Every expert here solved 10 of 10 placements within 150 steps at each of the demonstrations' three noise levels.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("S", "two old skills and a new one, each in a scene of its own", (OLD_SKILLS, NEW_SKILLS)),
        Suite(
            "L",
            "five skills, the first two pre-trained, three learned one after another",
            ((DRAWER_CLOSE, BUTTON_PRESS), (WINDOW_CLOSE,), (HANDLE_PRESS,), (FAUCET_OPEN,)),
        ),
        Suite(
            "D",
            "one scene for the old skill and the new one: only the prompt tells them apart",
            ((_OPEN_WINDOW, _OPEN_FAUCET), (_CLOSE_WINDOW,), (_CLOSE_FAUCET,)),
        ),
    )
}
