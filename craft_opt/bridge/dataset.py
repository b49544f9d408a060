"""Small datasets decoded once and kept in memory; the items stay exactly LeRobot's."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

# Decoding takes LeRobot about 5 ms a sample, which at small model sizes is most of a step. One GiB of uint8 images is
# 87 thousand frames of 64x64, or 7 thousand of 224x224: the small sets meant here.
DEFAULT_LIMIT_BYTES = 2**30


class InMemoryDataset(Dataset[dict[str, Any]]):
    """A LeRobotDataset of stored images whose frames lie decoded in memory.

    Every item equals the wrapped dataset's: keys, dtypes, action chunks with their padding flags, task texts.

    Args:
        dataset: The dataset; see :func:`in_memory` for the ones that can be kept.
    """

    def __init__(self, dataset: LeRobotDataset) -> None:
        self.dataset = dataset
        reader = dataset.reader
        table = dataset.hf_dataset.data
        self._episode = table.column("episode_index").to_numpy()
        self._absolute = table.column("index").to_numpy()
        self._relative = {int(absolute): k for k, absolute in enumerate(self._absolute)}
        self._deltas = {key: np.asarray(deltas) for key, deltas in (reader.delta_indices or {}).items()}
        bounds = dataset.meta.episodes
        self._first = np.asarray(bounds["dataset_from_index"], dtype=np.int64)
        self._end = np.asarray(bounds["dataset_to_index"], dtype=np.int64)
        self._images = {key: _decoded(table.column(key)) for key in dataset.meta.image_keys}
        plain = dataset.hf_dataset.select_columns([k for k in table.column_names if k not in self._images])
        # One read of each column through LeRobot's own conversion, so that dtypes are its own.
        self._columns = {key: list(plain[:][key]) for key in plain.column_names}
        self._stacked = {key: torch.stack(self._columns[key]) for key in self._deltas}
        self._tasks = [str(name) for name in dataset.meta.tasks.index]

    def __len__(self) -> int:
        return len(self._episode)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One frame, as LeRobot gives it."""
        episode, absolute = int(self._episode[index]), int(self._absolute[index])
        item: dict[str, Any] = {key: column[index] for key, column in self._columns.items()}
        for key, deltas in self._deltas.items():
            wanted = absolute + deltas
            first, end = self._first[episode], self._end[episode]
            rows = [self._relative[int(k)] for k in wanted.clip(first, end - 1)]
            item[key] = self._stacked[key][rows]
            item[f"{key}_is_pad"] = torch.from_numpy((wanted < first) | (wanted >= end))
        for key, frames in self._images.items():
            item[key] = frames[index].to(torch.float32).div(255)
            if self.dataset.image_transforms is not None:
                item[key] = self.dataset.image_transforms(item[key])
        item["task"] = self._tasks[int(item["task_index"])]
        return item


def in_memory(dataset: LeRobotDataset, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Dataset[dict[str, Any]]:
    """Keep a dataset in memory where its items can be made from memory exactly; otherwise return it as it is.

    Left as they are: datasets of videos or depth maps, with a history of images, with language columns, streamed ones,
    and those above the limit.

    Args:
        dataset: A LeRobotDataset.
        limit_bytes: Largest size of the decoded images.
    """
    if not isinstance(dataset, LeRobotDataset):
        return dataset
    meta = dataset.meta
    deltas = dataset.reader.delta_indices or {}
    exact = not (meta.video_keys or meta.depth_keys or meta.has_language_columns or set(deltas) & set(meta.camera_keys))
    size = dataset.num_frames * sum(int(np.prod(meta.features[key]["shape"])) for key in meta.image_keys)
    return InMemoryDataset(dataset) if exact and size <= limit_bytes else dataset


def _decoded(column: Any) -> Tensor:
    """Stored image files → (frames, channels, height, width) uint8."""
    frames = []
    for cell in column.to_pylist():
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        with Image.open(source) as image:
            pixels = np.asarray(image)
        frames.append(pixels[..., None] if pixels.ndim == 2 else pixels)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
