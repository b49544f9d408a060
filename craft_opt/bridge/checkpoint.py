"""Checkpoints: LeRobot's, plus what CRaFT needs to go on exactly; half of one is never taken for a whole one."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.common.train_utils import get_step_checkpoint_dir, load_training_state, save_checkpoint
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import (
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    OPTIMIZER_STATE,
    RNG_STATE,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from craft_opt import CraftOptimizer
from craft_opt.bridge.anchor_manifest import sync_folder
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.logs import METRICS_FILE
from craft_opt.bridge.run_guard import newest_checkpoint
from craft_opt.bridge.seals import check_prefix, check_seal, prefix_note, seal
from craft_opt.bridge.untrusted import MAX_JSON_BYTES, brief, check_header, check_inside, read_json, shown, typed

_UNFIT = (SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)
CRAFT_STATE_FILE = "craft_state.safetensors"
_FORMAT = "craft-state-2"
# Of before there were several caches: one position and one digest, every step one batch.
_SINGLE_CACHE_FORMAT = "craft-state-1"
_DUAL_NAMES = ("lam", "t", "skipped")
_OTHER = "resume from another checkpoint, or restore it from a copy"
_STATE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("t", "skipped", "accumulated"), int),
    "lam": float,
    "anchor_positions": list[int],
    "cache_digests": list[str],
    "normalization_stats": str,
}
# numpy takes any place in its 624 numbers, and reads there.
_NUMPY_WORDS = 624


@dataclass(frozen=True)
class CraftState:
    """What LeRobot's files have no place for.

    Attributes:
        lam: λ.
        t: Completed steps, ε's clock.
        skipped: Skipped steps.
        anchor_positions: Anchors drawn so far from every cache.
        cache_digests: Digests of the anchor caches' manifests, in order; none without retention.
        normalization_stats: ``teacher`` or ``dataset``.
        accumulated: Batches of a step.
    """

    lam: float
    t: int
    skipped: int
    anchor_positions: tuple[int, ...]
    cache_digests: tuple[str, ...]
    normalization_stats: str
    accumulated: int = 1

    def write(self, file: Path) -> None:
        """Write it as safetensors."""
        tensors = {
            "lam": torch.tensor(self.lam, dtype=torch.float64),
            "t": torch.tensor(self.t, dtype=torch.int64),
            "skipped": torch.tensor(self.skipped, dtype=torch.int64),
            "anchor_positions": torch.tensor(self.anchor_positions, dtype=torch.int64),
            "accumulated": torch.tensor(self.accumulated, dtype=torch.int64),
        }
        described = {"cache_digests": ",".join(self.cache_digests), "normalization_stats": self.normalization_stats}
        save_file(tensors, file, metadata={"format": _FORMAT, **described})

    @classmethod
    def read(cls, file: Path) -> CraftState:
        """Read it.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is damaged or of another format.
        """
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, so λ, ε's clock and the order of anchors are lost: this is no checkpoint of "
                f"CRaFT's train.py, or not a whole one; resume from another, restore it from a copy, or start a fresh "
                f"run from its weights with --policy.path=<checkpoint>/pretrained_model"
            )
        check_header(file, _OTHER)
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{file} has {size} bytes, which no such file has; {_OTHER}")
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                values = {name: content.get_tensor(name).tolist() for name in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({brief(error)}); {_OTHER}") from error
        found = metadata.pop("format", None)
        digests = metadata.pop("cache_digest" if found == _SINGLE_CACHE_FORMAT else "cache_digests", "")
        if found == _SINGLE_CACHE_FORMAT:
            position = values.pop("anchor_position", None)
            values["anchor_positions"] = [position] if digests else []
            values.setdefault("accumulated", 1)
        elif found != _FORMAT:
            raise ValueError(
                f"{file} has format {shown(found)}, and this program reads {_FORMAT} and {_SINGLE_CACHE_FORMAT}; "
                f"resume with the version that wrote it"
            )
        found = {**values, **metadata, "cache_digests": list(filter(None, digests.split(",")))}
        try:
            if odd := sorted(found.keys() ^ _STATE_TYPES.keys()):
                raise ValueError(f"it has {', '.join(map(shown, odd))} where {', '.join(_STATE_TYPES)} belong")
            state: dict[str, Any] = {name: typed(value, _STATE_TYPES[name], name) for name, value in found.items()}
            if not math.isfinite(state["lam"]) or state["lam"] < 0:
                raise ValueError(f"λ is {state['lam']}")
            if min(state["t"], state["skipped"], state["accumulated"] - 1, *state["anchor_positions"], 0) < 0:
                raise ValueError("a number of steps, batches or anchors is negative")
            if len(state["anchor_positions"]) != len(state["cache_digests"]):
                raise ValueError("its anchor caches and the positions in them are not as many")
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({brief(error)}); {_OTHER}") from error
        lists = {name: tuple(value) for name, value in state.items() if isinstance(value, list)}
        return cls(**{**state, **lists})


def save(
    cfg: CraftTrainConfig,
    step: int,
    policy: nn.Module,
    optimizer: CraftOptimizer,
    scheduler: LRScheduler | None,
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline],
    *,
    anchor_positions: tuple[int, ...],
    cache_digests: tuple[str, ...],
    dataset: str = "",
    processes: int = 1,
    gathered: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Path:
    """Write ``checkpoints/<step>`` under a temporary name, rename it, and let ``checkpoints/last`` point to it.

    ``gathered`` are the weights and the optimizer's state where the policy is sharded. A checkpoint has one form,
    whatever wrote it, so that any number of processes can go on from it.

    Returns:
        The folder.

    Raises:
        OSError: It could not be written; the checkpoints of before are as they were.
    """
    assert cfg.output_dir is not None
    target = get_step_checkpoint_dir(cfg.output_dir, cfg.steps, step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_checkpoint(
        checkpoint_dir=partial,
        step=step,
        cfg=cfg,
        policy=policy,
        optimizer=optimizer,
        scheduler=scheduler,
        preprocessor=processors[0],
        postprocessor=processors[1],
        num_processes=processes,
        batch_size=cfg.batch_size,
        model_state_dict=None if gathered is None else gathered[0],
        optim_state_dict=None if gathered is None else gathered[1],
    )
    dual = _dual_of(optimizer)
    state = CraftState(
        lam=float(dual["lam"]),
        t=int(dual["t"]),
        skipped=int(dual["skipped"]),
        anchor_positions=anchor_positions,
        cache_digests=cache_digests,
        normalization_stats=cfg.normalization_stats,
        accumulated=cfg.gradient_accumulation_steps,
    )
    state.write(partial / TRAINING_STATE_DIR / CRAFT_STATE_FILE)
    # The metrics up to here belong to it: a resumed run goes on with them.
    seal(partial, metrics=prefix_note(cfg.output_dir / METRICS_FILE), dataset=dataset)
    replaced = target.with_name(target.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_last_to(target)
    return target


def restore(
    cfg: CraftTrainConfig, optimizer: CraftOptimizer, scheduler: LRScheduler | None, cache_digests: tuple[str, ...]
) -> tuple[int, tuple[int, ...]]:
    """Load optimizer, scheduler and RNG states from ``cfg.checkpoint_path``.

    Called last before the loop: it sets the global generators, and nothing may draw from them in between.

    Returns:
        Steps done, and anchors drawn from every cache.

    Raises:
        FileNotFoundError: CRaFT's state is missing.
        ValueError: The states contradict each other, or the run's cache is another one.
    """
    folder = cfg.checkpoint_path
    assert folder is not None
    if folder.name.endswith((".partial", ".replaced")):
        raise ValueError(f"{folder} is an unfinished checkpoint; resume from {folder.parent / LAST_CHECKPOINT_LINK}")
    state = CraftState.read(folder / TRAINING_STATE_DIR / CRAFT_STATE_FILE)
    if state.cache_digests != cache_digests:
        raise ValueError(
            f"{folder} was trained with anchor cache {_short(state.cache_digests)}, and craft.anchor_cache_dir="
            f"{cfg.craft.anchor_cache_dir!r} is {_short(cache_digests)}; resume with the same cache and retention mode"
        )
    if state.accumulated != cfg.gradient_accumulation_steps:
        raise ValueError(
            f"{folder} was trained with --gradient_accumulation_steps={state.accumulated}, got "
            f"{cfg.gradient_accumulation_steps}; the order of samples cannot be found again, resume with "
            f"--gradient_accumulation_steps={state.accumulated}"
        )
    if state.normalization_stats != cfg.normalization_stats:
        raise ValueError(
            f"{folder} was trained with --normalization_stats={state.normalization_stats}, got "
            f"{cfg.normalization_stats}; resume with the same choice"
        )
    try:
        step, _, _ = load_training_state(folder, optimizer, scheduler)
    except _UNFIT as error:  # LeRobot's and torch's words for a file of another optimizer, or a made-up one
        raise ValueError(
            f"{folder / TRAINING_STATE_DIR} does not fit this run ({brief(repr(error))}); {_OTHER}"
        ) from error
    dual = _dual_of(optimizer)
    found = {name: float(dual[name]) for name in _DUAL_NAMES}
    expected = {name: float(getattr(state, name)) for name in _DUAL_NAMES}
    if found != expected or step != state.t + state.skipped:
        raise ValueError(
            f"{folder}: {CRAFT_STATE_FILE} says {expected} and the optimizer's state {found} at step {step}; the files "
            f"are of different checkpoints, resume from another"
        )
    return step, state.anchor_positions


def check_training_state(folder: Path) -> None:
    """Check what LeRobot reads of a checkpoint for what it would take without a word, or not survive.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    state = folder / TRAINING_STATE_DIR
    for name in (OPTIMIZER_STATE, RNG_STATE):
        check_inside(folder, state / name, _OTHER)
    for name in (TRAINING_STEP, OPTIMIZER_PARAM_GROUPS, SCHEDULER_STATE):
        if name != SCHEDULER_STATE or (state / name).exists():
            check_inside(folder, state / name, _OTHER)
            read_json(state / name, _OTHER)
    file = state / TRAINING_STEP
    content = read_json(file, _OTHER)
    step = content.get("step") if isinstance(content, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError(f"{file} has step {shown(step)}, which is no number of steps; {_OTHER}")
    file = state / RNG_STATE
    try:
        with safe_open(file, framework="pt") as states:
            values, place = (states.get_tensor(f"np_rng_state_{part}") for part in ("values", "index"))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({brief(error)}); {_OTHER}") from error
    if values.numel() != _NUMPY_WORDS or place.numel() != 1 or not 0 <= int(place) <= _NUMPY_WORDS:
        raise ValueError(f"{file} has no state of numpy's generator ({tuple(values.shape)}, {place}); {_OTHER}")


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one."""
    return newest_checkpoint(Path(output_dir))


def _short(digests: tuple[str, ...]) -> str:
    return ", ".join(digest[:16] for digest in digests) or "none"


def _dual_of(optimizer: CraftOptimizer) -> dict[str, Tensor]:
    states: dict[Any, dict[str, Any]] = optimizer.state_dict()["state"]
    return next((state["craft_dual"] for state in states.values() if "craft_dual" in state), {})


def _point_last_to(target: Path) -> None:
    # LeRobot's update_last_checkpoint unlinks before it links: a kill in between would leave no "last".
    link = target.parent / LAST_CHECKPOINT_LINK
    temporary = link.with_name(link.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)


def check_whole(folder: Path, output_dir: Path, dataset: str = "") -> None:
    """Check a checkpoint, and the metrics and dataset that it goes on with, against its seal.

    Raises:
        ValueError: Something was damaged or changed since it was written.
    """
    notes = check_seal(folder, f"resume from another checkpoint of {folder.parent}, or restore it from a copy")
    check_prefix(notes.get("metrics", {}), output_dir / METRICS_FILE)
    if dataset and (notes.get("dataset") or dataset) != dataset:
        raise ValueError(
            f"{folder} was trained on another state of the dataset: its files have changed since, so that the order of "
            f"samples cannot be found again; put the dataset back, or start a fresh run from the weights with "
            f"--policy.path={folder}/pretrained_model"
        )
