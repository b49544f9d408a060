"""Building an anchor cache from a teacher and the datasets of its old skills.

The build writes into ``<output>.partial`` and renames at the end; every shard appears there in one rename too. A killed
build therefore leaves nothing that loads, and the same call goes on with the first missing shard.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_STATE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from craft_opt.bridge.anchor_cache import (
    DTYPES,
    FEATURE_MASK,
    FEATURE_PREFIX,
    IMAGE_PREFIX,
    SOURCE_FRAME,
    STATE,
    TASK,
    TOKEN_MASK,
    TOKENS,
    AnchorBatch,
    AnchorCache,
    AnchorManifest,
    AnchorOrder,
    ShardInfo,
    SourceInfo,
    TensorInfo,
    partial_folder,
    sha256_of_file,
    sync_folder,
    write_atomically,
)
from craft_opt.bridge.features import (
    DEFAULT_LAYERS,
    DEFAULT_POOLING,
    FeatureSpec,
    depth_of,
    generated_tokens,
    hidden_features,
    language_model_of,
)
from craft_opt.bridge.fingerprints import digest, preprocessor_fingerprint, teacher_fingerprint
from craft_opt.bridge.policies import (
    check_cameras,
    check_widths,
    load_policy,
    make_processors,
    precision_context,
    read_policy_config,
    without_renaming,
)

__all__ = [
    "AnchorBatch",
    "AnchorCache",
    "AnchorManifest",
    "AnchorOrder",
    "AnchorSource",
    "build_cache",
    "process_anchors",
]

logger = logging.getLogger(__name__)

TOKEN_SOURCES = ("demonstrated", "teacher")
_PLAN_FILE = "plan"


@dataclass(frozen=True)
class AnchorSource:
    """A dataset to draw anchors from.

    Attributes:
        repo_id: Its name.
        root: Its folder, None for LeRobot's cache or the hub.
        episodes: Episodes to draw from, None for all.
        revision: Revision on the hub.
    """

    repo_id: str
    root: str | Path | None = None
    episodes: tuple[int, ...] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class _Teacher:
    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    spec: FeatureSpec
    token_source: str
    dtype: torch.dtype


def build_cache(
    output: str | Path,
    policy_path: str | Path,
    sources: Sequence[AnchorSource],
    *,
    num_samples: int,
    layers: Sequence[int] = DEFAULT_LAYERS,
    pooling: str = DEFAULT_POOLING,
    dtype: str = "auto",
    seed: int = 0,
    shard_size: int = 64,
    batch_size: int = 16,
    token_source: str = "demonstrated",
    normalization_stats: str = "teacher",
    stats_source: AnchorSource | None = None,
    rename_map: Mapping[str, str] | None = None,
    policy_overrides: Sequence[str] = (),
    progress: bool = True,
) -> AnchorManifest:
    """Build a cache of hidden features, or finish an interrupted build, or return the finished one.

    Args:
        output: Folder of the cache.
        policy_path: The teacher, a folder or a name on the hub.
        sources: Datasets of the old skills; anchors are balanced over all their tasks.
        num_samples: Anchors in all.
        layers: Decoder layers, counted from 1, or from the last as -1.
        pooling: One of :data:`craft_opt.retention.POOLINGS`.
        dtype: Of the stored features: ``float32``, ``bfloat16``, ``float16`` or ``auto``, the dtype of the computation.
        seed: Seed of the selection.
        shard_size: Anchors per file.
        batch_size: Anchors per forward of the teacher.
        token_source: ``demonstrated`` (the dataset's actions) or ``teacher`` (what it generates itself).
        normalization_stats: ``teacher`` or ``dataset``; with the latter, ``stats_source`` is the new skill's dataset.
        stats_source: Dataset whose statistics the fine-tuning run will take.
        rename_map: Keys of the sources → keys of the policy.
        policy_overrides: Flags of the policy without their prefix, such as ``--device=cpu``.
        progress: Whether to show a progress bar.

    Returns:
        The manifest of the cache.

    Raises:
        ValueError: A setting, a dataset or the teacher does not fit.
        FileNotFoundError: A dataset or the teacher is not there.
        FileExistsError: The output is there and holds something else.
    """
    output = Path(output)
    _check_settings(
        sources, num_samples, dtype, shard_size, batch_size, token_source, normalization_stats, stats_source
    )
    config = read_policy_config(policy_path, tuple(policy_overrides))
    datasets = [_open(source, config) for source in sources]
    renames = dict(rename_map or {})
    for dataset in datasets:
        check_cameras(config, dataset.meta, renames)
    policy = load_policy(config, datasets[0].meta, renames)
    policy.eval()
    stats = _metadata(stats_source).stats if stats_source is not None else None
    preprocessor, _ = make_processors(config, stats=stats)
    for dataset in datasets:
        check_widths(preprocessor, dataset.meta, renames)
    spec = FeatureSpec.resolve(layers, pooling, depth_of(policy))
    compute_dtype = language_model_of(policy).layers[0].self_attn.q_proj.weight.dtype
    teacher = _Teacher(
        policy=policy,
        preprocessor=without_renaming(preprocessor),
        spec=spec,
        token_source=token_source,
        dtype=compute_dtype if dtype == "auto" else DTYPES[dtype],
    )
    frames = _select(datasets, num_samples, seed)
    draft: dict[str, Any] = {
        "kind": "hidden",
        "samples": num_samples,
        "layers": list(spec.layers),
        "depth": depth_of(policy),
        "pooling": pooling,
        "feature_dtype": _dtype_name(teacher.dtype),
        "compute_dtype": _dtype_name(compute_dtype),
        "token_source": token_source,
        "teacher_fingerprint": teacher_fingerprint(policy),
        "preprocessor_fingerprint": preprocessor_fingerprint(preprocessor),
        "normalization_stats": normalization_stats,
        "sources": [asdict(_source_info(source, dataset)) for source, dataset in zip(sources, datasets, strict=True)],
        "seed": seed,
    }
    plan = digest([draft, frames, shard_size, sorted(renames.items())])
    if output.exists():
        return _finished(output, draft)
    folder = _start(output, plan)
    tasks = sorted({str(task) for dataset in datasets for task in dataset.meta.tasks.index})
    _write_shards(folder, teacher, datasets, frames, tasks, renames, shard_size, batch_size, progress)
    manifest = _manifest(folder, draft, tasks, str(policy_path))
    manifest.write(folder)
    (folder / _PLAN_FILE).unlink()
    folder.rename(output)
    sync_folder(output.parent)
    logger.info("anchor cache %s: %d anchors of %d tasks", output, num_samples, len(tasks))
    return manifest


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


def _check_settings(
    sources: Sequence[AnchorSource],
    num_samples: int,
    dtype: str,
    shard_size: int,
    batch_size: int,
    token_source: str,
    normalization_stats: str,
    stats_source: AnchorSource | None,
) -> None:
    if not sources:
        raise ValueError("anchors need at least one dataset of old skills: --dataset.repo_id=<name>")
    for name, number in (("num-samples", num_samples), ("shard-size", shard_size), ("batch-size", batch_size)):
        if number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    for name, value, allowed in (
        ("dtype", dtype, ("auto", *DTYPES)),
        ("action-tokens", token_source, TOKEN_SOURCES),
        ("normalization_stats", normalization_stats, ("teacher", "dataset")),
    ):
        if value not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")
    if (normalization_stats == "dataset") != (stats_source is not None):
        raise ValueError(
            "--normalization_stats=dataset goes together with --stats.repo_id=<the new skill's dataset>: the cache "
            "must be processed as the fine-tuning run will process it"
        )


def _metadata(source: AnchorSource) -> LeRobotDatasetMetadata:
    _check_local(source)
    return LeRobotDatasetMetadata(source.repo_id, root=source.root, revision=source.revision)


def _open(source: AnchorSource, config: PreTrainedConfig) -> LeRobotDataset:
    metadata = _metadata(source)
    unknown = [episode for episode in source.episodes or () if not 0 <= episode < metadata.total_episodes]
    if unknown:
        raise ValueError(f"dataset {source.repo_id} has episodes 0..{metadata.total_episodes - 1}, got {unknown}")
    return LeRobotDataset(
        source.repo_id,
        root=source.root,
        episodes=None if source.episodes is None else sorted(source.episodes),
        revision=source.revision,
        delta_timestamps=resolve_delta_timestamps(config, metadata),
        return_uint8=True,
    )


def _check_local(source: AnchorSource) -> None:
    # LeRobot makes the folder and then asks the hub for a dataset of that name.
    if source.root is not None and not (Path(source.root) / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"{source.root} is no LeRobotDataset: meta/info.json is not there")


def _source_info(source: AnchorSource, dataset: LeRobotDataset) -> SourceInfo:
    episodes = None if source.episodes is None else sorted(source.episodes)
    return SourceInfo(source.repo_id, str(dataset.revision), episodes, dataset.num_frames)


def _select(datasets: Sequence[LeRobotDataset], count: int, seed: int) -> list[tuple[int, int]]:
    """(dataset, frame) of every anchor: as equal over all tasks as their frames allow, in random order."""
    generator = np.random.default_rng(seed)
    groups: list[list[tuple[int, int]]] = []
    for number, dataset in enumerate(datasets):
        task_of_frame = dataset.hf_dataset.data.column("task_index").to_numpy()
        for task in np.unique(task_of_frame):
            frames = np.flatnonzero(task_of_frame == task)
            groups.append([(number, int(frame)) for frame in generator.permutation(frames)])
    available = sum(len(group) for group in groups)
    if available < count:
        raise ValueError(
            f"--num-samples={count} anchors were asked for, and the chosen episodes have {available} frames; "
            f"lower --num-samples or add episodes"
        )
    chosen: list[tuple[int, int]] = []
    # Smallest group first: what it cannot give is shared out among the rest.
    for position, group in enumerate(sorted(groups, key=len)):
        share = -(-(count - len(chosen)) // (len(groups) - position))
        chosen += group[: min(share, len(group), count - len(chosen))]
    return [chosen[k] for k in generator.permutation(len(chosen))]


def _finished(output: Path, draft: Mapping[str, Any]) -> AnchorManifest:
    manifest = AnchorCache.open(output).manifest
    found = asdict(manifest)
    different = sorted(name for name, value in draft.items() if found[name] != value)
    if different:
        changes = "; ".join(f"{name}: {found[name]!r} there, {draft[name]!r} asked for" for name in different)
        raise FileExistsError(f"{output} holds another anchor cache ({changes}); delete it or choose another --output")
    logger.info("anchor cache %s is already built", output)
    return manifest


def _start(output: Path, plan: str) -> Path:
    """The folder of the build, emptied if what lies there was begun with another plan."""
    folder = partial_folder(output)
    marker = folder / _PLAN_FILE
    if folder.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != plan):
        logger.info("%s was begun with other settings; starting over", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.is_file():
        write_atomically(marker, plan)
    return folder


def _write_shards(
    folder: Path,
    teacher: _Teacher,
    datasets: Sequence[LeRobotDataset],
    frames: Sequence[tuple[int, int]],
    tasks: Sequence[str],
    renames: Mapping[str, str],
    shard_size: int,
    batch_size: int,
    progress: bool,
) -> None:
    cameras = [key for key in teacher.policy.config.image_features if _has_camera(datasets[0], key, renames)]
    with tqdm(total=len(frames), desc="Anchors", unit="anchor", disable=None if progress else True) as bar:
        for number, start in enumerate(range(0, len(frames), shard_size)):
            file = folder / f"shard-{number:05d}.safetensors"
            members = frames[start : start + shard_size]
            if not file.is_file():
                parts = [
                    _rows(teacher, datasets, members[k : k + batch_size], cameras, tasks, renames)
                    for k in range(0, len(members), batch_size)
                ]
                _write_shard(file, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            bar.update(len(members))


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


def _has_camera(dataset: LeRobotDataset, key: str, renames: Mapping[str, str]) -> bool:
    return key in {renames.get(camera, camera) for camera in dataset.meta.camera_keys}


@torch.no_grad()
def _rows(
    teacher: _Teacher,
    datasets: Sequence[LeRobotDataset],
    members: Sequence[tuple[int, int]],
    cameras: Sequence[str],
    tasks: Sequence[str],
    renames: Mapping[str, str],
) -> dict[str, Tensor]:
    """Everything the cache keeps of some samples; the features come from what is kept, not from what was read."""
    items = [{renames.get(k, k): v for k, v in datasets[number][frame].items()} for number, frame in members]
    images = {key: _stack([_as_uint8(item[key]) for item in items], key) for key in cameras}
    state = _stack([item[OBS_STATE].float() for item in items], OBS_STATE)
    texts = [str(item["task"]) for item in items]
    action = _stack([item[ACTION].float() for item in items], ACTION)
    batch = process_anchors(teacher.preprocessor, images, state, texts, action)
    with precision_context(teacher.policy.config):
        if teacher.token_source == "teacher":
            batch[ACTION_TOKENS], batch[ACTION_TOKEN_MASK] = generated_tokens(teacher.policy, batch)
        features = hidden_features(teacher.policy, batch, teacher.spec)
    return {
        **{f"{IMAGE_PREFIX}{key}": image.contiguous() for key, image in images.items()},
        STATE: state,
        TASK: torch.tensor([tasks.index(text) for text in texts], dtype=torch.int32),
        SOURCE_FRAME: torch.tensor([int(item["index"]) for item in items], dtype=torch.int64),
        TOKENS: batch[ACTION_TOKENS].to(torch.int32).cpu().contiguous(),
        TOKEN_MASK: batch[ACTION_TOKEN_MASK].cpu().contiguous(),
        FEATURE_MASK: features.mask.cpu().contiguous(),
        **{
            f"{FEATURE_PREFIX}{layer}": value.to(teacher.dtype).cpu().contiguous()
            for layer, value in features.by_layer.items()
        },
    }


def _as_uint8(image: Tensor) -> Tensor:
    """Image datasets give fp32 in [0, 1] made from uint8, video datasets uint8: back to uint8 without loss."""
    return image if image.dtype == torch.uint8 else (image * 255.0).round().to(torch.uint8)


def _stack(tensors: list[Tensor], key: str) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"the datasets differ in the shape of {key}: {sorted(shapes)}; build a cache for each")
    return torch.stack(tensors)


def _manifest(folder: Path, draft: Mapping[str, Any], tasks: list[str], policy_path: str) -> AnchorManifest:
    files = sorted(folder.glob("shard-*.safetensors"))
    shards, infos = [], {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            samples = tensors[STATE].get_shape()[0]
            infos = {
                name: TensorInfo(_dtype_name(tensor[:1].dtype), list(tensor.get_shape()[1:]))
                for name, tensor in sorted(tensors.items())
            }
        shards.append(ShardInfo(file.name, samples, file.stat().st_size, sha256_of_file(file)))
    return AnchorManifest(
        **{**draft, "sources": [SourceInfo(**source) for source in draft["sources"]]},
        shards=shards,
        tensors=infos,
        teacher_variance={str(layer): _variance(files, layer) for layer in draft["layers"]},
        teacher=policy_path,
        tasks=tasks,
        versions={name: version(name) for name in ("craft-opt", "lerobot", "torch", "transformers")},
    )


def _variance(files: Sequence[Path], layer: int) -> float:
    """Mean over features of the variance over all positions that count; two passes in fp64."""
    mean, count = torch.zeros((), dtype=torch.float64), 0
    squares = torch.zeros((), dtype=torch.float64)
    for second_pass in (False, True):
        for file in files:
            with safe_open(file, framework="pt") as content:
                values = content.get_tensor(f"{FEATURE_PREFIX}{layer}")[content.get_tensor(FEATURE_MASK)].double()
            if second_pass:
                squares = squares + (values - mean / count).square().sum(dim=0)
            else:
                mean, count = mean + values.sum(dim=0), count + len(values)
    variance = (squares / max(count, 1)).mean().item()
    if not (np.isfinite(variance) and variance > 0):
        raise ValueError(
            f"the teacher's features at layer {layer} have variance {variance}; features that are not finite, or never "
            f"vary, anchor nothing: check the teacher's weights, take more anchors or another layer"
        )
    return variance


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
