"""Frames of LeRobotDatasets as anchors need them: uint8 images, raw state, prompt, and the chunk of actions.

Also what a cache by reference rests on: the identity of every frame, so that a dataset that holds other frames by now
is refused before anything is trained on them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from httpx import HTTPError
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from PIL import Image
from torch import Tensor

from craft_opt.bridge.anchor_manifest import (
    EPISODE,
    FRAME_IN_EPISODE,
    IDENTITY,
    SOURCE,
    SOURCE_FRAME,
    AnchorManifest,
    SourceInfo,
    rebuild_hint,
)
from craft_opt.bridge.dataset import DEFAULT_LIMIT_BYTES


@dataclass(frozen=True)
class AnchorSource:
    """A dataset to draw anchors from.

    Attributes:
        repo_id: Its name.
        root: Its folder, None for LeRobot's cache or the hub.
        episodes: Episodes to draw from, None for all.
        revision: Revision on the hub.
        prompt: Task text that its frames are given in the place of their own, None to leave them theirs.
    """

    repo_id: str
    root: str | Path | None = None
    episodes: tuple[int, ...] | None = None
    revision: str | None = None
    prompt: str | None = None

    def metadata(self) -> LeRobotDatasetMetadata:
        """What LeRobot knows of the dataset.

        Raises:
            FileNotFoundError: There is no dataset in the folder.
        """
        # LeRobot makes the folder and then asks the hub for a dataset of that name.
        if self.root is not None and not (Path(self.root) / "meta" / "info.json").is_file():
            raise FileNotFoundError(f"{self.root} is no LeRobotDataset: meta/info.json is not there")
        return LeRobotDatasetMetadata(self.repo_id, root=self.root, revision=self.revision)

    def open(self, delta_timestamps: Callable[[LeRobotDatasetMetadata], Any] | None = None) -> LeRobotDataset:
        """Open the dataset's chosen episodes.

        Args:
            delta_timestamps: Makes LeRobot's ``delta_timestamps`` from the metadata.

        Raises:
            FileNotFoundError: There is no dataset.
            ValueError: It has no such episode.
        """
        metadata = self.metadata()
        unknown = [episode for episode in self.episodes or () if not 0 <= episode < metadata.total_episodes]
        if unknown:
            raise ValueError(f"dataset {self.repo_id} has episodes 0..{metadata.total_episodes - 1}, got {unknown}")
        return LeRobotDataset(
            self.repo_id,
            root=self.root,
            episodes=None if self.episodes is None else sorted(self.episodes),
            revision=self.revision,
            delta_timestamps=delta_timestamps(metadata) if delta_timestamps is not None else None,
            return_uint8=True,
        )


class FrameReader:
    """Reads single frames of a dataset, under the policy's keys.

    Datasets of stored images are read from their table, exactly as LeRobot reads them but without what it does to
    every other column of a chunk's rows (5 ms a frame, most of a small teacher's time); the others through LeRobot.

    Args:
        dataset: The dataset.
        cameras: The images to read, under the policy's keys.
        rename_map: Keys of the dataset → keys of the policy.
        prompt: Task text of every frame, None for the dataset's own.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        cameras: Sequence[str],
        rename_map: Mapping[str, str],
        prompt: str | None = None,
    ) -> None:
        self.dataset = dataset
        self._prompt = prompt
        self._table = dataset.hf_dataset.data
        own = {rename_map.get(key, key): key for key in dataset.meta.features}
        self._cameras = {key: own[key] for key in cameras}
        self._state, self._action = own[OBS_STATE], own[ACTION]
        self._renames = rename_map
        self._tasks = [str(name) if prompt is None else prompt for name in dataset.meta.tasks.index]
        self._deltas = {key: np.asarray(value) for key, value in (dataset.reader.delta_indices or {}).items()}
        meta = dataset.meta
        self._plain = (
            set(self._cameras.values()) <= set(meta.image_keys)
            and not meta.has_language_columns
            and set(self._deltas) <= {self._action}
            and all(_is_list(self._table.column(key).type) for key in (self._state, self._action))
        )
        self._episode = self._table.column("episode_index").to_numpy()
        self._absolute = self._table.column("index").to_numpy()
        self._frame = self._table.column("frame_index").to_numpy()
        self._task = self._table.column("task_index").to_numpy()
        self._first = np.asarray(meta.episodes["dataset_from_index"], dtype=np.int64)
        self._end = np.asarray(meta.episodes["dataset_to_index"], dtype=np.int64)

    def __call__(self, row: int) -> dict[str, Any]:
        """Read one frame: images (channels, height, width) uint8, state and actions fp32, ``task``."""
        if not self._plain:
            item = {self._renames.get(key, key): value for key, value in self.dataset[row].items()}
            found: dict[str, Any] = {key: _as_uint8(item[key]) for key in self._cameras}
            found |= {OBS_STATE: item[OBS_STATE].float(), ACTION: item[ACTION].float(), "task": self.task(row)}
            return found
        return {
            **{key: _decoded(self._table.column(own)[row].as_py()) for key, own in self._cameras.items()},
            OBS_STATE: torch.from_numpy(self._values(self._state, [row])[0]),
            ACTION: torch.from_numpy(self._chunk(row)),
            "task": self.task(row),
        }

    def motion(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The state and the flattened chunk of actions of a frame, both one-dimensional fp32; no image is read."""
        return self._values(self._state, [row]).ravel(), self._chunk(row).ravel()

    def task(self, row: int) -> str:
        """The task text of a frame."""
        return self._tasks[self._task[row]]

    def by_task(self) -> list[np.ndarray]:
        """The rows of each task, in the order of the dataset's tasks; one group where a prompt is given."""
        if self._prompt is not None:
            return [np.arange(len(self._task))]
        return [np.flatnonzero(self._task == task) for task in np.unique(self._task)]

    def place(self, row: int) -> tuple[int, int, int]:
        """Where a frame lies: its absolute index, its episode, and its number in the episode."""
        return int(self._absolute[row]), int(self._episode[row]), int(self._frame[row])

    def row_of(self, absolute: int) -> int | None:
        """The row of the frame with an absolute index, None where there is none."""
        row = int(np.searchsorted(self._absolute, absolute))
        return row if row < len(self._absolute) and self._absolute[row] == absolute else None

    def identity(self, row: int) -> bytes:
        """SHA-256 of what makes a frame the one it is: place, prompt, state and action."""
        sha = hashlib.sha256(repr((*self.place(row), self.task(row))).encode())
        for key in (self._state, self._action):
            sha.update(self._values(key, [row]).tobytes())
        return sha.digest()

    def _chunk(self, row: int) -> np.ndarray:
        """The frame's actions; those beyond its episode repeat the last, as LeRobot pads."""
        if self._action not in self._deltas:
            return self._values(self._action, [row])[0]
        episode, absolute = self._episode[row], self._absolute[row]
        wanted = (absolute + self._deltas[self._action]).clip(self._first[episode], self._end[episode] - 1)
        # An episode's rows lie together, whichever episodes were opened.
        return self._values(self._action, list(row + wanted - absolute))

    def _values(self, key: str, rows: Sequence[int]) -> np.ndarray:
        column = self._table.column(key)
        return np.asarray([column[int(row)].as_py() for row in rows], dtype=np.float32)


class ReferencedFrames:
    """The frames that a cache by reference names, checked to be the ones it was made from.

    Frames are kept decoded up to a GiB: anchors are drawn again and again.

    Args:
        folder: The cache.
        manifest: Its manifest.
        column: Gives one of the cache's tensors for all anchors.

    Raises:
        FileNotFoundError: A dataset is gone.
        ValueError: A dataset holds other frames than it did.
    """

    def __init__(self, folder: Path, manifest: AnchorManifest, column: Callable[[str], Tensor]) -> None:
        self._readers = [_reopened(folder, source, manifest) for source in manifest.sources]
        self._kept: dict[tuple[int, int], dict[str, Any]] = {}
        self._room = DEFAULT_LIMIT_BYTES
        self._cameras = manifest.cameras
        self._rows: dict[tuple[int, int], int] = {}
        places = zip(
            *(column(name).tolist() for name in (SOURCE, SOURCE_FRAME, EPISODE, FRAME_IN_EPISODE)), strict=True
        )
        for (number, absolute, episode, frame), identity in zip(places, column(IDENTITY), strict=True):
            if not 0 <= number < len(self._readers):
                raise ValueError(f"{folder} refers to dataset {number} of {len(self._readers)}; {rebuild_hint(folder)}")
            reader = self._readers[number]
            row = reader.row_of(absolute)
            if row is None or reader.identity(row) != bytes(identity.tolist()):
                found = "there is none" if row is None else "frame {2} of episode {1}".format(*reader.place(row))
                if row is not None and reader.place(row)[1:] == (episode, frame):
                    found = "another one in its place (other state, action or prompt)"
                raise ValueError(
                    f"dataset {manifest.sources[number].repo_id} was changed since {folder} was made by reference to "
                    f"it: where frame {frame} of episode {episode} was (index {absolute}), now {found}; put the "
                    f"dataset back as it was, or {rebuild_hint(folder)}"
                )
            self._rows[number, absolute] = row

    def read(self, sources: Sequence[int], frames: Sequence[int]) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        """Images under the policy's keys, state and task texts of frames, by source and absolute index."""
        items = [self._item(place) for place in zip(sources, frames, strict=True)]
        images = {key: torch.stack([item[key] for item in items]) for key in self._cameras}
        return images, torch.stack([item[OBS_STATE] for item in items]), [item["task"] for item in items]

    def task_texts(self, sources: Sequence[int], frames: Sequence[int]) -> list[str]:
        """Task texts alone, with no image read."""
        places = zip(sources, frames, strict=True)
        return [self._readers[place[0]].task(self._rows[place]) for place in places]

    def _item(self, place: tuple[int, int]) -> dict[str, Any]:
        if place in self._kept:
            return self._kept[place]
        item = self._readers[place[0]](self._rows[place])
        self._room -= sum(item[key].nbytes for key in self._cameras)
        if self._room >= 0:
            self._kept[place] = item
        return item


def _reopened(folder: Path, info: SourceInfo, manifest: AnchorManifest) -> FrameReader:
    episodes = None if info.episodes is None else tuple(info.episodes)
    revision = info.revision if info.root is None else None
    source = AnchorSource(info.repo_id, info.root, episodes, revision, info.prompt)
    where = info.root or "LeRobot's own folder or the hub"
    try:
        return FrameReader(source.open(), manifest.cameras, manifest.rename_map, source.prompt)
    except (OSError, HTTPError, ValueError, KeyError, IndexError) as error:
        gone = isinstance(error, OSError | HTTPError)
        why = "its folder is gone" if info.root is not None and not Path(info.root).exists() else error
        raise (FileNotFoundError if gone else ValueError)(
            f"{folder} refers to frames of dataset {info.repo_id} ({where}), which "
            f"{'cannot be opened' if gone else 'does not fit any more'} ({why}); put the dataset back as it was, or "
            f"build a cache that needs none with --storage=self_contained: {rebuild_hint(folder)}"
        ) from error


def _is_list(kind: pa.DataType) -> bool:
    """Whether a column holds vectors; LeRobot stores those of width 1 as plain numbers."""
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _decoded(cell: Mapping[str, Any]) -> Tensor:
    """A stored image file → (channels, height, width) uint8."""
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
    with Image.open(source) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1).contiguous()


def _as_uint8(image: Tensor) -> Tensor:
    """Image datasets give fp32 in [0, 1] made from uint8, video datasets uint8: back to uint8 without loss."""
    return image if image.dtype == torch.uint8 else (image * 255.0).round().to(torch.uint8)
