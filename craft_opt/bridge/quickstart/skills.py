"""Demonstrations of the skills as LeRobotDatasets on disk."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars
from lerobot.datasets import LeRobotDataset
from tqdm import tqdm

from craft_opt.bridge.anchor_manifest import sync_folder
from craft_opt.bridge.quickstart.simulation import (
    ACTION_DIM,
    FPS,
    IMAGE_SIDE,
    NOISE_LEVELS,
    STATE_DIM,
    Skill,
    demonstrate,
    end_with_parent,
)
from craft_opt.bridge.seals import seal

WORKERS = 2  # processes that simulate; the parent, which writes images, keeps up with two
IMAGE_KEY, STATE_KEY, ACTION_KEY = "observation.image", "observation.state", "action"


def features(side: int = IMAGE_SIDE) -> dict[str, Any]:
    """Features of the datasets: one camera, state [4], action [4]."""
    axes = ["x", "y", "z", "gripper"]
    return {
        IMAGE_KEY: {"dtype": "image", "shape": (side, side, 3), "names": ["height", "width", "channels"]},
        STATE_KEY: {"dtype": "float32", "shape": (STATE_DIM,), "names": axes},
        ACTION_KEY: {"dtype": "float32", "shape": (ACTION_DIM,), "names": axes},
    }


def collect(
    root: Path, repo_id: str, skills: Sequence[Skill], episodes: int, seed: int, *, workers: int = WORKERS
) -> LeRobotDataset:
    """Record demonstrations of some skills into a new dataset.

    Written beside ``root`` and renamed when whole, so that a killed run leaves nothing that loads.

    Args:
        root: Folder of the dataset; must not exist.
        repo_id: Its name.
        skills: The skills, recorded in turn.
        episodes: Episodes of each.
        seed: First seed; episode i of every skill takes ``seed + i``.
        workers: Processes that simulate.

    Raises:
        FileExistsError: ``root`` is there already.
    """
    if root.exists():
        raise FileExistsError(f"{root} is there already; remove it to record again")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = LeRobotDataset.create(repo_id=repo_id, fps=FPS, features=features(), root=partial, use_videos=False)
    jobs = [(skill, seed + i, NOISE_LEVELS[i % len(NOISE_LEVELS)]) for i in range(episodes) for skill in skills]
    disable_progress_bars()  # one bar for the episodes, none for the writing of each
    # Spawned, not forked: the parent has torch's threads, which a fork copies in a broken state.
    with (
        ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
        ) as pool,
        tqdm(total=len(jobs), desc=f"Demonstrations ({repo_id})", unit="episode") as bar,
    ):
        # map keeps the order of the jobs, so the dataset does not depend on which worker is faster.
        for (skill, _, _), demo in zip(jobs, pool.map(demonstrate, *zip(*jobs, strict=True)), strict=True):
            for image, state, action in zip(demo.images, demo.states, demo.actions, strict=True):
                writer.add_frame({IMAGE_KEY: image, STATE_KEY: state, ACTION_KEY: action, "task": skill.prompt})
            writer.save_episode()
            bar.update(1)
    enable_progress_bars()
    writer.finalize()
    seal(partial)
    partial.rename(root)
    sync_folder(root.parent)
    return LeRobotDataset(repo_id, root=root)
