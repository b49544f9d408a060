"""Checkpoints: LeRobot's, plus what CRaFT needs to go on exactly; half of one is never taken for a whole one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.common.train_utils import get_step_checkpoint_dir, load_training_state, save_checkpoint
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, TRAINING_STATE_DIR
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from craft_opt import CraftOptimizer
from craft_opt.bridge.anchor_manifest import sync_folder
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.logs import METRICS_FILE
from craft_opt.bridge.seals import check_prefix, check_seal, prefix_note, seal

CRAFT_STATE_FILE = "craft_state.safetensors"
_FORMAT = "craft-state-2"
# Of before there were several caches: one position and one digest, every step one batch.
_SINGLE_CACHE_FORMAT = "craft-state-1"
_DUAL_NAMES = ("lam", "t", "skipped")


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
                f"CRaFT's train.py, or not a whole one; resume from another, or start a fresh run from its weights "
                f"with --policy.path=<checkpoint>/pretrained_model"
            )
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                values = {name: content.get_tensor(name).tolist() for name in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from error
        found = metadata.pop("format", None)
        digests = metadata.pop("cache_digest" if found == _SINGLE_CACHE_FORMAT else "cache_digests", "")
        if found == _SINGLE_CACHE_FORMAT:
            position = values.pop("anchor_position")
            values["anchor_positions"] = [position] if digests else []
        elif found != _FORMAT:
            raise ValueError(
                f"{file} has format {found!r}, and this program reads {_FORMAT} and {_SINGLE_CACHE_FORMAT}; resume "
                f"with the version that wrote it"
            )
        values["anchor_positions"] = tuple(values["anchor_positions"])
        return cls(cache_digests=tuple(filter(None, digests.split(","))), **values, **metadata)


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
) -> Path:
    """Write ``checkpoints/<step>`` under a temporary name, rename it, and let ``checkpoints/last`` point to it.

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
        num_processes=1,
        batch_size=cfg.batch_size,
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
    step, _, _ = load_training_state(folder, optimizer, scheduler)
    dual = _dual_of(optimizer)
    found = {name: float(dual[name]) for name in _DUAL_NAMES}
    expected = {name: float(getattr(state, name)) for name in _DUAL_NAMES}
    if found != expected or step != state.t + state.skipped:
        raise ValueError(
            f"{folder}: {CRAFT_STATE_FILE} says {expected} and the optimizer's state {found} at step {step}; the files "
            f"are of different checkpoints, resume from another"
        )
    return step, state.anchor_positions


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one."""
    folder = Path(output_dir) / CHECKPOINTS_DIR
    if not folder.is_dir():
        return None
    whole = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    return max(whole, key=lambda path: int(path.name), default=None)


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
    notes = check_seal(folder, f"resume from another checkpoint of {folder.parent}, or from a copy")
    check_prefix(notes.get("metrics", {}), output_dir / METRICS_FILE)
    if dataset and (notes.get("dataset") or dataset) != dataset:
        raise ValueError(
            f"{folder} was trained on another state of the dataset: its files have changed since, so that the order of "
            f"samples cannot be found again; put the dataset back, or start a fresh run from the weights with "
            f"--policy.path={folder}/pretrained_model"
        )
