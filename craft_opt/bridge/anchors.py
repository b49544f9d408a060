"""Building an anchor cache from a teacher and the datasets of its old skills.

The build writes into ``<output>.partial`` and renames at the end; every shard appears there in one rename too. A killed
build therefore leaves nothing that loads, and the same call goes on with the first missing shard.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.factory import resolve_delta_timestamps

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_frames import AnchorSource, FrameReader
from craft_opt.bridge.anchor_manifest import (
    DTYPES,
    KINDS,
    MANIFEST_FILE,
    SELECTIONS,
    STORAGES,
    AnchorManifest,
    SourceInfo,
    partial_folder,
    sync_folder,
    write_atomically,
)
from craft_opt.bridge.anchor_selection import select_frames
from craft_opt.bridge.anchor_shards import ShardWriter, Teacher, dtype_name
from craft_opt.bridge.features import (
    DEFAULT_LAYERS,
    DEFAULT_POOLING,
    FeatureSpec,
    depth_of,
    language_model_of,
    pi0_fast_of,
)
from craft_opt.bridge.fingerprints import digest, preprocessor_fingerprint, teacher_fingerprint
from craft_opt.bridge.policies import (
    check_cameras,
    check_widths,
    load_policy,
    make_processors,
    read_policy_config,
    without_renaming,
)
from craft_opt.bridge.run_guard import LOCK_FILE, locked, written_to

__all__ = ["AnchorBuild", "AnchorSource", "build_cache", "prepare_build"]

logger = logging.getLogger(__name__)

TOKEN_SOURCES = ("demonstrated", "teacher")
# The kinds' own defaults: features at the demonstrated tokens, or what the teacher itself would say.
DEFAULT_TOKEN_SOURCE = {"hidden": "demonstrated", "token_ce": "teacher"}
# A teacher that knows its skills puts nearly all of its mass on a few tokens; 8 of them are 64 bytes a position.
DEFAULT_TOP_K = 8
_PLAN_FILE = "plan"


@dataclass(frozen=True)
class AnchorBuild:
    """A build that is checked and ready: the teacher loaded, the frames chosen.

    Attributes:
        output: Folder of the cache.
        teacher: Makes a cache's tensors from frames.
        readers: Read the frames of each dataset.
        frames: (dataset, row) of every anchor.
        draft: The manifest but for what the shards tell.
        shard_size: Anchors per file.
        batch_size: Anchors per forward of the teacher.
        num_workers: Processes that read and process frames; 0 is a thread.
    """

    output: Path
    teacher: Teacher
    readers: list[FrameReader]
    frames: list[tuple[int, int]]
    draft: dict[str, Any]
    shard_size: int
    batch_size: int
    num_workers: int = 0

    def run(self, *, progress: bool = True) -> AnchorManifest:
        """Build the cache, or finish an interrupted build, or return the finished one.

        Raises:
            ValueError: The teacher's features or tokens are of no use.
            FileExistsError: The output is there and holds something else.
            BlockingIOError: Another process builds it.
            OSError: It could not be written.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        lock = self.output.with_name(f"{self.output.name}{LOCK_FILE}")
        with locked(lock, f"the anchor cache {self.output}"), written_to(partial_folder(self.output)):
            return self._run(progress)

    def _run(self, progress: bool) -> AnchorManifest:
        if self.output.exists():
            return _finished(self.output, self.draft)
        folder = _start(self.output, digest([self.draft, self.frames, self.shard_size]))
        shards = ShardWriter(folder, self.teacher, self.readers, self.batch_size, self.num_workers)
        held = shards.write(self.frames, self.shard_size, progress=progress)
        manifest = AnchorManifest(
            **{**self.draft, "sources": [SourceInfo(**source) for source in self.draft["sources"]]},
            shards=held.shards,
            tensors=held.tensors,
            teacher_variance=held.variance(self.draft["layers"]),
            versions={name: version(name) for name in ("craft-opt", "lerobot", "torch", "transformers")},
        )
        manifest.write(folder)
        # The plan, the checksums, and what killed writes have left.
        of_the_cache = {MANIFEST_FILE, *(shard.file for shard in held.shards)}
        for path in folder.iterdir():
            if path.name not in of_the_cache:
                path.unlink()
        folder.rename(self.output)
        sync_folder(self.output.parent)
        logger.info("anchor cache %s: %d anchors of %d tasks", self.output, manifest.samples, len(manifest.tasks))
        return manifest


def build_cache(
    output: str | Path,
    policy_path: str | Path,
    sources: Sequence[AnchorSource],
    *,
    progress: bool = True,
    **settings: Any,
) -> AnchorManifest:
    """Build a cache, or finish an interrupted build, or return the finished one.

    Args:
        output: Folder of the cache.
        policy_path: The teacher, a folder or a name on the hub.
        sources: Datasets of the old skills.
        progress: Whether to show a progress bar.
        **settings: See :func:`prepare_build`.

    Returns:
        The manifest of the cache.

    Raises:
        ValueError: A setting, a dataset or the teacher does not fit.
        FileNotFoundError: A dataset or the teacher is not there.
        FileExistsError: The output is there and holds something else.
    """
    return prepare_build(output, policy_path, sources, **settings).run(progress=progress)


def prepare_build(
    output: str | Path,
    policy_path: str | Path,
    sources: Sequence[AnchorSource],
    *,
    kind: str = "hidden",
    storage: str = "self_contained",
    num_samples: int | None = None,
    fraction: float | None = None,
    balance: bool = True,
    selection: str = "random",
    layers: Sequence[int] | None = None,
    pooling: str | None = None,
    top_k: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
    shard_size: int = 64,
    batch_size: int = 16,
    num_workers: int = 0,
    token_source: str | None = None,
    normalization_stats: str = "teacher",
    stats_source: AnchorSource | None = None,
    rename_map: Mapping[str, str] | None = None,
    policy_overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> AnchorBuild:
    """Load the teacher, choose the frames, and check that everything fits.

    Args:
        output: Folder of the cache.
        policy_path: The teacher, a folder or a name on the hub.
        sources: Datasets of the old skills.
        kind: ``hidden`` (features) or ``token_ce`` (what the teacher says of action tokens).
        storage: ``self_contained`` (images, state and prompts are copied) or ``reference`` (read from the datasets).
        num_samples: Anchors in all; this or ``fraction``.
        fraction: Share of the chosen episodes' frames, in (0, 1].
        balance: Whether every task gets as many anchors as its frames allow; otherwise every frame has one chance.
        selection: Which of a task's frames: ``random``, or ``coverage``, those farthest apart in state and actions.
        layers: For ``hidden``: decoder layers, counted from 1, or from the last as -1; None is the last two.
        pooling: For ``hidden``: one of :data:`craft_opt.retention.POOLINGS`; None is ``action_tokens``.
        top_k: For ``token_ce``: the teacher's most probable tokens kept at each position, 0 for none; None is 8.
        dtype: For ``hidden``: ``float32``, ``bfloat16``, ``float16`` or ``auto``, the dtype of the computation.
        seed: Seed of the selection.
        shard_size: Anchors per file.
        batch_size: Anchors per forward of the teacher.
        num_workers: Processes that read and process frames; 0 is a thread.
        token_source: ``demonstrated`` (the dataset's actions) or ``teacher`` (what it generates itself); None is the
            former for ``hidden`` and the latter for ``token_ce`` and where a source has a prompt.
        normalization_stats: ``teacher`` or ``dataset``; with the latter, ``stats_source`` is the new skill's dataset.
        stats_source: Dataset whose statistics the fine-tuning run will take.
        rename_map: Keys of the sources → keys of the policy.
        policy_overrides: Flags of the policy without their prefix, such as ``--device=cpu``.
        trust_remote_code: Whether the teacher's tokenizers may run code that lies beside them.

    Raises:
        ValueError: A setting, a dataset or the teacher does not fit.
        FileNotFoundError: A dataset or the teacher is not there.
    """
    prompted = [source.prompt for source in sources if source.prompt is not None]
    if kind in KINDS and token_source is None:
        token_source = "teacher" if prompted else DEFAULT_TOKEN_SOURCE[kind]
    _check_choices(
        ("kind", kind, KINDS),
        ("storage", storage, STORAGES),
        ("selection", selection, SELECTIONS),
        ("dtype", dtype, ("auto", *DTYPES)),
        ("action-tokens", token_source, TOKEN_SOURCES),
        ("normalization_stats", normalization_stats, ("teacher", "dataset")),
    )
    _check_numbers(num_samples, fraction, shard_size, batch_size, num_workers)
    if not all(prompt.strip() for prompt in prompted):
        raise ValueError("--prompt is empty; give the text that asks for an old skill")
    if prompted and token_source == "demonstrated":
        raise ValueError(
            "--action-tokens=demonstrated: the dataset's actions are no answer to --prompt; leave --action-tokens out "
            "and the teacher answers itself"
        )
    if kind == "hidden" and top_k is not None:
        raise ValueError(f"--top-k={top_k} goes with --kind=token_ce: a hidden cache keeps no tokens of the teacher's")
    features = {"layers": layers, "pooling": pooling, "dtype": None if dtype == "auto" else dtype}
    if kind == "token_ce" and (given := [f"--{name}" for name, value in features.items() if value is not None]):
        raise ValueError(f"a token_ce cache keeps no features: drop {', '.join(given)}, or build with --kind=hidden")
    if Path(output).exists() and not (Path(output) / MANIFEST_FILE).is_file():
        raise FileExistsError(f"--output={output} is there already and is no anchor cache; choose another --output")
    if not sources:
        raise ValueError("anchors need at least one dataset of old skills: --dataset.repo_id=<name>")
    if (normalization_stats == "dataset") != (stats_source is not None):
        raise ValueError(
            "--normalization_stats=dataset goes together with --stats.repo_id=<the new skill's dataset>: the cache "
            "must be processed as the fine-tuning run will process it"
        )
    config = read_policy_config(policy_path, tuple(policy_overrides))
    datasets = [source.open(lambda metadata: resolve_delta_timestamps(config, metadata)) for source in sources]
    renames = dict(rename_map or {})
    for dataset in datasets:
        check_cameras(config, dataset.meta, renames)
    policy = load_policy(config, datasets[0].meta, renames, trust_remote_code=trust_remote_code)
    policy.eval()
    stats = stats_source.metadata().stats if stats_source else None
    preprocessor, _ = make_processors(config, stats=stats, trust_remote_code=trust_remote_code)
    for dataset in datasets:
        check_widths(preprocessor, dataset.meta, renames)
    compute_dtype = language_model_of(policy).layers[0].self_attn.q_proj.weight.dtype
    hidden = kind == "hidden"
    present = {renames.get(key, key) for key in datasets[0].meta.camera_keys}
    tasks = sorted(
        {
            str(task)
            for source, dataset in zip(sources, datasets, strict=True)
            for task in (dataset.meta.tasks.index if source.prompt is None else [source.prompt])
        }
    )
    teacher = Teacher(
        policy=policy,
        preprocessor=without_renaming(preprocessor),
        kind=kind,
        storage=storage,
        spec=FeatureSpec.resolve(layers or DEFAULT_LAYERS, pooling or DEFAULT_POOLING, depth_of(policy))
        if hidden
        else None,
        top_k=0 if hidden else _top_k(top_k, policy),
        token_source=str(token_source),
        dtype=(compute_dtype if dtype == "auto" else DTYPES[dtype]) if hidden else torch.float32,
        cameras=tuple(key for key in config.image_features if key in present),
        tasks=tuple(tasks),
    )
    readers = [
        FrameReader(dataset, teacher.cameras, renames, source.prompt)
        for source, dataset in zip(sources, datasets, strict=True)
    ]
    frames = select_frames(readers, num_samples, fraction, balance, seed, selection)
    draft: dict[str, Any] = {
        "kind": kind,
        "storage": storage,
        "samples": len(frames),
        "layers": list(teacher.spec.layers) if teacher.spec is not None else [],
        "depth": depth_of(policy),
        "pooling": teacher.spec.pooling if teacher.spec is not None else "",
        "top_k": teacher.top_k,
        "feature_dtype": dtype_name(teacher.dtype),
        "compute_dtype": dtype_name(compute_dtype),
        "token_source": token_source,
        "teacher": str(policy_path),
        "teacher_fingerprint": teacher_fingerprint(policy),
        "preprocessor_fingerprint": preprocessor_fingerprint(preprocessor),
        "normalization_stats": normalization_stats,
        "sources": [asdict(_source_info(*pair, storage)) for pair in zip(sources, datasets, strict=True)],
        "rename_map": renames,
        "cameras": list(teacher.cameras),
        "tasks": tasks,
        "seed": seed,
        "selection": selection,
    }
    return AnchorBuild(Path(output), teacher, readers, frames, draft, shard_size, batch_size, num_workers)


def _check_choices(*settings: tuple[str, Any, Sequence[str]]) -> None:
    for name, value, allowed in settings:
        if value not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_numbers(
    num_samples: int | None,
    fraction: float | None,
    shard_size: int,
    batch_size: int,
    num_workers: int,
) -> None:
    if (num_samples is None) == (fraction is None):
        raise ValueError("give the number of anchors with --num-samples=<n>, or their share with --fraction=<0..1>")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"--fraction must lie above 0 and at most at 1, got {fraction}")
    for name, number in (("num-samples", num_samples), ("shard-size", shard_size), ("batch-size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if num_workers < 0:
        raise ValueError(f"--num-workers must be at least 0, got {num_workers}")


def _top_k(wanted: int | None, policy: torch.nn.Module) -> int:
    vocabulary = pi0_fast_of(policy).model.paligemma_with_expert.paligemma.lm_head.out_features
    top_k = min(DEFAULT_TOP_K, vocabulary) if wanted is None else wanted
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"--top-k must lie between 0 and the vocabulary's {vocabulary} tokens, got {top_k}")
    return top_k


def _source_info(source: AnchorSource, dataset: LeRobotDataset, storage: str) -> SourceInfo:
    episodes = None if source.episodes is None else sorted(source.episodes)
    # Absolute: a run may start in another folder than the build did.
    root = str(Path(source.root).resolve()) if storage == "reference" and source.root is not None else None
    return SourceInfo(source.repo_id, root, str(dataset.revision), episodes, dataset.num_frames, source.prompt)


def _finished(output: Path, draft: Mapping[str, Any]) -> AnchorManifest:
    manifest = AnchorCache.open(output).manifest
    found = asdict(manifest)
    # Where the teacher lies may change; its fingerprint tells whether it is the same.
    different = sorted(name for name, value in draft.items() if name != "teacher" and found[name] != value)
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
