"""What a policy can do: success in closed loop and cross-entropy of action tokens, skill by skill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import ACTION, ACTION_TOKENS
from torch import Tensor
from torch.nn import functional

from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.dataset import in_memory
from craft_opt.bridge.features import FeatureSpec, depth_of, hidden_features, pi0_fast_of
from craft_opt.bridge.fingerprints import digest
from craft_opt.bridge.policies import load_policy, make_processors, read_policy_config
from craft_opt.bridge.quickstart.env import Evaluator
from craft_opt.bridge.quickstart.simulation import Skill

# Every 8th frame of the held-out episodes: neighbours are nearly the same.
FRAME_STRIDE = 8
BATCH = 64
MAX_ENVS = 20  # worlds side by side: they hold a third of a gigabyte


@dataclass(frozen=True)
class SkillScore:
    """How a policy does one skill.

    Attributes:
        skill: Name of the skill.
        successes: Episodes that succeeded.
        rollouts: Episodes.
        action_ce: Mean cross-entropy of the action tokens on held-out demonstrations, nats a token.
        action_mae: Mean absolute error of the generated action chunks on the same, in the actions' unit.
        outcomes: Which episodes succeeded, in the order of their seeds.
    """

    skill: str
    successes: int
    rollouts: int
    action_ce: float
    action_mae: float | None = None
    outcomes: tuple[bool, ...] = ()

    @property
    def success(self) -> float:
        """Success rate in [0, 1]."""
        return self.successes / self.rollouts


@torch.no_grad()
def action_token_loss(policy: PreTrainedPolicy, batch: Mapping[str, Any]) -> tuple[float, int]:
    """Sum of the cross-entropies of a processed batch's action tokens, and their number.

    The framing tokens that LeRobot's own loss counts too ("Action", ":", "|") are left out: they reach zero at once and
    would hide what the policy knows.
    """
    base = pi0_fast_of(policy)
    last = depth_of(policy)
    hidden = hidden_features(policy, batch, FeatureSpec((last,), "action_tokens")).by_layer[last]
    logits = base.model.paligemma_with_expert.paligemma.lm_head(hidden[:, :-1]).float()
    targets: Tensor = batch[ACTION_TOKENS][:, 1:]
    # LeRobot maps FAST token k to the id vocab_size - 1 - fast_skip_tokens - k.
    top = logits.shape[-1] - base.config.fast_skip_tokens
    is_action = (targets < top) & (targets >= top - base.action_tokenizer.vocab_size)
    loss = functional.cross_entropy(logits[is_action], targets[is_action], reduction="sum")
    return float(loss), int(is_action.sum())


def measure(
    policy_path: Path, skills: Sequence[Skill], held_out: Path, repo_id: str, rollouts: int, seed: int, device: str
) -> list[SkillScore]:
    """Load a saved policy and measure it.

    Args:
        policy_path: Folder of the policy and its processors.
        skills: The skills, in the order of the result.
        held_out: Folder of the held-out demonstrations.
        repo_id: Their name.
        rollouts: Closed-loop episodes of each skill.
        seed: First seed of the episodes.
        device: ``cpu`` or ``cuda``.
    """
    config = read_policy_config(policy_path, (f"--device={device}",))
    deltas = resolve_delta_timestamps(config, LeRobotDatasetMetadata(repo_id, root=held_out))
    dataset = LeRobotDataset(repo_id, root=held_out, delta_timestamps=deltas)
    policy = load_policy(config, dataset.meta, {})
    policy.eval()
    preprocessor, postprocessor = make_processors(config, stats=None)
    errors = _errors(policy, preprocessor, postprocessor, dataset)
    evaluator = make_evaluator(rollouts, config.n_action_steps)
    scores = []
    for skill in skills:
        done = evaluator.success(policy, preprocessor, postprocessor, skill, rollouts, seed)
        scores.append(SkillScore(skill.name, sum(done), len(done), *errors[skill.prompt], tuple(done)))
        evaluator.close()  # twenty worlds of one task hold a third of a gigabyte
    return scores


def make_evaluator(rollouts: int, chunk: int) -> Evaluator:
    """An evaluator whose batches of at most 20 environments share out a number of rollouts evenly."""
    batches = -(-rollouts // MAX_ENVS)
    return Evaluator(envs=-(-rollouts // batches), chunk=chunk)


@torch.no_grad()
def _errors(
    policy: PreTrainedPolicy, preprocessor: Any, postprocessor: Any, dataset: LeRobotDataset
) -> dict[str, tuple[float, float]]:
    """Prompt → mean cross-entropy of the action tokens, mean absolute error of the generated actions."""
    frames = in_memory(dataset)
    by_prompt: dict[str, list[Any]] = {}
    for index in range(0, len(dataset), FRAME_STRIDE):
        item = frames[index]
        by_prompt.setdefault(item["task"], []).append(item)
    result = {}
    for prompt, items in by_prompt.items():
        total, count = 0.0, 0
        errors: list[Tensor] = []
        for start in range(0, len(items), BATCH):
            raw = lerobot_collate_fn(items[start : start + BATCH])
            assert raw is not None
            actions, is_pad = raw[ACTION].clone(), raw[f"{ACTION}_is_pad"].clone()
            batch = preprocessor(raw)
            loss, tokens = action_token_loss(policy, batch)
            total, count = total + loss, count + tokens
            generated = postprocessor(policy.predict_action_chunk(batch))
            errors.append((generated - actions).abs()[~is_pad])
        result[prompt] = (total / count, float(torch.cat(errors).mean()))
    return result


def save_scores(file: Path, scores: Sequence[SkillScore]) -> None:
    """Write scores, whole or not at all."""
    content = [asdict(score) for score in scores]
    write_atomically(file, json.dumps({"scores": content, "sha256": digest(content)}, indent=2))


def load_scores(file: Path) -> list[SkillScore]:
    """Read scores.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scores = [SkillScore(**{**s, "outcomes": tuple(s.get("outcomes", ()))}) for s in content["scores"]]
        intact = content["sha256"] == digest(content["scores"])
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{file} is damaged; delete it, and the same command measures again")
    return scores
