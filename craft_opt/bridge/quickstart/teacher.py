"""The teacher: a tiny pi0_fast trained on the old skills with the same loop that fine-tunes, retention off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from craft_opt import CraftConfig
from craft_opt.bridge.anchor_manifest import sync_folder
from craft_opt.bridge.checkpoint import check_whole, latest_checkpoint
from craft_opt.bridge.config import CraftTrainConfig, parse_config, resume_config
from craft_opt.bridge.loop import train
from craft_opt.bridge.quickstart import configuration_pi0_fast_tiny  # noqa: F401  registers the policy's type
from craft_opt.bridge.quickstart.settings import QuickstartSettings
from craft_opt.bridge.quickstart.tokenizers import words_of
from craft_opt.bridge.seals import seal

SAVE_EVERY = 250


def teacher_config(settings: QuickstartSettings, repo_id: str, root: Path, output_dir: Path) -> CraftTrainConfig:
    """Configuration of the pre-training run."""
    # The vocabulary holds the words of the new skill too: a word-level tokenizer cannot learn words later.
    words = words_of(skill.prompt for skill in settings.skills)
    cfg = parse_config(
        [
            "--policy.type=pi0_fast_tiny",
            f"--policy.text_words={json.dumps(words)}",
            f"--policy.optimizer_lr={settings.teacher_lr}",
            f"--policy.scheduler_decay_steps={settings.teacher_steps}",
            f"--dataset.repo_id={repo_id}",
            f"--dataset.root={root}",
        ]
    )
    cfg.craft = CraftConfig(enabled=False)
    cfg.output_dir = output_dir
    cfg.steps, cfg.batch_size, cfg.seed = settings.teacher_steps, settings.batch_size, settings.seed
    cfg.save_freq = min(SAVE_EVERY, settings.teacher_steps)
    cfg.log_freq = max(1, settings.teacher_steps // 10)
    return cfg


def make_teacher(settings: QuickstartSettings, repo_id: str, root: Path, output: Path) -> Path:
    """Train the teacher, or go on where a stopped training was, and return its folder.

    Args:
        settings: Sizes of the run.
        repo_id: Dataset of the old skills.
        root: Its folder.
        output: Folder of the finished teacher: policy, processors and normalisation statistics.
    """
    if output.exists():
        return output
    partial = output.with_name(output.name + ".partial")
    checkpoint = latest_checkpoint(partial)
    if checkpoint is None:
        shutil.rmtree(partial, ignore_errors=True)
        cfg = teacher_config(settings, repo_id, root, partial)
    else:
        cfg = resume_config(checkpoint)
    if checkpoint is not None:
        check_whole(checkpoint, partial)
    finished = checkpoint if checkpoint is not None and int(checkpoint.name) >= settings.teacher_steps else None
    if finished is None:
        finished = train(cfg).checkpoint
        assert finished is not None, "the pre-training saves its last step"
    copy = output.with_name(output.name + ".copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished / "pretrained_model", copy)
    seal(copy)
    copy.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(partial)
    return output
