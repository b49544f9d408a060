"""The anchor cache on disk: manifest, shards, checks, memory-mapped batches in a reproducible order.

A cache is a folder with ``manifest.json`` and safetensors shards. Every sample is self-contained: images (uint8), task
text, raw state and action token ids, so that the run's own preprocessor processes it and the dataset it came from may
be gone; beside them the teacher's features. Nothing is loaded that was not checked: the manifest carries a checksum of
itself and one of every shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "craft-anchor-cache"
VERSION = 1
MANIFEST_FILE = "manifest.json"
KINDS = ("hidden", "token_ce")

IMAGE_PREFIX = "image/"
FEATURE_PREFIX = "features/"
STATE, TOKENS, TOKEN_MASK, TASK, FEATURE_MASK, SOURCE_FRAME = (
    "state",
    "action_tokens",
    "action_token_mask",
    "task_index",
    "feature_mask",
    "source_frame",
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ShardInfo:
    """One safetensors file of a cache.

    Attributes:
        file: Name inside the cache folder.
        samples: Samples in it.
        bytes: Its size.
        sha256: Checksum of the whole file.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceInfo:
    """A dataset that anchors were taken from.

    Attributes:
        repo_id: Its name.
        revision: Its revision, as LeRobot resolved it.
        episodes: The episodes that were drawn from, None for all.
        frames: Frames in them.
    """

    repo_id: str
    revision: str
    episodes: list[int] | None
    frames: int


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (torch's name) and shape of one sample's tensor."""

    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class AnchorManifest:
    """What a cache holds and what made it.

    Attributes:
        kind: ``hidden`` (features) or ``token_ce`` (the teacher's tokens).
        samples: Number of anchors.
        shards: Files in order.
        tensors: Name → dtype and shape of one sample.
        layers: Decoder layers, counted from 1.
        depth: Decoder layers of the teacher.
        pooling: How positions were pooled.
        feature_dtype: Dtype of the stored features.
        compute_dtype: Dtype that the teacher computed in.
        token_source: ``demonstrated`` or ``teacher``: whose action tokens were forced.
        teacher_variance: Layer (as text) → variance of its features over the cache, averaged over features.
        teacher: Where the teacher was loaded from, as given.
        teacher_fingerprint: Fingerprint of its weights.
        preprocessor_fingerprint: Fingerprint of the preprocessor, statistics included.
        normalization_stats: ``teacher`` or ``dataset``.
        sources: Datasets of the anchors.
        tasks: Task texts; ``task_index`` points into them.
        seed: Seed of the selection.
        versions: Versions of the packages that made the cache.
    """

    kind: str
    samples: int
    shards: list[ShardInfo]
    tensors: dict[str, TensorInfo]
    layers: list[int]
    depth: int
    pooling: str
    feature_dtype: str
    compute_dtype: str
    token_source: str
    teacher_variance: dict[str, float]
    teacher: str
    teacher_fingerprint: str
    preprocessor_fingerprint: str
    normalization_stats: str
    sources: list[SourceInfo]
    tasks: list[str]
    seed: int
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """Checksum of the manifest, and through the shards' checksums of the whole cache."""
        return _sha256_of_json(asdict(self))

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` in one rename."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "manifest_sha256": self.digest}
        write_atomically(folder / MANIFEST_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> AnchorManifest:
        """Read and check ``manifest.json``.

        Raises:
            FileNotFoundError: The folder is no cache, or an unfinished one.
            ValueError: The manifest is damaged or of another format.
        """
        file = folder / MANIFEST_FILE
        if not file.is_file():
            raise FileNotFoundError(_missing(folder))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}); {rebuild_hint(folder)}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is no manifest of an anchor cache; {rebuild_hint(folder)}")
        if (version := content.pop("version", None)) != VERSION:
            raise ValueError(
                f"{file} has format version {version!r}, and this program reads {VERSION}; {rebuild_hint(folder)}"
            )
        expected = content.pop("manifest_sha256", None)
        if _sha256_of_json(content) != expected or content.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{file} was changed after it was written: its checksum differs; {rebuild_hint(folder)}")
        content["shards"] = [ShardInfo(**shard) for shard in content["shards"]]
        content["sources"] = [SourceInfo(**source) for source in content["sources"]]
        content["tensors"] = {name: TensorInfo(**info) for name, info in content["tensors"].items()}
        return cls(**content)


@dataclass(frozen=True)
class AnchorBatch:
    """Anchors as they lie in the cache.

    Attributes:
        images: The policy's camera key → (batch, channels, height, width) uint8.
        state: (batch, state) fp32, not normalised.
        tasks: Task texts.
        action_tokens: (batch, tokens) ids of the language model's vocabulary.
        action_token_mask: (batch, tokens), True for real tokens.
        features: Layer → the teacher's features.
        feature_mask: (batch,) or (batch, positions).
    """

    images: dict[str, Int[Tensor, "batch channels height width"]]
    state: Float[Tensor, "batch state"]
    tasks: list[str]
    action_tokens: Int[Tensor, "batch tokens"]
    action_token_mask: Bool[Tensor, "batch tokens"]
    features: dict[int, Tensor]
    feature_mask: Bool[Tensor, "batch *positions"]


class AnchorCache:
    """A cache that was checked and is memory-mapped; samples are read when a batch asks for them.

    Args:
        folder: The cache.
        manifest: Its manifest.

    Raises:
        ValueError: A shard does not hold what the manifest says.
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

    @classmethod
    def open(cls, folder: str | Path) -> AnchorCache:
        """Check a cache (manifest, sizes, checksums, shapes) and map it.

        Raises:
            FileNotFoundError: There is no cache, or a shard is missing.
            ValueError: Something in it is damaged.
        """
        folder = Path(folder)
        manifest = AnchorManifest.read(folder)
        for shard in manifest.shards:
            _check_shard(folder, shard, manifest)
        if sum(shard.samples for shard in manifest.shards) != manifest.samples:
            raise ValueError(f"{folder} names {manifest.samples} anchors, and its shards hold another number")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.samples

    def gather(self, indices: list[int]) -> AnchorBatch:
        """Read anchors by number, in the order given."""
        rows = {name: torch.stack([self._row(name, index) for index in indices]) for name in self.manifest.tensors}
        return AnchorBatch(
            images=_with_prefix(rows, IMAGE_PREFIX),
            state=rows[STATE],
            tasks=[self.manifest.tasks[index] for index in rows[TASK].tolist()],
            action_tokens=rows[TOKENS].long(),
            action_token_mask=rows[TOKEN_MASK],
            features={int(layer): value for layer, value in _with_prefix(rows, FEATURE_PREFIX).items()},
            feature_mask=rows[FEATURE_MASK],
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
        position: Anchors drawn so far.
    """

    def __init__(self, samples: int, seed: int, position: int = 0) -> None:
        self.samples, self.seed, self.position = samples, seed, position
        self._epoch = -1
        self._permutation: list[int] = []

    def draw(self, count: int) -> list[int]:
        """Numbers of the next ``count`` anchors."""
        drawn = []
        for _ in range(count):
            epoch, offset = divmod(self.position, self.samples)
            if epoch != self._epoch:
                # Its own generator: the order depends on no other use of randomness, and a resumed run finds it again.
                entropy = np.random.SeedSequence([self.seed, epoch]).generate_state(1, dtype=np.uint64)[0]
                generator = torch.Generator().manual_seed(int(entropy))
                self._permutation = torch.randperm(self.samples, generator=generator).tolist()
                self._epoch = epoch
            drawn.append(self._permutation[offset])
            self.position += 1
        return drawn


def sha256_of_file(file: Path) -> str:
    """Checksum of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that it is there wholly or not at all, also after a power cut."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_folder(folder: Path) -> Path:
    """Where a cache is built before it is renamed to its name."""
    return folder.with_name(folder.name + ".partial")


def rebuild_hint(folder: Path) -> str:
    """The command that makes a cache anew."""
    return (
        f"delete it and build it again: craft-anchors build --policy.path=<teacher> --dataset.repo_id=<old skills> "
        f"--num-samples=<n> --output={folder}"
    )


def _missing(folder: Path) -> str:
    if partial_folder(folder).is_dir():
        return (
            f"{folder} is no anchor cache: its build was interrupted; finish it with the same craft-anchors build "
            f"command, which goes on where it was"
        )
    state = "has no manifest.json" if folder.is_dir() else "does not exist"
    return (
        f"anchor cache {folder} {state}; build it with: craft-anchors build --policy.path=<teacher> "
        f"--dataset.repo_id=<old skills> --num-samples=<n> --output={folder}, or train without retention: "
        f"--retention-mode none"
    )


def _check_shard(folder: Path, shard: ShardInfo, manifest: AnchorManifest) -> None:
    file = folder / shard.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing from the anchor cache; {rebuild_hint(folder)}")
    if (found := file.stat().st_size) != shard.bytes:
        raise ValueError(
            f"{file} is truncated or changed: {found} bytes instead of {shard.bytes}; {rebuild_hint(folder)}"
        )
    if sha256_of_file(file) != shard.sha256:
        raise ValueError(f"{file} is damaged: its checksum differs from the manifest's; {rebuild_hint(folder)}")
    try:
        with safe_open(file, framework="pt") as content:
            shapes = {name: list(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error}); {rebuild_hint(folder)}") from error
    expected = {name: [shard.samples, *info.shape] for name, info in manifest.tensors.items()}
    if shapes != expected:
        raise ValueError(f"{file} holds {shapes} instead of {expected}; {rebuild_hint(folder)}")


def _with_prefix(rows: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in rows.items() if name.startswith(prefix)}


def _sha256_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
