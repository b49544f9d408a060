"""The training loop: config → policy → preprocessor → anchor cache → steps, from LeRobot's public pieces."""

from __future__ import annotations

import functools
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from httpx import HTTPError
from lerobot.common.train_utils import (
    get_step_checkpoint_dir,
    get_step_identifier,
    load_training_batch_size,
    load_training_num_processes,
    push_checkpoint_to_hub,
    should_save_checkpoint,
)
from lerobot.common.wandb_utils import WandBLogger
from lerobot.configs import parser
from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset, compute_sampler_state
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import TRAINING_STATE_DIR, TRAINING_STEP
from lerobot.utils.io_utils import load_json
from lerobot.utils.random_utils import get_rng_state, set_rng_state, set_seed
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from craft_opt.bridge import checkpoint
from craft_opt.bridge.adapters import teacher_within
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.dataset import InMemoryDataset, in_memory
from craft_opt.bridge.logs import (
    METRICS_FILE,
    MetricsFile,
    StepRecord,
    banner_lines,
    cache_lines,
    read_steps,
    say,
)
from craft_opt.bridge.policies import check_widths, load_policy, make_processors, precision_context
from craft_opt.bridge.processes import Ranks, full_state
from craft_opt.bridge.retention_term import (
    ExpectedFeatures,
    Retention,
    check_cache_fits,
    check_drift,
    digests_of,
    open_caches,
)
from craft_opt.bridge.run_guard import LOCK_FILE, locked, written_to
from craft_opt.bridge.seals import check_seal, dataset_digest
from craft_opt.bridge.step import StepResult, Trained, train_step

logger = logging.getLogger(__name__)

# What a run that does not fit ends with, before its first step.
USER_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, NotImplementedError)


@dataclass(frozen=True)
class TrainSummary:
    """What a run leaves behind.

    Attributes:
        output_dir: Where it wrote.
        steps: Steps of the run.
        checkpoint: The last checkpoint, None if none was asked for.
        metrics_file: One JSON object a step.
        skipped_steps: Steps that changed nothing because something was not finite.
        seconds: Wall time of the steps of this call.
        last: The last step, None if there was none left to do.
    """

    output_dir: Path
    steps: int
    checkpoint: Path | None
    metrics_file: Path
    skipped_steps: int
    seconds: float
    last: StepRecord | None


@dataclass(frozen=True)
class Run:
    """A run that was checked and can start.

    Attributes:
        cfg: Its configuration, validated.
        parts: Policy, optimizer, scheduler, retention.
        dataset: The task dataset as LeRobot opened it.
        eval_dataset: Held-out episodes, if any.
        preprocessor: Of the policy.
        postprocessor: Of the policy.
        samples: The dataset as the steps read it, decoded in memory where it fits.
        start: Steps done before (resume).
        data: What tells the dataset from another state of itself.
    """

    cfg: CraftTrainConfig
    parts: Trained
    dataset: LeRobotDataset
    eval_dataset: LeRobotDataset | None
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    samples: Any
    start: int
    data: str = ""

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.parts.ranks

    @property
    def term(self) -> Retention | None:
        """The retention term, as what it is."""
        term = self.parts.term
        assert term is None or isinstance(term, Retention)
        return term


def train(
    cfg: CraftTrainConfig, *, on_step: Callable[[StepRecord], None] | None = None, progress: bool = True
) -> TrainSummary:
    """Check everything, then train.

    Args:
        cfg: The configuration; validated here.
        on_step: Called with every step's numbers, when they are read (``log_freq``), in order.
        progress: Whether to show a progress bar where there is a terminal.

    Returns:
        Where the results are.

    Raises:
        ValueError: Something does not fit; nothing was trained.
        FileNotFoundError: A cache, dataset, policy or checkpoint is not there.
        FileExistsError: The output folder is there already.
    """
    return run_steps(prepare(cfg), on_step=on_step, progress=progress)


def prepare(cfg: CraftTrainConfig) -> Run:
    """Build all parts of a run and check that they belong together.

    Raises:
        ValueError: Something does not fit.
        FileNotFoundError: A cache, dataset, policy or checkpoint is not there.
        FileExistsError: The output folder is there already.
    """
    on_cpu = parser.parse_arg("policy.device", cfg._arguments) == "cpu" or not torch.cuda.is_available()
    ranks = Ranks.join("cpu" if on_cpu else "cuda")
    # What can fail comes first and needs nobody else, so that no process waits for one that has given up.
    assemble = ranks.together(lambda: _load(cfg, ranks), USER_ERRORS)
    return assemble()


def _load(cfg: CraftTrainConfig, ranks: Ranks) -> Callable[[], Run]:
    """Load and check everything; return what puts it together."""
    cfg.validate()
    _check_retention(cfg)
    caches = open_caches(cfg.craft) if cfg.craft.enabled else []
    assert cfg.policy is not None and cfg.output_dir is not None
    if cfg.resume:
        _check_resumable(cfg, ranks.count)
    if ranks.count > 1:
        _refuse_in_several(cfg, ranks)
    if cfg.seed is not None:
        set_seed(cfg.seed)
    torch.backends.cudnn.deterministic = cfg.cudnn_deterministic
    torch.backends.cudnn.benchmark = not cfg.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = True

    dataset, eval_dataset = _datasets(cfg)
    if not cfg.dataset.streaming and dataset.num_frames < cfg.batch_size * ranks.count:
        raise ValueError(
            f"dataset {cfg.dataset.repo_id} has {dataset.num_frames} frames, and {ranks.count} processes with "
            f"--batch_size={cfg.batch_size} take {cfg.batch_size * ranks.count} a step; lower --batch_size"
        )
    data = "" if cfg.dataset.streaming else dataset_digest(Path(dataset.root))
    if cfg.resume:
        assert cfg.checkpoint_path is not None
        checkpoint.check_whole(cfg.checkpoint_path, cfg.output_dir, data)
    policy: Any = load_policy(cfg.policy, dataset.meta, cfg.rename_map, trust_remote_code=cfg.trust_remote_code)
    stats, whose = _statistics(cfg, dataset)
    preprocessor, postprocessor = make_processors(
        cfg.policy, stats=stats, rename_map=cfg.rename_map, trust_remote_code=cfg.trust_remote_code
    )
    check_widths(preprocessor, dataset.meta, cfg.rename_map)
    expected = ExpectedFeatures(cfg.anchor_layers, cfg.anchor_pooling)
    for cache in caches:
        check_cache_fits(
            cache,
            policy,
            preprocessor,
            cfg.normalization_stats,
            # With the policy itself as the teacher the run's choice need not be the cache's.
            ExpectedFeatures() if cfg.craft.teacher == "adapters_off" else expected,
            is_teacher=not cfg.resume,
        )
    if cfg.peft is not None and not cfg.policy.use_peft:
        policy = policy.wrap_with_peft(peft_cli_overrides=asdict(cfg.peft))
    seed = cfg.seed if cfg.seed is not None else 0
    on_the_fly = teacher_within(policy, expected) if caches and cfg.craft.teacher == "adapters_off" else None
    term = (
        Retention(caches, preprocessor, cfg.craft, seed, on_the_fly, rank=ranks.rank, processes=ranks.count)
        if caches
        else None
    )
    drift: float | None = None
    if term is not None and not cfg.resume:
        with precision_context(cfg.policy):
            drift = check_drift(term, policy, cfg.policy)
    samples = dataset if cfg.dataset.streaming else in_memory(dataset)

    def assemble() -> Run:
        wrapped = ranks.wrap(policy)

        def run_with(term: Retention | None) -> Run:
            # After wrapping: shards are other parameters.
            optimizer, scheduler = make_optimizer_and_scheduler(cfg, ranks.unwrap(wrapped))
            parts = Trained(wrapped, optimizer, scheduler, term, ranks)
            return Run(cfg, parts, dataset, eval_dataset, preprocessor, postprocessor, samples, 0, data)

        if term is not None and cfg.craft.epsilon == "auto" and not cfg.resume:
            cfg.set_epsilon(*_epsilon_of_naive_run(run_with(None), term))
            gc.collect()  # the naive run's optimizer: its hooks on the parameters go with it, and it lies in cycles
        for line in (*cache_lines(term, cfg.craft), *banner_lines(cfg.craft)):
            say(line)
        say(f"Normalisation statistics: {whose}")
        if drift is not None:
            say(f"Drift before step 0: {drift:.1e}")
        if ranks.count > 1:
            say(f"Processes: {ranks.count} ({'shards, FSDP2' if ranks.sharded else 'replicas, DDP'})")
        run = run_with(term)
        if cfg.resume:
            restore = functools.partial(checkpoint.restore, cfg, run.parts.optimizer, run.parts.scheduler)
            start, positions = ranks.together(lambda: restore(digests_of(caches)), USER_ERRORS)
            if term is not None:
                term.positions = positions
            say(f"Resumed from {cfg.checkpoint_path} after step {start}")
            run = replace(run, start=start)
        if ranks.rank > 0:
            # What is random in a step shall not be the same everywhere. The first process goes on with what the
            # checkpoint holds; the others draw theirs afresh, the same ones whenever a run starts from this step.
            set_seed(int(np.random.SeedSequence([seed, run.start, ranks.rank]).generate_state(1)[0]))
        return run

    return assemble


def _refuse_in_several(cfg: CraftTrainConfig, ranks: Ranks) -> None:
    """Refuse what one process can do and several cannot.

    Raises:
        ValueError: It is asked for.
    """
    assert cfg.policy is not None
    if cfg.craft.enabled and cfg.craft.epsilon == "auto" and not cfg.resume:
        raise ValueError(
            f"craft.epsilon=auto measures in one process, and this run has {ranks.count}; let python train.py with the "
            f"same flags and --dry-run say what it finds, and pass --craft.epsilon_start and --craft.epsilon_end"
        )
    if cfg.dataset.streaming:
        raise ValueError("a streamed dataset is not shared out among processes; pass --dataset.streaming=false")
    if ranks.sharded and cfg.env is not None:
        raise ValueError("--env evaluates a whole policy, and FSDP2 shards it; evaluate checkpoints with lerobot-eval")
    if ranks.sharded and cfg.policy.push_to_hub:
        raise ValueError(
            "--policy.push_to_hub pushes a whole policy, and FSDP2 shards it; push the last checkpoint afterwards"
        )


def _epsilon_of_naive_run(run: Run, term: Retention) -> tuple[float, float]:
    """ε at the start and at the end: fractions of what a short run without retention drifts.

    The naive run takes the batches, the starting policy and the optimizer of the run to come, and leaves no trace:
    parameters, buffers, generators and the order of samples are afterwards what they were, bit for bit. In memory it
    needs a copy of what trains, on the CPU, and for its time an optimizer of its own.

    Raises:
        ValueError: It did not drift, so that there is nothing to take a fraction of.
    """
    cfg, parts = run.cfg, run.parts
    steps, fraction = cfg.craft.epsilon_auto_steps, cfg.craft.epsilon_auto_fraction
    assert cfg.policy is not None
    say(f"ε auto: measuring the drift of a naive run of {steps} steps")
    policy, precision = parts.policy, precision_context(cfg.policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in (*trained, *policy.buffers())]
    was_training = policy.training
    with _randomness_kept():
        batches = _task_batches(run)
        for step in tqdm(range(1, steps + 1), desc="Naive run for ε", unit="step", disable=None):
            train_step(parts, _processed(run, batches), precision, step=step, data_s=0.0)
        with precision:
            drift = term.mean_loss(policy)
    with torch.no_grad():
        for tensor, before in zip((*trained, *policy.buffers()), kept, strict=True):
            tensor.copy_(before)
    policy.train(was_training)
    if not drift > 0 or not math.isfinite(drift):
        raise ValueError(
            f"craft.epsilon=auto: a naive run of {steps} steps drifted by {drift:.2e}, so there is nothing to take a "
            f"fraction of; pass a larger --craft.epsilon_auto_steps, or --craft.epsilon=schedule with "
            f"--craft.epsilon_start and --craft.epsilon_end"
        )
    start, end = 2 * fraction * drift, fraction * drift
    say(f"ε auto: it drifted by {drift:.4g}; ε from {start:.4g} to {end:.4g} ({fraction:g} of the drift at the end)")
    return start, end


def run_steps(run: Run, *, on_step: Callable[[StepRecord], None] | None = None, progress: bool = True) -> TrainSummary:
    """Do the steps of a prepared run.

    Ctrl-C leaves the metrics of all finished steps and every checkpoint that was whole.

    Raises:
        BlockingIOError: Another process trains in the output folder.
        OSError: Something could not be written, or a data worker died.
    """
    with claimed(run) if run.ranks.is_main else nullcontext():
        run.ranks.wait()  # for the folder
        return _run_steps(run, on_step, progress)


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Keep the output folder for this run, and give errors of its steps a name.

    Raises:
        FileExistsError: It was made by another run since this one was prepared.
        BlockingIOError: Another process trains in it.
        OSError: Something could not be written, or a data worker died.
    """
    folder = run.cfg.output_dir
    assert folder is not None
    try:
        # A run that goes on, from a checkpoint or from steps done in this process, has its folder already.
        folder.mkdir(parents=True, exist_ok=run.cfg.resume or run.start > 0)
    except FileExistsError as error:
        raise FileExistsError(f"another run has made {folder} meanwhile; choose another --output_dir") from error
    with locked(folder / LOCK_FILE, f"the output folder {folder}"), written_to(folder):
        yield


def _run_steps(run: Run, on_step: Callable[[StepRecord], None] | None, progress: bool) -> TrainSummary:
    cfg, parts = run.cfg, run.parts
    assert cfg.policy is not None and cfg.output_dir is not None
    mode = cfg.craft.retention_mode if cfg.craft.enabled else "none"
    is_main = run.ranks.is_main
    wandb = WandBLogger(cfg) if cfg.wandb.enable and cfg.wandb.project and is_main else None
    metrics_file = cfg.output_dir / METRICS_FILE
    file = MetricsFile(metrics_file, run.start) if is_main else None
    journal = Journal(file, cfg.steps, mode, on_step, wandb)
    precision = precision_context(cfg.policy)
    batches = _task_batches(run)
    saved: Path | None = None
    say(f"Output directory: {cfg.output_dir}")
    started = time.perf_counter()
    hidden = None if progress and is_main else True  # None: where there is no terminal
    bar = tqdm(total=cfg.steps, initial=run.start, desc="Training", unit="step", disable=hidden)
    try:
        for step in range(run.start + 1, cfg.steps + 1):
            fetched = time.perf_counter()
            processed = _processed(run, batches)
            result = train_step(parts, processed, precision, step=step, data_s=time.perf_counter() - fetched)
            journal.add(result)
            bar.update(1)
            is_saving = cfg.save_checkpoint and should_save_checkpoint(step, cfg.save_freq, cfg.steps)
            if step == cfg.steps or (cfg.log_freq > 0 and step % cfg.log_freq == 0):
                journal.flush(show=cfg.log_freq > 0 and step % cfg.log_freq == 0)
            if cfg.eval_steps > 0 and run.eval_dataset is not None and step % cfg.eval_steps == 0:
                with _randomness_kept():
                    _report_eval_loss(run, step, precision, wandb)
            if is_saving:
                # The file must hold every step up to the checkpoint: a resumed run adds only what comes after.
                journal.flush(show=False)
                saved = save_run(run, step)
                if wandb is not None:
                    wandb.log_policy(saved)
            if cfg.env is not None and cfg.env_eval_freq > 0 and step % cfg.env_eval_freq == 0:
                with _randomness_kept():
                    if is_main:
                        _evaluate_in_env(run, step, precision, wandb)
                    run.ranks.wait()
    finally:
        bar.close()
        journal.flush(show=False)
    _push(run)
    return TrainSummary(
        output_dir=cfg.output_dir,
        steps=cfg.steps,
        checkpoint=saved or (checkpoint.latest_checkpoint(cfg.output_dir) if cfg.save_checkpoint else None),
        metrics_file=metrics_file,
        skipped_steps=journal.skipped_steps,
        seconds=time.perf_counter() - started,
        last=journal.last,
    )


class Journal:
    """Holds the steps whose numbers still lie on the device, and writes them down when told to."""

    def __init__(
        self,
        file: MetricsFile | None,
        steps: int,
        mode: str,
        on_step: Callable[[StepRecord], None] | None,
        wandb: WandBLogger | None,
    ) -> None:
        self.file = file
        self.last: StepRecord | None = None
        self.skipped_steps = 0
        self._steps, self._mode, self._on_step, self._wandb = steps, mode, on_step, wandb
        self._waiting: list[StepResult] = []
        self._measured: StepRecord | None = None

    def add(self, result: StepResult) -> None:
        """Take a step whose numbers need not be there yet."""
        self._waiting.append(result)

    def flush(self, *, show: bool) -> None:
        """Read the waiting steps, write them to the file, and print a line for the last if asked to."""
        waiting, self._waiting = self._waiting, []
        records = read_steps(waiting, self._steps, self._mode)
        if records:
            if self.file is not None:
                self.file.append(records)
            self.last = records[-1]
        for record in records:
            if record.retention_loss is not None:
                self._measured = record
            if record.skipped:
                say(
                    f"Step {record.step}/{self._steps} skipped: a loss or gradient was not finite; parameters, moments "
                    f"and λ are unchanged ({record.skipped_steps} skipped so far)"
                )
            self.skipped_steps = record.skipped_steps
            if self._on_step is not None:
                self._on_step(record)
        if show and self.last is not None:
            say(self.last.line(self._measured))
            self._measured = None
            if self._wandb is not None:
                values = {key: value for key, value in self.last.as_dict().items() if value is not None}
                self._wandb.log_dict(values, self.last.step)


def _check_retention(cfg: CraftTrainConfig) -> None:
    craft = cfg.craft
    if not craft.enabled:
        return
    assert cfg.policy is not None
    if not cfg.policy.pretrained_path:
        raise ValueError(
            "CRaFT is on and there is no starting policy to keep the skills of; pass --policy.path=<teacher>, or train "
            "without retention: --retention-mode none"
        )


def _check_resumable(cfg: CraftTrainConfig, processes: int) -> None:
    """Before anything heavy is built: the checkpoint is whole, and of CRaFT's loop."""
    assert cfg.checkpoint_path is not None
    state = cfg.checkpoint_path / TRAINING_STATE_DIR
    checkpoint.CraftState.read(state / checkpoint.CRAFT_STATE_FILE)
    checkpoint.check_training_state(cfg.checkpoint_path)
    done = load_json(state / TRAINING_STEP)["step"]
    if done >= cfg.steps:
        raise ValueError(
            f"{cfg.checkpoint_path} has {done} steps behind it, and --steps={cfg.steps}; nothing is left to do, pass a "
            f"larger --steps"
        )
    before = load_training_batch_size(cfg.checkpoint_path), load_training_num_processes(cfg.checkpoint_path) or 1
    if before[0] is not None and before[0] * before[1] != cfg.batch_size * processes:
        raise ValueError(
            f"{cfg.checkpoint_path} was trained with {_batches(*before)}, got {_batches(cfg.batch_size, processes)}; "
            f"the order of samples cannot be found again, resume with "
            f"--batch_size={max(1, before[0] * before[1] // processes)}"
        )
    if cfg.dataset.streaming:
        raise ValueError("a streamed dataset has no order to resume in; pass --dataset.streaming=false")


def _batches(size: int, processes: int) -> str:
    return f"--batch_size={size}" + (f" in {processes} processes" if processes > 1 else "")


def _datasets(cfg: CraftTrainConfig) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    if cfg.dataset.root is not None:
        check_seal(Path(cfg.dataset.root), "record it again, or restore it from a copy")
    try:
        return make_train_eval_datasets(cfg)
    except (OSError, HTTPError) as error:
        where = f"in {cfg.dataset.root}" if cfg.dataset.root is not None else "in LeRobot's cache"
        raise FileNotFoundError(
            f"dataset {cfg.dataset.repo_id} is not {where} and could not be fetched from the hub ({error}); give the "
            f"folder of a local one with --dataset.root=<folder>"
        ) from error


def _statistics(cfg: CraftTrainConfig, dataset: LeRobotDataset) -> tuple[dict[str, Any] | None, str]:
    """Statistics to normalise with (None: those saved with the policy), and how the log names them."""
    assert cfg.policy is not None
    if cfg.policy.pretrained_path is None:
        return dataset.meta.stats, f"dataset ({cfg.dataset.repo_id}), the policy starts from scratch"
    if cfg.resume:
        return None, f"{cfg.normalization_stats} (as saved in the checkpoint)"
    if cfg.normalization_stats == "dataset":
        return dataset.meta.stats, f"dataset ({cfg.dataset.repo_id})"
    return None, f"teacher ({cfg.policy.pretrained_path})"


def _task_batches(run: Run) -> Iterator[dict[str, Any]]:
    """Endless task batches in an order that is a pure function of seed and step."""
    cfg, dataset = run.cfg, run.dataset
    seed = cfg.seed if cfg.seed is not None else 0
    kept = run.samples
    # From memory a sample takes microseconds; starting a worker process takes ten seconds.
    workers = 0 if isinstance(kept, InMemoryDataset) else cfg.num_workers
    sampler = None
    if not isinstance(kept, IterableDataset):
        sampler = EpisodeAwareSampler(
            dataset.meta.episodes["dataset_from_index"],
            dataset.meta.episodes["dataset_to_index"],
            episode_indices_to_use=dataset.episodes,
            drop_n_last_frames=getattr(cfg.policy, "drop_n_last_frames", 0),
            shuffle=True,
            seed=seed,
            absolute_to_relative_idx=dataset.absolute_to_relative_idx,
        )
        drawn = run.start * cfg.gradient_accumulation_steps
        sampler.load_state_dict(compute_sampler_state(drawn, len(sampler), cfg.batch_size, run.ranks.count))
    # A generator of its own: a loader draws a seed at every epoch, and from the global generator that draw would make
    # a resumed run differ from an uninterrupted one.
    generator = torch.Generator()
    order: dict[str, Any] = {"batch_size": cfg.batch_size, "sampler": sampler}
    if sampler is not None and run.ranks.count > 1:
        # Together the processes take what one with their batches in a row would take.
        order = {"batch_sampler": run.ranks.shares(sampler, cfg.batch_size)}
    loader = DataLoader(
        kept,
        **order,
        num_workers=workers,
        generator=generator,
        collate_fn=lerobot_collate_fn if dataset.meta.has_language_columns else None,
        pin_memory=torch.device(str(cfg.policy.device if cfg.policy else "cpu")).type == "cuda",
        prefetch_factor=cfg.prefetch_factor if workers else None,
        persistent_workers=cfg.persistent_workers and workers > 0,
        multiprocessing_context=cfg.dataloader_multiprocessing_context if workers else None,
    )
    epoch = sampler.state_dict()["epoch"] if sampler is not None else 0
    while True:
        # Of the process too: the workers' augmentations shall not be the same everywhere.
        entropy = np.random.SeedSequence([seed, epoch, run.ranks.rank])
        generator.manual_seed(int(entropy.generate_state(1)[0]))
        for batch in loader:
            yield _as_floats(batch, dataset)
        epoch += 1


def _processed(run: Run, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of a step, through the preprocessor."""
    return [run.preprocessor(next(batches)) for _ in range(run.cfg.gradient_accumulation_steps)]


def _as_floats(batch: dict[str, Any], dataset: LeRobotDataset) -> dict[str, Any]:
    for key in dataset.meta.camera_keys:
        if key in batch and batch[key].dtype == torch.uint8:
            batch[key] = batch[key].to(torch.float32) / 255.0
    return batch


def save_run(run: Run, step: int) -> Path:
    """Save a checkpoint, push it where the run asks for that, and return its folder; all processes call it."""
    cfg, parts, term, ranks = run.cfg, run.parts, run.term, run.ranks
    assert cfg.policy is not None and cfg.output_dir is not None
    folder = get_step_checkpoint_dir(cfg.output_dir, cfg.steps, step)
    gathered = full_state(parts.policy, parts.optimizer) if ranks.sharded else None
    if ranks.is_main:
        checkpoint.save(
            cfg,
            step,
            ranks.unwrap(parts.policy),
            parts.optimizer,
            parts.scheduler,
            (run.preprocessor, run.postprocessor),
            anchor_positions=term.positions if term is not None else (),
            cache_digests=term.digests if term is not None else (),
            dataset=run.data,
            processes=ranks.count,
            gathered=gathered,
        )
        say(f"Checkpoint: {folder}")
        if cfg.save_checkpoint_to_hub:
            push_checkpoint_to_hub(folder, cfg.policy.repo_id, private=cfg.policy.private)
    ranks.wait()
    return folder


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Leave the global generators as they were: evaluation must not change what is trained."""
    before = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


@torch.no_grad()
def _report_eval_loss(run: Run, step: int, precision: Any, wandb: WandBLogger | None) -> None:
    """Mean loss on the held-out episodes, as LeRobot's ``--eval_steps`` defines it."""
    cfg, dataset = run.cfg, run.eval_dataset
    assert dataset is not None
    kept: Any = in_memory(dataset)
    if cfg.max_eval_samples > 0:
        tasks = dataset.hf_dataset.data.column("task_index").to_numpy()
        unique = np.unique(tasks)
        share = max(1, cfg.max_eval_samples // len(unique))
        chosen = np.concatenate([np.flatnonzero(tasks == task)[:share] for task in unique])
        kept = torch.utils.data.Subset(kept, chosen.tolist())
    collate = lerobot_collate_fn if dataset.meta.has_language_columns else None
    loader = DataLoader(kept, batch_size=cfg.batch_size, collate_fn=collate)
    policy = run.ranks.unwrap(run.parts.policy)
    policy.eval()
    losses = []
    for batch in loader:
        with precision:
            loss, _ = policy(run.preprocessor(_as_floats(batch, dataset)))
        losses.append(loss.double())
    mean = torch.stack(losses).mean().item()
    say(f"Step {step}/{cfg.steps} eval_loss={mean:.4f}")
    if wandb is not None:
        wandb.log_dict({"eval_loss": mean}, step=step, mode="eval")


def _evaluate_in_env(run: Run, step: int, precision: Any, wandb: WandBLogger | None) -> None:
    """Closed-loop evaluation in ``--env``, with LeRobot's ``eval_policy_all``."""
    # Imported where it is used: the environments' packages take long to import, and most runs have none.
    from lerobot.envs import close_envs, make_env, make_env_pre_post_processors
    from lerobot.scripts.lerobot_eval import eval_policy_all

    cfg = run.cfg
    assert cfg.env is not None and cfg.output_dir is not None
    env_preprocessor, env_postprocessor = make_env_pre_post_processors(env_cfg=cfg.env, policy_cfg=cfg.policy)
    envs = make_env(cfg.env, n_envs=cfg.eval.batch_size, use_async_envs=cfg.eval.use_async_envs)
    policy = run.ranks.unwrap(run.parts.policy)
    policy.eval()
    try:
        with torch.no_grad(), precision:
            info = eval_policy_all(
                envs=envs,
                policy=policy,
                env_preprocessor=env_preprocessor,
                env_postprocessor=env_postprocessor,
                preprocessor=run.preprocessor,
                postprocessor=run.postprocessor,
                n_episodes=cfg.eval.n_episodes,
                videos_dir=cfg.output_dir / "eval" / f"videos_step_{get_step_identifier(step, cfg.steps)}",
                max_episodes_rendered=4,
                start_seed=cfg.seed,
                max_parallel_tasks=cfg.env.max_parallel_tasks,
            )
    finally:
        close_envs(envs)
    overall = info["overall"]
    values = {key: overall[key] for key in ("pc_success", "avg_sum_reward", "eval_s")}
    say(f"Step {step}/{cfg.steps} " + " | ".join(f"{key}={value:.3f}" for key, value in values.items()))
    if wandb is not None:
        wandb.log_dict(values, step, mode="eval")


def _push(run: Run) -> None:
    """Push the trained policy to the hub where the run asks for it, as LeRobot's trainer does."""
    cfg = run.cfg
    if cfg.policy is None or not cfg.policy.push_to_hub or cfg.dry_run or not run.ranks.is_main:
        return
    policy: Any = run.ranks.unwrap(run.parts.policy)
    policy.push_model_to_hub(cfg, peft_model=policy if cfg.policy.use_peft else None, dataset_meta=run.dataset.meta)
    run.preprocessor.push_to_hub(cfg.policy.repo_id)
    run.postprocessor.push_to_hub(cfg.policy.repo_id)
