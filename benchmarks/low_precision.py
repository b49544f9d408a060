"""Fine-tune the quickstart's policy in fp32, bf16 and bf16 with stochastic rounding, at pi0_fast's learning rate.

``python -m benchmarks.low_precision``: about six minutes on two cores, the quickstart's teacher taken where it is kept.
Without retention, so that nothing but the rounding differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lerobot.datasets import LeRobotDatasetMetadata

from benchmarks.harness import RESULTS, write_document
from craft_opt import CraftConfig
from craft_opt.bridge.config import fine_tune_config
from craft_opt.bridge.loop import train
from craft_opt.bridge.policies import load_policy, read_policy_config
from craft_opt.bridge.quickstart.measure import measure
from craft_opt.bridge.quickstart.run import HELD_OUT_REPO, NEW_REPO, Prepared, Quickstart
from craft_opt.bridge.quickstart.settings import ROLLOUT_SEED, QuickstartSettings

LR = 2.5e-5  # LeRobot's preset for pi0_fast


@dataclass(frozen=True)
class Variant:
    """A precision and a rounding."""

    name: str
    dtype: str
    rounding: str = "nearest"


VARIANTS = (
    Variant("fp32", "float32"),
    Variant("bf16, nearest", "bfloat16"),
    Variant("bf16, stochastic", "bfloat16", "stochastic"),
)


def parameters(policy: Path, dtype: str, made: Prepared) -> dict[str, torch.Tensor]:
    """The parameters of a saved policy as the run holds them."""
    config = read_policy_config(policy, (f"--dtype={dtype}", "--device=cpu"))
    loaded = load_policy(config, LeRobotDatasetMetadata(NEW_REPO, root=made.new), {})
    return {name: p.detach().clone() for name, p in loaded.named_parameters()}


def run(variant: Variant, made: Prepared, settings: QuickstartSettings, steps: int, output: Path) -> dict[str, Any]:
    """Fine-tune and measure one variant."""
    folder = output / variant.name.replace(", ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    cfg = fine_tune_config(
        made.teacher,
        NEW_REPO,
        made.new,
        folder,
        craft=CraftConfig(enabled=False, bf16_rounding=variant.rounding),
        device="cpu",
        policy_overrides=[f"--optimizer_lr={LR}", f"--dtype={variant.dtype}", f"--scheduler_decay_steps={100 * steps}"],
        steps=steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        log_freq=max(1, steps // 10),
        save_freq=steps,
    )
    done = train(cfg)
    assert done.checkpoint is not None, "the last step is saved"
    policy = done.checkpoint / "pretrained_model"
    before, after = (parameters(path, variant.dtype, made) for path in (made.teacher, policy))
    dtype = getattr(torch, variant.dtype)
    still = sum(int((after[name] == p).sum()) for name, p in before.items() if p.dtype == dtype)
    count = sum(p.numel() for p in before.values() if p.dtype == dtype)
    losses = [json.loads(line)["loss"] for line in done.metrics_file.read_text().splitlines()]
    seed = ROLLOUT_SEED + settings.first_seed(0)
    new = measure(policy, settings.new, made.held_out, HELD_OUT_REPO, settings.rollouts, seed, "cpu")
    return {
        "variant": variant.name,
        "parameters": count,
        "never_moved": still / count,
        "loss_first_50": mean(losses[:50]),
        "loss_last_50": mean(losses[-50:]),
        "new_action_ce": mean(score.action_ce for score in new),
        "new_success": mean(score.success for score in new),
        "seconds": done.seconds,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """A markdown table."""
    lines = ["| | never moved | loss, last 50 steps | action CE of the new skill | success |", "|---|---|---|---|---|"]
    lines += [
        f"| {c['variant']} | {c['never_moved']:.0%} | {c['loss_last_50']:.3f} | {c['new_action_ce']:.2f} | "
        f"{c['new_success']:.2f} |"
        for c in cells
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = replace(QuickstartSettings(), steps=arguments.steps)
    made = Quickstart(settings, CraftConfig(enabled=False), "none", arguments.output_dir).prepare()
    scratch = arguments.output_dir / "low_precision"
    cells = [run(variant, made, settings, arguments.steps, scratch) for variant in VARIANTS]
    command = f"python -m benchmarks.low_precision --steps {arguments.steps}"
    file, _ = write_document(arguments.results, "low-precision", command, lr=LR, cells=cells)
    print(table(cells))
    print(f"written to {file.name}")


if __name__ == "__main__":
    main()
