"""Fine-tune a pi0_fast of full size, random weights, in every retention mode: seconds a step, memory, shares.

``python -m benchmarks.full_size``: 3.45 B parameters in bf16, on a CUDA device: 7 GB of weights, 14 GB of gradients of
both kinds, 28 GB of moments, and the activations.
``python -m benchmarks.full_size --tiny``: the same path on the CPU with the tiny policy; says nothing about speed.

No checkpoint is downloaded. The policy is LeRobot's own ``pi0_fast`` with local tokenizers, saved, and loaded by every
run as any checkpoint is (``--policy.path``), its weights verified. Steps are timed with the device waited for at the
borders of their parts, which a training run does not do.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS
from craft_opt.bridge.report.provenance import provenance

MODES = ("none", "hidden", "token_ce")
TASKS = ("close the drawer", "press the button", "open the window")
FAST = {"horizon": 8, "frequencies": 4, "scale": 8.0}
PARTS = ("retention_forward", "retention_backward", "optimizer")
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        name: Of the results file.
        side: Side of the images in pixels.
        cameras: Number of cameras.
        device: ``cuda`` or ``cpu``.
    """

    name: str
    side: int
    cameras: int
    device: str


FULL = Size("full", 224, 2, "cuda")
TINY = Size("tiny", 32, 1, "cpu")

# AutoProcessor loads a class from a file beside its settings; LeRobot reads what FastActionTokenizer has.
_FAST_PROCESSOR = """\
from craft_opt.bridge.quickstart.tokenizers import FastActionTokenizer
from transformers import ProcessorMixin


class LocalFastProcessor(ProcessorMixin):
    attributes = []

    def __init__(self, horizon=1, frequencies=1, scale=1.0):
        super().__init__()
        self.horizon, self.frequencies, self.scale = horizon, frequencies, scale
        self._fast = FastActionTokenizer(horizon, frequencies, scale)
        self.bpe_tokenizer, self.min_token = self._fast.bpe_tokenizer, self._fast.min_token

    def __call__(self, actions):
        return self._fast(actions)
"""


def write_tokenizers(folder: Path, tasks: Sequence[str]) -> tuple[Path, Path]:
    """Save a text tokenizer and a FAST processor that ``AutoTokenizer`` and ``AutoProcessor`` load: their folders."""
    from craft_opt.bridge.quickstart.tokenizers import FastActionTokenizer, build_text_tokenizer, words_of

    text, action = folder / "text_tokenizer", folder / "action_tokenizer"
    build_text_tokenizer(words_of(tasks), FastActionTokenizer(**FAST).vocab_size).save_pretrained(text)
    action.mkdir(parents=True)
    (action / "processing_local_fast.py").write_text(_FAST_PROCESSOR)
    settings = {
        "auto_map": {"AutoProcessor": "processing_local_fast.LocalFastProcessor"},
        "processor_class": "LocalFastProcessor",
        **FAST,
    }
    (action / "processor_config.json").write_text(json.dumps(settings))
    return text, action


def write_dataset(root: Path, size: Size, tasks: Sequence[str], seed: int) -> Any:
    """Random images and smooth random actions of four joints: four episodes of twelve frames."""
    from lerobot.datasets import LeRobotDataset

    rng = np.random.default_rng(seed)
    names = [f"observation.images.camera{k}" for k in range(size.cameras)]
    image = {"dtype": "image", "shape": (size.side, size.side, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (4,), "names": ["a", "b", "c", "d"]}
    features = {**dict.fromkeys(names, image), "observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create(repo_id="local/synthetic", fps=10, features=features, root=root, use_videos=False)
    for episode in range(4):
        phase = rng.uniform(0, 2 * np.pi, size=4)
        for step in range(12):
            wave = np.sin(phase + 0.4 * step).astype(np.float32)
            images = {name: rng.integers(0, 256, (size.side, size.side, 3), dtype=np.uint8) for name in names}
            task = tasks[episode % len(tasks)]
            dataset.add_frame({**images, "observation.state": wave[::-1].copy(), "action": wave, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return dataset


def write_policy(folder: Path, dataset: Any, size: Size) -> int:
    """Save a policy with random weights and its processors, and return its number of parameters."""
    from lerobot.configs import FeatureType
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.utils.feature_utils import dataset_to_policy_features

    from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
    from craft_opt.bridge.quickstart.tokenizers import words_of

    features = dataset_to_policy_features(dataset.meta.features)
    common: dict[str, Any] = {
        "input_features": {k: f for k, f in features.items() if f.type is not FeatureType.ACTION},
        "output_features": {k: f for k, f in features.items() if f.type is FeatureType.ACTION},
        "chunk_size": FAST["horizon"],
        "n_action_steps": FAST["horizon"],
        "image_resolution": (size.side, size.side),
        "fast_skip_tokens": 0,
        "device": size.device,
        "push_to_hub": False,
    }
    config: PI0FastConfig
    if size.name == "tiny":
        sizes = {"width": 32, "depth": 2, "mlp_dim": 32, "num_heads": 2, "head_dim": 16}
        vision = {"vision_width": 16, "vision_depth": 1, "vision_mlp_dim": 16, "vision_heads": 2}
        fast = {"fast_frequencies": FAST["frequencies"], "fast_scale": FAST["scale"], "max_action_tokens": 24}
        config = PI0FastTinyConfig(**common, **sizes, **vision, **fast, text_words=words_of(TASKS))
    else:
        text, action = write_tokenizers(folder.parent, TASKS)
        names = {"text_tokenizer_name": str(text), "action_tokenizer_name": str(action)}
        config = PI0FastConfig(**common, **names, dtype="bfloat16")
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    for part in (policy, *make_pre_post_processors(config, dataset_stats=dataset.meta.stats)):
        part.save_pretrained(folder)
    return sum(p.numel() for p in policy.parameters())


@dataclass
class Clock:
    """Seconds of the parts of each step, the device waited for at their borders."""

    device: str
    steps: list[dict[str, float]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    started: float = 0.0

    def start(self) -> None:
        self.started = self.read()

    def stop(self, name: str) -> None:
        self.now[name] += self.read() - self.started

    def read(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, run: Any) -> None:
        """Time the parts of a run's steps, at the calls that its step makes."""
        optimizer, term = run.parts.optimizer, run.term
        # Hooks, and not another step: a scheduler watches for that.
        optimizer.register_step_pre_hook(lambda *_: self.start())
        optimizer.register_step_post_hook(lambda *_: self.stop("optimizer"))
        if term is None:
            return
        forward, capture = term.loss, optimizer.retention

        def loss(policy: Any) -> Any:
            self.start()
            value = forward(policy)
            self.stop("retention_forward")
            return value

        @contextmanager
        def retention(value: Any) -> Iterator[None]:
            self.start()
            with capture(value):
                yield
            self.stop("retention_backward")

        term.loss, optimizer.retention = loss, retention

    def next_step(self, record: Any) -> None:
        self.steps.append({"step": record.update_s, **self.now})
        self.now = dict.fromkeys(PARTS, 0.0)


def train_mode(mode: str, size: Size, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train some steps in one mode.

    Returns:
        Seconds a step (the mean over whole periods of K, and of its parts), memory, losses.
    """
    from craft_opt import CraftConfig
    from craft_opt.bridge.config import fine_tune_config
    from craft_opt.bridge.loop import prepare, run_steps

    craft = CraftConfig(enabled=False)
    if mode != "none":
        craft = CraftConfig(retention_mode=mode, anchor_cache_dir=str(work / mode))
        craft = replace(craft, anchor_batch_size=options.anchor_batch_size, retention_freq=options.retention_freq)
    if size.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # The steps before the first whole period are left out: compilers, allocators and caches warm up in them.
    steps = options.retention_freq * (options.periods + 1)
    run = prepare(
        fine_tune_config(
            work / "policy",
            "local/synthetic",
            work / "new",
            work / f"run-{mode}",
            craft=craft,
            device=size.device,
            steps=steps,
            batch_size=options.batch_size,
            log_freq=1,
            save_checkpoint=False,
            seed=0,
            trust_remote_code=True,
        )
    )
    clock, records = Clock(size.device), []

    def on_step(record: Any) -> None:
        clock.next_step(record)
        records.append(record)

    clock.watch(run)
    run_steps(run, on_step=on_step, progress=False)
    counted = clock.steps[options.retention_freq :]
    seconds = {name: mean(step[name] for step in counted) for name in ("step", *PARTS)}
    return {
        "mode": mode,
        "steps": steps,
        "seconds": seconds,
        "share_of_step": {name: seconds[name] / seconds["step"] for name in PARTS},
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if size.device == "cuda" else None,
        "loss": [record.loss for record in records],
        "retention_loss": [record.retention_loss for record in records if record.retention_loss is not None],
        "skipped_steps": records[-1].skipped_steps,
    }


def measure(size: Size, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make everything in ``work``, train in every mode, and return the results."""
    from craft_opt.bridge.anchors import AnchorSource, build_cache

    old = write_dataset(work / "old", size, TASKS[:2], seed=0)
    write_dataset(work / "new", size, TASKS[2:], seed=1)
    parameters = write_policy(work / "policy", old, size)
    gc.collect()
    common = {"num_samples": options.anchors, "batch_size": options.anchor_batch_size, "progress": False}
    common["trust_remote_code"] = True  # the FAST processor that write_tokenizers() put there
    for kind in [mode for mode in options.modes if mode != "none"]:
        overrides = [f"--device={size.device}"]
        source = AnchorSource("local/synthetic", work / "old")
        build_cache(work / kind, work / "policy", [source], kind=kind, policy_overrides=overrides, **common)
        gc.collect()
    modes = {mode: train_mode(mode, size, work, options) for mode in options.modes}
    for result in modes.values():
        if "none" in modes:
            result["step_over_naive"] = result["seconds"]["step"] / modes["none"]["seconds"]["step"]
            if size.device == "cuda":
                result["memory_over_naive_gib"] = result["peak_memory_gib"] - modes["none"]["peak_memory_gib"]
    return {
        "size": size.name,
        "parameters": parameters,
        "settings": {name: value for name, value in vars(options).items() if name not in ("output", "tiny")},
        "modes": modes,
    }


def table(results: dict[str, Any]) -> str:
    """The results in markdown."""
    lines = ["| mode | s a step | over naive | retention | optimizer | peak GiB |", "|---|---|---|---|---|---|"]
    for mode, found in results["modes"].items():
        share = found["share_of_step"]
        retention = share["retention_forward"] + share["retention_backward"]
        memory = "–" if found["peak_memory_gib"] is None else f"{found['peak_memory_gib']:.1f}"
        over = f"{found['step_over_naive']:.2f}" if "step_over_naive" in found else "–"
        step = found["seconds"]["step"]
        lines.append(f"| {mode} | {step:.3f} | {over} | {retention:.0%} | {share['optimizer']:.0%} | {memory} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the tiny policy on the CPU: the same path, no figures")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--anchor-batch-size", type=int, default=4)
    parser.add_argument("--retention-freq", type=int, default=5, help="K")
    parser.add_argument("--periods", type=int, default=3, help="periods of K steps that are measured, after one more")
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--output", type=Path, help="results file (default: in benchmarks/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser().exit(
            2,
            "error: the full-size policy needs a CUDA device, and torch finds none here; run it on a machine with one, "
            "or the same path on the CPU with --tiny\n",
        )
    size = TINY if options.tiny else FULL
    with tempfile.TemporaryDirectory(prefix="craft-full-size-") as work:
        measured = measure(size, Path(work), options)
    results = provenance() | measured
    output: Path = options.output or RESULTS / f"full_size_{size.name}_{results['date']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"Results: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
