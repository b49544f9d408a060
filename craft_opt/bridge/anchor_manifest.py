"""The manifest of an anchor cache: what it holds, what made it, and the checks that need no shard.

``manifest.json`` carries a checksum of itself and one of every shard, and nothing in it is believed before it is
checked: file names stay inside the folder, numbers are numbers, and every tensor that the kind needs is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from craft_opt.bridge.untrusted import check_inside, is_plain_name, read_json, shown, typed

FORMAT = "craft-anchor-cache"
VERSION = 2
MANIFEST_FILE = "manifest.json"
KINDS = ("hidden", "token_ce")
STORAGES = ("self_contained", "reference")
SELECTIONS = ("random", "coverage")

IMAGE_PREFIX = "image/"
FEATURE_PREFIX = "features/"
# Of every cache.
TOKENS, TOKEN_MASK, SOURCE, SOURCE_FRAME = "action_tokens", "action_token_mask", "source", "source_frame"
# Of self-contained ones, beside the images.
STATE, TASK = "state", "task_index"
# Of ones by reference: what tells that the dataset still holds the same frames at the same places.
EPISODE, FRAME_IN_EPISODE, IDENTITY = "episode_index", "frame_index", "identity"
# Of hidden ones, beside the features; of token_ce ones, the last two with top_k > 0.
FEATURE_MASK = "feature_mask"
TEACHER_CE, TOP_IDS, TOP_LOGPROBS = "teacher_ce", "top_ids", "top_logprobs"

# safetensors' names of the dtypes that a cache holds → torch's.
STORED_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "BOOL": "bool",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every file is mapped, and Linux maps 65,530 of them for one process.
MAX_SHARDS = 60_000
_MAX_DIMENSIONS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What the hub takes for a name; LeRobot makes a folder of it below its own.
_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What a shell takes as it is: the command in an error is there to be copied.
_PLAIN_ARGUMENT = re.compile(r"[\w./@:+-]{1,200}", re.ASCII)


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
        root: Its folder, None where the cache needs it no more, or where LeRobot finds it by its name.
        revision: Its revision, as LeRobot resolved it.
        episodes: The episodes that were drawn from, None for all.
        frames: Frames in them.
        prompt: The task text that they were given in the place of their own, if any.
    """

    repo_id: str
    root: str | None
    revision: str
    episodes: list[int] | None
    frames: int
    prompt: str | None = None


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
        storage: ``self_contained`` (images, state and prompts in the shards) or ``reference`` (read from the datasets).
        samples: Number of anchors.
        shards: Files in order.
        tensors: Name → dtype and shape of one sample.
        layers: Decoder layers, counted from 1; none for ``token_ce``.
        depth: Decoder layers of the teacher.
        pooling: How positions were pooled; empty for ``token_ce``.
        top_k: The teacher's most probable tokens kept at each position; 0 for none, and for ``hidden``.
        feature_dtype: Dtype of the stored features or log-probabilities.
        compute_dtype: Dtype that the teacher computed in.
        token_source: ``demonstrated`` or ``teacher``: whose action tokens were forced.
        teacher_variance: Layer (as text) → variance of its features over the cache, averaged over features.
        teacher: Where the teacher was loaded from, as given.
        teacher_fingerprint: Fingerprint of its weights.
        preprocessor_fingerprint: Fingerprint of the preprocessor, statistics included.
        normalization_stats: ``teacher`` or ``dataset``.
        sources: Datasets of the anchors.
        rename_map: Keys of the datasets → keys of the policy.
        cameras: Images of a sample, under the policy's keys.
        tasks: Task texts; ``task_index`` points into them.
        seed: Seed of the selection.
        versions: Versions of the packages that made the cache.
        selection: How a task's frames were chosen: ``random`` or ``coverage``.
    """

    kind: str
    storage: str
    samples: int
    shards: list[ShardInfo]
    tensors: dict[str, TensorInfo]
    layers: list[int]
    depth: int
    pooling: str
    top_k: int
    feature_dtype: str
    compute_dtype: str
    token_source: str
    teacher_variance: dict[str, float]
    teacher: str
    teacher_fingerprint: str
    preprocessor_fingerprint: str
    normalization_stats: str
    sources: list[SourceInfo]
    rename_map: dict[str, str]
    cameras: list[str]
    tasks: list[str]
    seed: int
    versions: dict[str, str]
    selection: str = "random"

    @property
    def digest(self) -> str:
        """Checksum of the manifest, and through the shards' checksums of the whole cache."""
        return _sha256_of_json(self._as_json())

    def _as_json(self) -> dict[str, Any]:
        """All of it but what is as it was before there was a choice: sources without a prompt, a random selection."""
        content = asdict(self)
        for source in content["sources"]:
            if source["prompt"] is None:
                del source["prompt"]
        if self.selection == "random":
            del content["selection"]
        return content

    @property
    def content(self) -> str:
        """What is cached of a sample, in words."""
        if self.kind == "hidden":
            return f"{self.pooling} of layers {', '.join(map(str, self.layers))} of {self.depth}"
        top = f", and its {self.top_k} most probable tokens in each place" if self.top_k else ""
        return f"{self.token_source} action tokens, the teacher's cross-entropy of them{top}"

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` in one rename."""
        content = {"format": FORMAT, "version": VERSION, **self._as_json(), "manifest_sha256": self.digest}
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
        check_inside(folder, file, rebuild_hint(folder))
        content = read_json(file, rebuild_hint(folder))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is no manifest of an anchor cache; {rebuild_hint(folder)}")
        version = content.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"{file} has format version {shown(version)}, and this program reads version {VERSION}; "
                f"{rebuild_hint(folder, content)}"
            )
        if content.pop("manifest_sha256", None) != _sha256_of_json(content):
            raise ValueError(f"{file} was changed after it was written: its checksum differs; {rebuild_hint(folder)}")
        try:
            manifest: AnchorManifest = typed(content, cls, "it")
            manifest._check()
        except ValueError as error:
            raise ValueError(f"{file} does not describe an anchor cache: {error}; {rebuild_hint(folder)}") from error
        return manifest

    def _check(self) -> None:
        """Refuse what a matching checksum does not exclude: it is public how it is made."""
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("storage", self.storage, STORAGES),
            ("selection", self.selection, SELECTIONS),
            ("feature_dtype", self.feature_dtype, DTYPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {shown(value)} instead of one of {', '.join(allowed)}")
        self._check_shards()
        sizes = [size for info in self.tensors.values() for size in info.shape]
        if not all(number > 0 for number in [self.samples, self.depth, *sizes, *self.layers]):
            raise ValueError("a number of samples, layers or positions is no whole number above 0")
        if missing := sorted(self.needed_tensors() - self.tensors.keys()):
            raise ValueError(f"a {self.kind} cache needs {', '.join(missing)}, which it does not name")
        if unknown := {info.dtype for info in self.tensors.values()} - set(STORED_DTYPES.values()):
            raise ValueError(f"{shown(min(unknown))} is no dtype of a cache")
        if any(len(info.shape) > _MAX_DIMENSIONS for info in self.tensors.values()):
            raise ValueError(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
        self._check_layers()
        for source in self.sources:
            if source.root is None and not (_REPO_ID.fullmatch(source.repo_id) and ".." not in source.repo_id):
                raise ValueError(f"it names the dataset {shown(source.repo_id)}, which is no name on the hub")
            if source.frames < 0 or any(episode < 0 for episode in source.episodes or ()):
                raise ValueError("it names a negative number of frames, or a negative episode")
        if self.storage == "self_contained" and not self.tasks:
            raise ValueError("it names no task")

    def _check_shards(self) -> None:
        if len(self.shards) > MAX_SHARDS:
            raise ValueError(f"it names {len(self.shards)} files, and {MAX_SHARDS} can be mapped")
        for shard in self.shards:
            if not is_plain_name(shard.file):
                raise ValueError(f"it names the shard {shown(shard.file)}, which is no file name inside the folder")
            if min(shard.samples, shard.bytes) <= 0:
                raise ValueError(f"a number of samples or bytes of {shard.file} is no whole number above 0")
            if not _SHA256.fullmatch(shard.sha256):
                raise ValueError(f"the checksum of {shard.file} is {shown(shard.sha256)}, which is none")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("it names a shard twice")
        if (held := sum(shard.samples for shard in self.shards)) != self.samples:
            raise ValueError(f"it names {self.samples} anchors, and its shards hold {held}")

    def _check_layers(self) -> None:
        if sorted(set(self.layers)) != sorted(self.layers) or any(layer > self.depth for layer in self.layers):
            raise ValueError(f"layers {shown(self.layers)} are not layers of {self.depth}, each once")
        if (self.kind == "hidden") != bool(self.layers):
            raise ValueError("a hidden cache has layers, and a token_ce one has none")
        if self.teacher_variance.keys() != {str(layer) for layer in self.layers}:
            raise ValueError("its variances are not those of its layers")
        if not all(variance > 0 for variance in self.teacher_variance.values()):
            raise ValueError("a variance is not above 0")
        if self.top_k < 0 or (self.top_k and self.kind == "hidden"):
            raise ValueError(f"top_k is {self.top_k}; it is 0 or more, and 0 for hidden")

    def needed_tensors(self) -> set[str]:
        """Names of the tensors that a cache of this kind cannot be without."""
        needed = {TOKENS, TOKEN_MASK, SOURCE, SOURCE_FRAME}
        if self.storage == "self_contained":
            needed |= {STATE, TASK, *(f"{IMAGE_PREFIX}{camera}" for camera in self.cameras)}
        else:
            needed |= {EPISODE, FRAME_IN_EPISODE, IDENTITY}
        if self.kind == "hidden":
            return needed | {FEATURE_MASK, *(f"{FEATURE_PREFIX}{layer}" for layer in self.layers)}
        return needed | {TEACHER_CE} | ({TOP_IDS, TOP_LOGPROBS} if self.top_k else set())


def files_of(manifest: AnchorManifest) -> str:
    """How many files hold the anchors, for messages."""
    count = len(manifest.shards)
    return f"{count} file" if count == 1 else f"{count} files"


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


def rebuild_hint(folder: Path, content: Mapping[str, Any] | None = None) -> str:
    """The command that makes a cache anew, with what a readable manifest tells about it."""
    return f"delete it and build it again: {build_command(folder, content)}"


def build_command(folder: Path, content: Mapping[str, Any] | None = None) -> str:
    """The command that builds a cache, with placeholders for what is not known."""
    content = content or {}
    sources = content.get("sources")
    names = [source.get("repo_id") for source in sources if isinstance(source, dict)] if type(sources) is list else []
    datasets = " ".join(f"--dataset.repo_id={_argument(name, '<old skills>')}" for name in names[:8] or [None])
    return (
        f"craft-anchors build --policy.path={_argument(content.get('teacher'), '<teacher>')} {datasets} "
        f"--num-samples={_argument(content.get('samples'), '<n>')} --output={folder}"
    )


def _argument(value: Any, otherwise: str) -> str:
    """What a stranger's manifest names, where a shell would read nothing else into it."""
    text = str(value) if type(value) in (int, str) else ""
    return text if _PLAIN_ARGUMENT.fullmatch(text) else otherwise


def _missing(folder: Path) -> str:
    if partial_folder(folder).is_dir():
        return (
            f"{folder} is no anchor cache: its build was interrupted; finish it with the same craft-anchors build "
            f"command, which goes on where it was"
        )
    state = "has no manifest.json" if folder.is_dir() else "does not exist"
    return (
        f"anchor cache {folder} {state}; build it with: {build_command(folder)}, or train without retention: "
        f"--retention-mode none"
    )


def _sha256_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
