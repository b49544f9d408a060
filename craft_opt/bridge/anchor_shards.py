"""The shards of a cache: frames read and processed, the teacher's forward, tensors written and summed up.

Reading the next batch and writing the last shard go on in threads of their own while the teacher computes. Python runs
one thread at a time, which a large teacher on a GPU does not notice; for a small one, or videos, there are processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_STATE
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from craft_opt.bridge.anchor_frames import FrameReader
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
    TASK,
    TEACHER_CE,
    TOKEN_MASK,
    TOKENS,
    TOP_IDS,
    TOP_LOGPROBS,
    ShardInfo,
    TensorInfo,
    sha256_of_file,
    sync_folder,
    write_atomically,
)
from craft_opt.bridge.features import FeatureSpec, action_logits, generated_tokens, hidden_features
from craft_opt.bridge.policies import precision_context

# Beside the shards of an unfinished build, which has no manifest yet.
CHECKSUM_SUFFIX = ".sha256"


def process_anchors(
    preprocessor: PolicyProcessorPipeline,
    images: Mapping[str, Tensor],
    state: Tensor,
    tasks: Sequence[str],
    action: Tensor | None = None,
) -> dict[str, Any]:
    """Run stored samples through a preprocessor as the training loop runs its batches.

    Args:
        preprocessor: A preprocessor without its renaming step.
        images: Camera key → (batch, channels, height, width) uint8.
        state: (batch, state), not normalised.
        tasks: Task texts.
        action: (batch, chunk, action), not normalised, where action tokens are to be made.

    Returns:
        The batch that the policy reads.
    """
    batch: dict[str, Any] = {key: image.to(torch.float32) / 255.0 for key, image in images.items()}
    batch |= {OBS_STATE: state, "task": list(tasks)}
    if action is not None:
        batch[ACTION] = action
    return preprocessor(batch)


@dataclass(frozen=True)
class Teacher:
    """A frozen policy, and what a cache keeps of its forwards.

    Attributes:
        policy: The policy, in evaluation mode.
        preprocessor: Its preprocessor without the renaming of keys.
        kind: Of the cache.
        storage: Of the cache.
        spec: For ``hidden``: layers and pooling.
        top_k: For ``token_ce``: most probable tokens kept at each position.
        token_source: ``demonstrated`` or ``teacher``.
        dtype: Of the stored features.
        cameras: The images of a sample.
        tasks: Task texts; ``task_index`` points into them.
    """

    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    kind: str
    storage: str
    spec: FeatureSpec | None
    top_k: int
    token_source: str
    dtype: torch.dtype
    cameras: tuple[str, ...]
    tasks: tuple[str, ...]

    def collect(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack some frames: images, state, ``task``, and the actions where the tokens are made from them."""
        keys = [*self.cameras, OBS_STATE, *([ACTION] if self.token_source == "demonstrated" else [])]
        return {key: _stack([item[key] for item in items], key) for key in keys} | {
            "task": [item["task"] for item in items]
        }

    def process(self, frames: Mapping[str, Any]) -> dict[str, Any]:
        """The batch that the policy reads, of stacked frames."""
        images = {key: frames[key] for key in self.cameras}
        return process_anchors(self.preprocessor, images, frames[OBS_STATE], frames["task"], frames.get(ACTION))

    def kept(self, frames: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the cache keeps of stacked frames, besides the forward's."""
        if self.storage == "reference":
            return {}
        task = torch.tensor([self.tasks.index(text) for text in frames["task"]], dtype=torch.int32)
        return {**{f"{IMAGE_PREFIX}{key}": frames[key] for key in self.cameras}, STATE: frames[OBS_STATE], TASK: task}

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the cache keeps of the teacher's forward on a processed batch."""
        with precision_context(self.policy.config):
            if self.token_source == "teacher":
                batch[ACTION_TOKENS], batch[ACTION_TOKEN_MASK] = generated_tokens(self.policy, batch)
            found = {TOKENS: batch[ACTION_TOKENS].to(torch.int32), TOKEN_MASK: batch[ACTION_TOKEN_MASK]}
            if self.spec is None:
                found |= token_rows(*action_logits(self.policy, batch), batch[ACTION_TOKENS], self.top_k)
            else:
                features = hidden_features(self.policy, batch, self.spec)
                found[FEATURE_MASK] = features.mask
                found |= {f"{FEATURE_PREFIX}{k}": value.to(self.dtype) for k, value in features.by_layer.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def token_rows(logits: Tensor, mask: Tensor, tokens: Tensor, top_k: int) -> dict[str, Tensor]:
    """The teacher's cross-entropy of each sample's tokens, and its most probable ones at each position.

    Args:
        logits: (batch, tokens, vocabulary).
        mask: (batch, tokens), True where a token is predicted.
        tokens: (batch, tokens) ids.
        top_k: Tokens to keep.

    Returns:
        ``teacher_ce`` (batch,) fp32, and with ``top_k`` > 0 ``top_ids`` int32 and ``top_logprobs`` fp32, both
        (batch, tokens, k) and 0 where nothing is predicted.
    """
    # Only the positions that count: half of a full-size batch of logits is padding.
    logprobs = functional.log_softmax(logits[mask].float(), dim=-1)
    own = torch.zeros(mask.shape, device=mask.device)
    own[mask] = -logprobs.gather(-1, tokens[mask].long().unsqueeze(-1)).squeeze(-1)
    found = {TEACHER_CE: own.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)}
    if top_k:
        values, ids = logprobs.topk(top_k, dim=-1)
        found[TOP_IDS] = torch.zeros((*mask.shape, top_k), dtype=torch.int32, device=mask.device)
        found[TOP_LOGPROBS] = torch.zeros((*mask.shape, top_k), device=mask.device)
        found[TOP_IDS][mask], found[TOP_LOGPROBS][mask] = ids.to(torch.int32), values
    return found


class _Chunks(Dataset[tuple[dict[str, Any], dict[str, Any]]]):
    """Frames read and stacked, chunk by chunk, and processed unless that is left to the caller."""

    def __init__(
        self,
        teacher: Teacher,
        readers: Sequence[FrameReader],
        chunks: Sequence[Sequence[tuple[int, int]]],
        *,
        process: bool,
    ) -> None:
        self._teacher, self._readers, self._chunks, self._process = teacher, readers, chunks, process

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, position: int) -> tuple[dict[str, Any], dict[str, Any]]:
        frames = self._teacher.collect([self._readers[number](row) for number, row in self._chunks[position]])
        return frames, self._teacher.process(frames) if self._process else {}


def _in_a_thread(work: _Chunks) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    with ThreadPoolExecutor(1, "read-anchors") as reader:
        ahead: list[Future[Any]] = []
        try:
            for position in range(len(work)):
                while len(ahead) < 2 and position + len(ahead) < len(work):
                    ahead.append(reader.submit(work.__getitem__, position + len(ahead)))
                yield ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()


def _in_processes(work: _Chunks, num_workers: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    # A tokenizer that was used warns of every fork unless this is set.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(work, batch_size=None, num_workers=min(num_workers, len(work)), collate_fn=_as_arrays)
    for parts in loader:
        frames, batch = (
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in p.items()} for p in parts
        )
        yield frames, batch


def _as_arrays(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tensors as arrays: those go through the pipe as bytes, where every tensor would open a file and a socket."""
    return [
        {k: v.numpy() if isinstance(v, Tensor) and v.dtype != torch.bfloat16 else v for k, v in p.items()}
        for p in parts
    ]


@dataclass(frozen=True)
class _Moments:
    """Count, mean and summed squared deviation of some features, fp64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        values = values.double()
        mean = values.sum(dim=0) / max(len(values), 1)
        return cls(len(values), mean, (values - mean).square().sum(dim=0))

    def with_more(self, other: _Moments) -> _Moments:
        """Merge two sets (Chan, Golub and LeVeque 1979), with no difference of large sums."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return _Moments(count, mean, squares)


@dataclass(frozen=True)
class HeldShards:
    """What the shards of a finished build hold.

    Attributes:
        shards: Files in order.
        tensors: Name → dtype and shape of one sample.
    """

    shards: list[ShardInfo]
    tensors: dict[str, TensorInfo]
    _moments: dict[str, _Moments]

    def variance(self, layers: Sequence[int]) -> dict[str, float]:
        """Layer (as text) → mean over features of the variance over all positions that count.

        Raises:
            ValueError: A layer's features are not finite, or never vary.
        """
        found: dict[str, float] = {}
        for layer in layers:
            moments = self._moments[f"{FEATURE_PREFIX}{layer}"]
            variance = (moments.squares / max(moments.count, 1)).mean().item()
            if not (np.isfinite(variance) and variance > 0):
                raise ValueError(
                    f"the teacher's features at layer {layer} have variance {variance}; features that are not finite, "
                    f"or never vary, anchor nothing: check the teacher's weights, take more anchors or another layer"
                )
            found[str(layer)] = variance
        return found


class ShardWriter:
    """Writes the shards of a build, going on after the ones that are there.

    Args:
        folder: Where they go.
        teacher: The teacher.
        readers: Read the frames of each dataset.
        batch_size: Frames per forward.
        num_workers: Processes that read; 0 is a thread.
    """

    def __init__(
        self, folder: Path, teacher: Teacher, readers: Sequence[FrameReader], batch_size: int, num_workers: int = 0
    ) -> None:
        self._folder, self._teacher, self._readers = folder, teacher, readers
        self._batch_size, self._num_workers = batch_size, num_workers

    def write(self, frames: Sequence[tuple[int, int]], shard_size: int, *, progress: bool = True) -> HeldShards:
        """Write what is missing and sum up everything.

        Args:
            frames: (dataset, row) of every anchor.
            shard_size: Anchors per file.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: What the teacher says of its tokens is not finite.
        """
        starts = range(0, len(frames), shard_size)
        shards = [
            (self._folder / f"shard-{number:05d}.safetensors", frames[start : start + shard_size])
            for number, start in enumerate(starts)
        ]
        missing = [(file, members) for file, members in shards if not _is_whole(file)]
        chunks = [
            (file, members[k : k + self._batch_size], k + self._batch_size >= len(members))
            for file, members in missing
            for k in range(0, len(members), self._batch_size)
        ]
        written: dict[Path, Future[_Held]] = {}
        with (
            ThreadPoolExecutor(1, "write-anchors") as writer,
            tqdm(total=len(frames), desc="Anchors", unit="anchor", disable=None if progress else True) as bar,
        ):
            bar.update(len(frames) - sum(len(members) for _, members in missing))
            parts: list[dict[str, Tensor]] = []
            prepared = self._prepared([members for _, members, _ in chunks])
            for (file, members, completes), (batch, kept) in zip(chunks, prepared, strict=True):
                parts.append({**kept, **self._places(members), **self._teacher.forward(batch)})
                bar.update(len(members))
                if completes:
                    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                    parts = []
                    # One shard may be under way while the next is computed; more would fill the memory.
                    for future in written.values():
                        future.result()
                    written[file] = writer.submit(_write_shard, file, tensors)
            held = [written[file].result() if file in written else _held(file, load_file(file)) for file, _ in shards]
        moments = held[0].moments
        for _, part in pairwise(held):
            moments = {name: moments[name].with_more(part.moments[name]) for name in moments}
        return HeldShards([part.info for part in held], held[0].tensors, moments)

    def _prepared(
        self, chunks: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Processed batches and what is kept of them, made while the ones before are computed on."""
        # Only on the CPU: a forked process cannot use the accelerator that its parent uses.
        in_worker = self._num_workers > 0 and str(self._teacher.policy.config.device) == "cpu"
        work = _Chunks(self._teacher, self._readers, chunks, process=in_worker or not self._num_workers)
        for frames, batch in _in_processes(work, self._num_workers) if self._num_workers else _in_a_thread(work):
            yield batch or self._teacher.process(frames), self._teacher.kept(frames)

    def _places(self, members: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Where the frames come from; by reference also what tells them from all others."""
        places = torch.tensor([self._readers[number].place(row) for number, row in members], dtype=torch.int64)
        found = {
            SOURCE: torch.tensor([number for number, _ in members], dtype=torch.int32),
            SOURCE_FRAME: places[:, 0].contiguous(),
        }
        if self._teacher.storage == "reference":
            found[EPISODE], found[FRAME_IN_EPISODE] = places[:, 1].contiguous(), places[:, 2].contiguous()
            identities = [self._readers[number].identity(row) for number, row in members]
            found[IDENTITY] = torch.tensor([list(identity) for identity in identities], dtype=torch.uint8)
        return found


@dataclass(frozen=True)
class _Held:
    info: ShardInfo
    tensors: dict[str, TensorInfo]
    moments: dict[str, _Moments]


def _is_whole(file: Path) -> bool:
    """Whether a shard of an interrupted build is there, and is what was written."""
    checksum = file.with_suffix(CHECKSUM_SUFFIX)
    return file.is_file() and checksum.is_file() and checksum.read_text(errors="replace") == sha256_of_file(file)


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> _Held:
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    write_atomically(file.with_suffix(CHECKSUM_SUFFIX), sha256_of_file(temporary))
    temporary.replace(file)
    sync_folder(file.parent)
    return _held(file, tensors)


def _held(file: Path, tensors: Mapping[str, Tensor]) -> _Held:
    if TEACHER_CE in tensors and not torch.isfinite(tensors[TEACHER_CE]).all():
        raise ValueError(
            f"the teacher's cross-entropy of action tokens in {file.name} is not finite; check the teacher's weights"
        )
    infos = {name: TensorInfo(dtype_name(t.dtype), list(t.shape[1:])) for name, t in sorted(tensors.items())}
    moments = {
        name: _Moments.of(tensor[tensors[FEATURE_MASK]])
        for name, tensor in tensors.items()
        if name.startswith(FEATURE_PREFIX)
    }
    info = ShardInfo(file.name, len(tensors[TOKENS]), file.stat().st_size, sha256_of_file(file))
    return _Held(info, infos, moments)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that torch prints for a dtype."""
    return str(dtype).removeprefix("torch.")


def _stack(tensors: list[Tensor], key: str) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"the datasets differ in the shape of {key}: {sorted(shapes)}; build a cache for each")
    return torch.stack(tensors)
