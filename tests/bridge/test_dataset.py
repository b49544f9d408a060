"""A dataset in memory gives LeRobot's own items."""

import pytest
import torch
from lerobot.datasets import LeRobotDataset

from craft_opt.bridge.dataset import InMemoryDataset, in_memory
from tests.quickstart.support import make_tiny_dataset

DELTAS = {"action": [k / 10 for k in range(-1, 4)], "observation.state": [-0.2, 0.0]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "data"
    make_tiny_dataset(folder, episodes=3, frames=6, cameras=("observation.image", "observation.wrist"))
    return folder


@pytest.mark.parametrize("episodes", [None, [0, 2]], ids=["all", "a selection"])
@pytest.mark.parametrize("deltas", [None, {"action": [0.0, 0.1, 0.2]}, DELTAS], ids=["none", "chunk", "history"])
def test_every_item_equals_lerobots(root, episodes, deltas):
    dataset = LeRobotDataset("local/tiny", root=root, episodes=episodes, delta_timestamps=deltas)
    kept = in_memory(dataset)
    assert isinstance(kept, InMemoryDataset)
    assert len(kept) == len(dataset)
    for k in range(len(dataset)):
        theirs, ours = dataset[k], kept[k]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert ours[key].dtype == value.dtype, key
                assert torch.equal(ours[key], value), key
            else:
                assert ours[key] == value


def test_image_transforms_are_applied(root):
    dataset = LeRobotDataset("local/tiny", root=root, image_transforms=lambda image: 1 - image)
    assert torch.equal(in_memory(dataset)[4]["observation.wrist"], dataset[4]["observation.wrist"])


def test_large_datasets_and_image_histories_stay_on_disk(root):
    dataset = LeRobotDataset("local/tiny", root=root)
    size = 18 * 2 * 32 * 32 * 3
    assert isinstance(in_memory(dataset, limit_bytes=size), InMemoryDataset)
    assert in_memory(dataset, limit_bytes=size - 1) is dataset
    history = LeRobotDataset("local/tiny", root=root, delta_timestamps={"observation.image": [-0.1, 0.0]})
    assert in_memory(history) is history
