"""What a run says: the banner, a line a step, the metrics file, wandb."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.utils import init_logging
from tqdm import tqdm

from craft_opt import CraftConfig
from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.processes import is_main
from craft_opt.bridge.retention_term import Retention
from craft_opt.bridge.step import StepResult

METRICS_FILE = "metrics.jsonl"
_MARK = "✓"


@dataclass(frozen=True)
class StepRecord:
    """One step in plain numbers.

    Fields are None where there is nothing to tell: λ and ε in a run without retention, what the two gradients say on a
    step without a retention gradient, L_ret on a step that did not measure it.

    Attributes:
        step: Number of the step, counted from 1.
        steps: Steps of the run.
        loss: Task loss.
        grad_norm: Norm of the merged gradient before the clip.
        lr: Learning rate of the first param group.
        update_s: Seconds of the update, anchors included.
        data_s: Seconds spent waiting for the task batch and processing it.
        mode: ``hidden``, ``token_ce`` or ``none``.
        skipped: Whether nothing was updated because something was not finite.
        skipped_steps: Skipped steps so far.
        retention_loss: L_ret.
        lam_before: λ that the merge used.
        lam: λ after the step.
        epsilon: ε that λ was held against.
        conflict: Whether the task gradient was projected.
        dot: <g_t, g_r> before projection.
        cos: Cosine of the two before projection.
        reused: Whether g_r was that of an earlier step (``off_steps=reuse``).
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    update_s: float
    data_s: float
    mode: str
    skipped: bool
    skipped_steps: int
    retention_loss: float | None = None
    lam_before: float | None = None
    lam: float | None = None
    epsilon: float | None = None
    conflict: bool | None = None
    dot: float | None = None
    cos: float | None = None
    reused: bool = False

    def line(self, last_measured: StepRecord | None = None) -> str:
        """The log line.

        Args:
            last_measured: The latest step with retention since the last line; where this step has none of its own, that
                one's values are shown and marked as stale by so many steps.
        """
        parts = [
            f"Step {self.step}/{self.steps}",
            f"loss={_number(self.loss)}",
            f"grdn={_number(self.grad_norm)}",
            f"lr={self.lr:.1e}",
            f"updt_s={self.update_s:.3f}",
            f"data_s={self.data_s:.3f}",
            f"mode={self.mode}",
        ]
        shown = self if self.retention_loss is not None else last_measured
        if shown is not None:
            parts += [f"L_ret={_number(shown.retention_loss)}", f"λ={shown.lam:.3f}", f"ε={shown.epsilon:.3f}"]
        # A step that reused a gradient has a projection and a cosine of its own; only its L_ret is an older one.
        gradients = self if self.reused else shown
        if gradients is not None:
            if gradients.conflict:
                parts.append(f"conflict={_MARK}")
            parts += [f"dot={_number(gradients.dot)}", f"cos={_number(gradients.cos)}"]
        if self.reused:
            parts.append(f"reused={_MARK}")
        if shown is not None and shown is not self:
            parts.append(f"stale={self.step - shown.step}")
        if self.skipped:
            parts.append(f"skipped={_MARK}")
        return " | ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Values for the metrics file: no field that is None, and null for NaN, which JSON has not."""
        values = asdict(self)
        values["lambda_before"], values["lambda"] = values.pop("lam_before"), values.pop("lam")
        del values["steps"]
        if not self.reused:
            del values["reused"]
        present = {key: value for key, value in values.items() if value is not None}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in present.items()}


def read_steps(results: Sequence[StepResult], steps: int, mode: str) -> list[StepRecord]:
    """Read the scalars of several steps from the device in one copy."""
    if not results:
        return []
    rows = torch.stack(
        [torch.stack([value.double().to(r.loss.device) for value in (r.loss, *_device_values(r))]) for r in results]
    ).tolist()
    records = []
    for result, row in zip(results, rows, strict=True):
        loss, grad_norm, skipped, skipped_steps, retention_loss, lam_before, lam, epsilon, conflict, dot, cos = row
        known: dict[str, Any] = {}
        if result.retains:
            known = {"lam_before": lam_before, "lam": lam, "epsilon": epsilon}
        if result.measured:
            known["retention_loss"] = retention_loss
        # The optimizer gives no dot product where a step had no retention gradient.
        reused = result.retains and not result.measured and not math.isnan(dot)
        if result.measured or reused:
            known |= {"conflict": bool(conflict), "dot": dot, "cos": cos, "reused": reused}
        records.append(
            StepRecord(
                step=result.step,
                steps=steps,
                loss=loss,
                grad_norm=grad_norm,
                lr=result.lr,
                update_s=result.update_s,
                data_s=result.data_s,
                mode=mode,
                skipped=bool(skipped),
                skipped_steps=int(skipped_steps),
                **known,
            )
        )
    return records


class MetricsFile:
    """``metrics.jsonl``: one JSON object a step, each step once, also over interruptions.

    Args:
        file: Its path.
        start: Steps that the run has behind it; later ones in the file are dropped, they will be done again.
    """

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        kept: list[str] = []
        if start and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # a line that was cut off when the run was killed; nothing follows it
                if step <= start:
                    kept.append(line)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(f"{line}\n" for line in kept))

    def append(self, records: Sequence[StepRecord]) -> None:
        """Add steps, durably."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record.as_dict()) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())


def say(text: str) -> None:
    """Print a line that a monitor may wait for: no prefix, at once, without tearing a progress bar; in one process."""
    if not is_main():
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def set_up_logging() -> None:
    """LeRobot's console logging, for everything that is not part of the log's contract."""
    init_logging()
    # LeRobot lets every debug record be made, for a file it does not write.
    logging.getLogger().setLevel(logging.INFO if is_main() else logging.ERROR)
    for name in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)


def cache_lines(term: Retention | None, craft: CraftConfig) -> list[str]:
    """What the run draws its anchors from."""
    lines: list[str] = []
    terms = term.terms if term is not None else []
    for k, cache in enumerate(part.cache for part in terms):
        manifest = cache.manifest
        lines += [
            f"AnchorCache directory: {cache.folder}",
            f"AnchorCache batch size: {craft.anchor_batch_size}",
            f"AnchorCache K: {craft.retention_freq} (retention at steps 0, K, 2K, ...)",
            f"AnchorCache samples: {len(cache)}",
        ]
        if manifest.kind == "hidden":
            layers = ", ".join(map(str, manifest.layers))
            lines.append(f"AnchorCache features: {manifest.pooling}, layers {layers} of {manifest.depth}")
        else:
            probabilities = f"top {manifest.top_k} probabilities" if manifest.top_k else "no probabilities"
            lines.append(f"AnchorCache tokens: {manifest.token_source}, {probabilities}")
        if term is not None and len(terms) > 1:
            lines.append(f"AnchorCache weight: {term.weights[k]:.3f} ({term.counts[k]} anchors of every batch)")
    return lines


def banner_lines(craft: CraftConfig) -> list[str]:
    """The settings of the method."""
    if not craft.enabled:
        return ["CRaFT enabled: False", "Retention Mode: none"]
    lines = [
        "CRaFT enabled: True",
        f"Retention Mode: {craft.retention_mode}",
        f"initial λ: {float(craft.initial_lambda)}",
        f"λ learning rate: {float(craft.lambda_lr)}",
        f"λ max: {float(craft.lambda_max)}",
        f"ε start: {float(craft.epsilon_start)}",
        f"ε end: {float(craft.epsilon_end)}",
        f"gradient projection: {craft.use_grad_projection}",
        f"conflict threshold: {float(craft.conflict_threshold)}",
        f"merge mode: {craft.projection_mode}",
    ]
    # What follows is told where it departs from the defaults, or means something in this mode.
    if craft.retention_mode == "token_ce":
        lines.append(f"token loss: {craft.token_loss}")
    if craft.replay_weight:
        lines.append(f"replay weight: {float(craft.replay_weight)}")
    if craft.off_steps == "reuse":
        lines.append(f"between retention steps: reuse, decay {float(craft.reuse_decay)}")
    if craft.lambda_controller == "nupi":
        lines.append(f"λ controller: nupi, kp {float(craft.nupi_kp)}, ν {float(craft.nupi_nu)}")
    if craft.retention_ema:
        lines.append(f"running average of L_ret: decay {float(craft.retention_ema)}")
    return lines


def _device_values(result: StepResult) -> tuple[torch.Tensor, ...]:
    m = result.metrics
    return (
        m.grad_norm,
        m.skipped,
        m.skipped_steps,
        m.retention_loss,
        m.lam_before,
        m.lam_after,
        m.epsilon,
        m.conflict,
        m.dot,
        m.cos,
    )


def _number(value: float | None) -> str:
    """Three decimals, or two significant ones where three decimals would read 0.000."""
    assert value is not None
    return f"{value:.2e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
