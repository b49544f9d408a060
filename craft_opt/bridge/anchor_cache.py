"""The anchor cache on disk: checks, memory-mapped batches in a reproducible order.

A cache is a folder with ``manifest.json`` and safetensors shards. A self-contained sample holds images (uint8), task
text, raw state and action token ids, so that the run's own preprocessor processes it and the dataset it came from may
be gone; a sample by reference names a frame of a LeRobotDataset, which holds the first three. Beside them lie the
teacher's features, or what it says of the tokens. Nothing is loaded that was not checked.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from craft_opt.bridge.anchor_manifest import (
    EPISODE,
    FEATURE_MASK,
    FEATURE_PREFIX,
    FRAME_IN_EPISODE,
    IDENTITY,
    IMAGE_PREFIX,
    SOURCE,
    SOURCE_FRAME,
    STATE,
    STORED_DTYPES,
    TASK,
    TEACHER_CE,
    TOKEN_MASK,
    TOKENS,
    TOP_IDS,
    TOP_LOGPROBS,
    AnchorManifest,
    ShardInfo,
    rebuild_hint,
    sha256_of_file,
)
from craft_opt.bridge.untrusted import MAX_HEADER_BYTES, brief, check_header, check_inside, shown

_IDENTITY_BYTES = 32  # of a SHA-256


@dataclass(frozen=True)
class AnchorBatch:
    """Anchors as they lie in the cache.

    Attributes:
        images: The policy's camera key → (batch, channels, height, width) uint8.
        state: (batch, state) fp32, not normalised.
        tasks: Task texts.
        action_tokens: (batch, tokens) ids of the language model's vocabulary.
        action_token_mask: (batch, tokens), True for real tokens.
        features: Layer → the teacher's features; empty for ``token_ce``.
        feature_mask: (batch,) or (batch, positions); None for ``token_ce``.
        teacher_ce: For ``token_ce``: (batch,) fp32, the teacher's own mean cross-entropy of each sample's real tokens
            (without the start token, which nothing predicts), nats.
        top_ids: For ``token_ce`` with top_k > 0: (batch, tokens, k) ids of the teacher's most probable tokens in the
            place of each action token, most probable first; 0 where no token is predicted.
        top_logprobs: Their log-probabilities under the teacher, fp32, not normalised anew: the rest of the mass is
            what the other tokens have.
    """

    images: dict[str, Int[Tensor, "batch channels height width"]]
    state: Float[Tensor, "batch state"]
    tasks: list[str]
    action_tokens: Int[Tensor, "batch tokens"]
    action_token_mask: Bool[Tensor, "batch tokens"]
    features: dict[int, Tensor]
    feature_mask: Bool[Tensor, "batch *positions"] | None
    teacher_ce: Float[Tensor, "batch"] | None = None
    top_ids: Int[Tensor, "batch tokens k"] | None = None
    top_logprobs: Float[Tensor, "batch tokens k"] | None = None


class Frames(Protocol):
    """The datasets behind a cache by reference."""

    def read(
        self, sources: Sequence[int], frames: Sequence[int]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch state"], list[str]]:
        """Images under the policy's keys, state and task texts of frames, by source and absolute index."""
        ...

    def task_texts(self, sources: Sequence[int], frames: Sequence[int]) -> list[str]:
        """Task texts alone, with no image read."""
        ...


class AnchorCache:
    """A cache that was checked and is memory-mapped; samples are read when a batch asks for them.

    Args:
        folder: The cache.
        manifest: Its manifest.

    Raises:
        FileNotFoundError: A dataset that it refers to is gone.
        ValueError: A dataset that it refers to holds other frames by now.
    """

    def __init__(self, folder: Path, manifest: AnchorManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._ends = np.cumsum([shard.samples for shard in manifest.shards])
        self._shards: list[dict[str, Tensor]] = []
        for shard in manifest.shards:
            # The tensors keep the mapping alive; nothing is read until it is indexed.
            with safe_open(folder / shard.file, framework="pt") as file:
                self._shards.append({name: file.get_tensor(name) for name in manifest.tensors})
        self._frames: Frames | None = None
        if manifest.storage == "reference":
            # Here, so that the format itself does not know LeRobot.
            from craft_opt.bridge.anchor_frames import ReferencedFrames

            self._frames = ReferencedFrames(folder, manifest, self.column)

    @classmethod
    def open(cls, folder: str | Path) -> AnchorCache:
        """Check a cache (manifest, sizes, checksums, shapes; of one by reference the frames too) and map it.

        Raises:
            FileNotFoundError: There is no cache, or a shard or dataset is missing.
            ValueError: Something in it is damaged.
        """
        folder = Path(folder)
        manifest = AnchorManifest.read(folder)
        for shard in manifest.shards:
            check_shard(folder, shard, manifest)
        check_forms(folder, manifest)
        cache = cls(folder, manifest)
        cache._check_numbers()
        return cache

    def __len__(self) -> int:
        return self.manifest.samples

    def gather(self, indices: list[int]) -> AnchorBatch:
        """Read anchors by number, in the order given."""
        rows = {name: torch.stack([self._row(name, index) for index in indices]) for name in self.manifest.tensors}
        if self._frames is None:
            images, state = _with_prefix(rows, IMAGE_PREFIX), rows[STATE]
            tasks = [self.manifest.tasks[index] for index in rows[TASK].tolist()]
        else:
            images, state, tasks = self._frames.read(rows[SOURCE].tolist(), rows[SOURCE_FRAME].tolist())
        return AnchorBatch(
            images=images,
            state=state,
            tasks=tasks,
            action_tokens=rows[TOKENS].long(),
            action_token_mask=rows[TOKEN_MASK],
            features={int(layer): value for layer, value in _with_prefix(rows, FEATURE_PREFIX).items()},
            feature_mask=rows.get(FEATURE_MASK),
            teacher_ce=rows.get(TEACHER_CE),
            top_ids=rows[TOP_IDS].long() if TOP_IDS in rows else None,
            top_logprobs=rows.get(TOP_LOGPROBS),
        )

    def column(self, name: str) -> Tensor:
        """One of the cache's tensors for all anchors, in order."""
        return torch.cat(list(self.parts(name)))

    def parts(self, name: str) -> Iterator[Tensor]:
        """The same, file by file, for what may not fit in memory."""
        return (shard[name] for shard in self._shards)

    def task_texts(self) -> list[str]:
        """The task text of every anchor, in order."""
        if self._frames is not None:
            return self._frames.task_texts(self.column(SOURCE).tolist(), self.column(SOURCE_FRAME).tolist())
        return [self.manifest.tasks[index] for index in self.column(TASK).tolist()]

    def _check_numbers(self) -> None:
        """Refuse anchors that point beyond what they point into: Python would take -1 for the last."""
        limits = {TASK: len(self.manifest.tasks), SOURCE: len(self.manifest.sources), SOURCE_FRAME: None, TOKENS: None}
        for name in limits.keys() & self.manifest.tensors.keys():
            for shard, part in zip(self.manifest.shards, self.parts(name), strict=True):
                low, high = int(part.min()), int(part.max())
                if low < 0 or high >= (limits[name] or high + 1):
                    raise ValueError(
                        f"{self.folder / shard.file} has {name} {low} to {high} of {limits[name] or 'any number'}; "
                        f"{rebuild_hint(self.folder)}"
                    )

    def _row(self, name: str, index: int) -> Tensor:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[shard]) - self.manifest.shards[shard].samples
        return self._shards[shard][name][index - start]


class AnchorOrder:
    """An endless order of anchors: one permutation after the other, a pure function of seed and position.

    Args:
        samples: Number of anchors.
        seed: Seed of the permutations.
        position: Anchors drawn so far, by all processes.
        rank: Number of this process among those that draw together.
        processes: How many those are.
    """

    def __init__(self, samples: int, seed: int, position: int = 0, *, rank: int = 0, processes: int = 1) -> None:
        self.samples, self.seed, self.position = samples, seed, position
        self.rank, self.processes = rank, processes
        self._epoch = -1
        self._permutation: list[int] = []

    def draw(self, count: int) -> list[int]:
        """Numbers of this process' next ``count`` anchors; the other processes take theirs beside them."""
        drawn = []
        for _ in range(count * self.processes):
            epoch, offset = divmod(self.position, self.samples)
            if epoch != self._epoch:
                # Its own generator: the order depends on no other use of randomness, and a resumed run finds it again.
                entropy = np.random.SeedSequence([self.seed, epoch]).generate_state(1, dtype=np.uint64)[0]
                generator = torch.Generator().manual_seed(int(entropy))
                self._permutation = torch.randperm(self.samples, generator=generator).tolist()
                self._epoch = epoch
            drawn.append(self._permutation[offset])
            self.position += 1
        return drawn[self.rank * count : (self.rank + 1) * count]


def check_shard(folder: Path, shard: ShardInfo, manifest: AnchorManifest) -> None:
    """Check one file of a cache: size, checksum, and that it holds what the manifest says.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is damaged, or holds something else.
    """
    file = folder / shard.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing from the anchor cache; {rebuild_hint(folder)}")
    check_inside(folder, file, rebuild_hint(folder))
    if (found := file.stat().st_size) != shard.bytes:
        raise ValueError(
            f"{file} is truncated or changed: {found} bytes instead of {shard.bytes}; {rebuild_hint(folder)}"
        )
    expected = {name: (info.dtype, [shard.samples, *info.shape]) for name, info in manifest.tensors.items()}
    # In Python's whole numbers, before anything of these shapes is made: a declared size may be absurd.
    needed = sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in expected.values())
    if needed > found:
        raise ValueError(
            f"{file} has {found} bytes, and the shapes that the manifest declares need {needed}; {rebuild_hint(folder)}"
        )
    # A file with holes takes no room, however long it is: its checksum would take days.
    if found > needed + MAX_HEADER_BYTES or found > shutil.disk_usage(folder).total:
        raise ValueError(f"{file} has {found} bytes, and its anchors take {needed}; {rebuild_hint(folder)}")
    if sha256_of_file(file) != shard.sha256:
        raise ValueError(f"{file} is damaged: its checksum differs from the manifest's; {rebuild_hint(folder)}")
    check_header(file, rebuild_hint(folder))
    try:
        with safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            holds = {
                name: (STORED_DTYPES.get(part.get_dtype(), part.get_dtype()), list(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({brief(error)}); {rebuild_hint(folder)}") from error
    if holds != expected:
        raise ValueError(f"{file} holds {brief(holds)} instead of {brief(expected)}; {rebuild_hint(folder)}")


def check_forms(folder: Path, manifest: AnchorManifest) -> None:
    """Check that every tensor has the dtype and the dimensions that its use needs.

    Raises:
        ValueError: One has not.
    """
    tokens = manifest.tensors[TOKENS].shape
    mask = manifest.tensors[FEATURE_MASK].shape if FEATURE_MASK in manifest.tensors else []
    top = [*tokens, manifest.top_k]
    forms: dict[str, tuple[str, list[int | None]]] = {
        TOKENS: ("int32", [None]),
        TOKEN_MASK: ("bool", [*tokens]),
        **dict.fromkeys((SOURCE, TASK), ("int32", [])),
        **dict.fromkeys((SOURCE_FRAME, EPISODE, FRAME_IN_EPISODE), ("int64", [])),
        IDENTITY: ("uint8", [_IDENTITY_BYTES]),
        STATE: ("float32", [None]),
        TEACHER_CE: ("float32", []),
        TOP_IDS: ("int32", [*top]),
        TOP_LOGPROBS: ("float32", [*top]),
        FEATURE_MASK: ("bool", [None] * min(len(mask), 1)),
        **dict.fromkeys((f"{FEATURE_PREFIX}{k}" for k in manifest.layers), (manifest.feature_dtype, [*mask, None])),
        **dict.fromkeys((f"{IMAGE_PREFIX}{key}" for key in manifest.cameras), ("uint8", [None, None, None])),
    }
    for name in forms.keys() & manifest.tensors.keys():
        info, (dtype, wanted) = manifest.tensors[name], forms[name]
        sizes = [size if size is not None else found for size, found in zip(wanted, info.shape, strict=False)]
        if (info.dtype, info.shape) != (dtype, sizes) or len(info.shape) != len(wanted):
            raise ValueError(
                f"{folder} has {name} as {info.dtype} {shown(info.shape)}, and {manifest.kind} anchors need {dtype} "
                f"{['any' if size is None else size for size in wanted]}; {rebuild_hint(folder)}"
            )


def _with_prefix(rows: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in rows.items() if name.startswith(prefix)}
