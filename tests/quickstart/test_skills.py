"""Demonstrations on disk are what the experts did, the same however they were collected, and whole or not there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset

from craft_opt.bridge.quickstart.simulation import (
    BUTTON_PRESS,
    FPS,
    NOISE_LEVELS,
    WINDOW_CLOSE,
    demonstrate,
)
from craft_opt.bridge.quickstart.skills import ACTION_KEY, IMAGE_KEY, STATE_KEY, collect

REPO = "local/demonstrations"
SKILLS = (BUTTON_PRESS, WINDOW_CLOSE)
EPISODES = 2
SEED = 5

# Dies like a machine that loses power: while the second of four episodes is being written.
KILLED = """
import os, signal, sys
from pathlib import Path
from lerobot.datasets import LeRobotDataset
from craft_opt.bridge.quickstart.skills import collect
from tests.quickstart.test_skills import EPISODES, REPO, SEED, SKILLS

save = LeRobotDataset.save_episode
saved = []

def dying_save(self, *args, **kwargs):
    if saved:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
        print("children", children, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, *args, **kwargs)
    saved.append(True)

LeRobotDataset.save_episode = dying_save
collect(Path(sys.argv[1]), REPO, SKILLS, EPISODES, SEED)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("recorded") / "data", REPO, SKILLS, EPISODES, SEED, workers=2)


def rows(dataset):
    """Everything that is stored of every frame, images as the bytes of their files."""
    return dataset.hf_dataset.with_format(None)[:]


def assert_same(first: LeRobotDataset, second: LeRobotDataset):
    assert rows(first) == rows(second)
    assert first.meta.tasks.equals(second.meta.tasks)
    assert first.meta.stats.keys() == second.meta.stats.keys()
    for key, stats in first.meta.stats.items():
        assert all(np.array_equal(value, second.meta.stats[key][name]) for name, value in stats.items()), key


def test_the_dataset_gives_back_what_the_experts_did(recorded):
    demonstrations = [
        (skill, demonstrate(skill, SEED + i, NOISE_LEVELS[i])) for i in range(EPISODES) for skill in SKILLS
    ]
    assert recorded.fps == FPS
    assert recorded.num_episodes == len(demonstrations)
    assert list(recorded.meta.episodes["length"]) == [len(demo.actions) for _, demo in demonstrations]
    index = 0
    for number, (skill, demo) in enumerate(demonstrations):
        for image, state, action in zip(demo.images, demo.states, demo.actions, strict=True):
            item = recorded[index]
            assert torch.equal(
                (item[IMAGE_KEY] * 255).round().to(torch.uint8), torch.from_numpy(image).permute(2, 0, 1)
            )
            assert torch.equal(item[STATE_KEY], torch.from_numpy(state))
            assert torch.equal(item[ACTION_KEY], torch.from_numpy(action))
            assert item["task"] == skill.prompt
            assert item["episode_index"] == number
            index += 1
    assert index == len(recorded)


def test_the_number_of_workers_changes_nothing(recorded, tmp_path):
    assert_same(collect(tmp_path / "data", REPO, SKILLS, EPISODES, SEED, workers=1), recorded)


def test_another_seed_is_another_dataset(recorded, tmp_path):
    other = collect(tmp_path / "data", REPO, SKILLS[:1], 1, SEED + 100, workers=1)
    assert not torch.equal(other[0][IMAGE_KEY], recorded[0][IMAGE_KEY])


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"data is there already; remove it"):
        collect(root, REPO, SKILLS, EPISODES, SEED)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine"]


def test_a_killed_collection_leaves_nothing_under_the_name_and_is_made_whole(recorded, tmp_path):
    root = tmp_path / "data"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(root)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=120,  # the workers hold its output open: were they to stay, this would wait for them
    )
    assert done.returncode == -signal.SIGKILL
    assert not root.exists()
    assert (tmp_path / "data.partial").is_dir(), "it died in the middle"
    workers = [int(pid) for pid in done.stdout.split("children")[1].split()]
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if is_alive(pid)], "the simulating processes end with the one that started them"

    assert_same(collect(root, REPO, SKILLS, EPISODES, SEED), recorded)
    assert not (tmp_path / "data.partial").exists()


def is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
