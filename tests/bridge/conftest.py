"""One small world for the whole folder: two datasets, a teacher, its anchor cache."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from craft_opt import CraftConfig
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.config import CraftTrainConfig, fine_tune_config
from tests.quickstart.support import make_tiny_dataset, make_tiny_policy, save_tiny_policy

NEW_TASKS = ("press the drawer",)
CACHE_SIZE = 20
SHARD_SIZE = 8


@dataclass(frozen=True)
class World:
    """Folders of the old skills' dataset, the new skill's, the teacher and its cache."""

    old: Path
    new: Path
    teacher: Path
    cache: Path

    def source(self) -> AnchorSource:
        return AnchorSource("local/tiny", self.old)

    def config(self, output_dir: Path, *, cache: Path | None = None, craft=None, **settings) -> CraftTrainConfig:
        """A run of three steps with retention at every other step."""
        defaults = {"anchor_cache_dir": str(cache or self.cache), "anchor_batch_size": 4, "retention_freq": 2}
        return fine_tune_config(
            self.teacher,
            "local/tiny",
            self.new,
            output_dir,
            craft=CraftConfig(**(defaults | (craft or {}))),
            device="cpu",
            **({"steps": 3, "batch_size": 4, "log_freq": 1, "save_checkpoint": False} | settings),
        )

    def flags(self, output_dir: Path) -> list[str]:
        """The same run as a command line."""
        return [
            f"--policy.path={self.teacher}",
            "--policy.device=cpu",
            "--dataset.repo_id=local/tiny",
            f"--dataset.root={self.new}",
            f"--output_dir={output_dir}",
            "--batch_size=4",
            "--log_freq=1",
            f"--craft.anchor_cache_dir={self.cache}",
            "--craft.anchor_batch_size=4",
            "--craft.retention_freq=2",
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    old = make_tiny_dataset(root / "old")
    make_tiny_dataset(root / "new", tasks=NEW_TASKS, seed=5)
    torch.manual_seed(0)
    save_tiny_policy(root / "teacher", *make_tiny_policy(old))
    found = World(root / "old", root / "new", root / "teacher", root / "cache")
    build_cache(
        found.cache,
        found.teacher,
        [found.source()],
        num_samples=CACHE_SIZE,
        shard_size=SHARD_SIZE,
        batch_size=4,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    return found


@pytest.fixture
def cache_copy(world: World, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(world.cache, tmp_path / "cache"))
