"""A very small pi0_fast and a synthetic dataset that fits it, for every test that needs a real policy."""

from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.feature_utils import dataset_to_policy_features

from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
from craft_opt.bridge.quickstart.tokenizers import words_of

IMAGE_KEY = "observation.image"
TASKS = ("close the drawer", "press the button")
IMAGE_SIDE = 32


def tiny_features(cameras: tuple[str, ...] = (IMAGE_KEY,), side: int = IMAGE_SIDE) -> dict[str, Any]:
    """Features of the synthetic dataset: cameras [side, side, 3], state [4], action [4]."""
    image = {"dtype": "image", "shape": (side, side, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (4,), "names": ["a", "b", "c", "d"]}
    return {**dict.fromkeys(cameras, image), "observation.state": vector, "action": vector}


def make_tiny_dataset(
    root: Path,
    *,
    tasks: tuple[str, ...] = TASKS,
    episodes: int = 4,
    frames: int = 12,
    cameras: tuple[str, ...] = (IMAGE_KEY,),
    seed: int = 0,
) -> LeRobotDataset:
    """Write a dataset of random images and smooth random actions, and open it with action chunks of 4."""
    rng = np.random.default_rng(seed)
    writer = LeRobotDataset.create(
        repo_id="local/tiny", fps=10, features=tiny_features(cameras), root=root, use_videos=False
    )
    for episode in range(episodes):
        phase = rng.uniform(0, 2 * np.pi, size=4)
        for step in range(frames):
            wave = np.sin(phase + 0.4 * step).astype(np.float32)
            writer.add_frame(
                {
                    **{camera: rng.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8) for camera in cameras},
                    "observation.state": wave[::-1].copy(),
                    "action": wave,
                    "task": tasks[episode % len(tasks)],
                }
            )
        writer.save_episode()
    writer.finalize()
    return LeRobotDataset("local/tiny", root=root, delta_timestamps={"action": [step / 10 for step in range(4)]})


def tiny_config(dataset: LeRobotDataset, **overrides: Any) -> PI0FastTinyConfig:
    """Settings of a policy with 30 thousand parameters that fits the dataset."""
    features = dataset_to_policy_features(dataset.meta.features)
    settings: dict[str, Any] = {
        "width": 32,
        "depth": 2,
        "mlp_dim": 32,
        "num_heads": 2,
        "head_dim": 16,
        "vision_width": 16,
        "vision_depth": 1,
        "vision_mlp_dim": 16,
        "vision_heads": 2,
        "image_resolution": (IMAGE_SIDE, IMAGE_SIDE),
        "chunk_size": 4,
        "n_action_steps": 4,
        "fast_frequencies": 2,
        "fast_scale": 4.0,
        "max_action_tokens": 14,  # two more than needed, so that padding occurs in every batch
        "text_words": words_of(dataset.meta.tasks.index),
        "input_features": {k: f for k, f in features.items() if f.type is not FeatureType.ACTION},
        "output_features": {k: f for k, f in features.items() if f.type is FeatureType.ACTION},
        "device": "cpu",
    }
    return PI0FastTinyConfig(**{**settings, **overrides})


def make_tiny_policy(dataset: LeRobotDataset, **overrides: Any) -> tuple[PI0FastTinyPolicy, Any, Any]:
    """Build the policy and its pre- and postprocessor; weights from torch's global generator."""
    config = tiny_config(dataset, **overrides)
    pre, post = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    return PI0FastTinyPolicy(config), pre, post


def save_tiny_policy(folder: Path, policy: PI0FastTinyPolicy, pre: Any, post: Any) -> Path:
    """Save as LeRobot's checkpoints do: policy and both processors in one folder."""
    policy.save_pretrained(folder)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    return folder
