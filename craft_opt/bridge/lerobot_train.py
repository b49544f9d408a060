"""LeRobot's own training loop with retention attached: ``python -m craft_opt.bridge.lerobot_train``.

``lerobot.scripts.lerobot_train.train`` runs as it is. It finds its parts under module names (``make_policy``,
``make_optimizer_and_scheduler``, ...); while it runs, these give what :func:`craft_opt.bridge.loop.prepare` built and
checked, so that the policy, the statistics, the caches and the checks are those of ``train.py``. Its optimizer's
``step()`` calls the retention loss by itself (``CraftOptimizer.attach_retention``). Three things differ from
``lerobot-train``: its clipping is off, since it sees the task gradient alone (``step()`` clips the merged one); its
checkpoints are CRaFT's, which carry λ, ε's clock and the order of anchors; and ``metrics.jsonl`` is written.

Against ``train.py``: no gradient accumulation and no decoding ahead into memory, but LeRobot's accelerate, logging and
evaluation.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.scripts import lerobot_train
from torch import Tensor

from craft_opt.bridge import checkpoint, cli, flags, shorten_codec_warning
from craft_opt.bridge.config import CraftTrainConfig, parse_config
from craft_opt.bridge.logs import METRICS_FILE, MetricsFile, StepRecord, say, set_up_logging
from craft_opt.bridge.loop import Journal, Run, TrainSummary, claimed, prepare, save_run
from craft_opt.bridge.policies import precision_context
from craft_opt.bridge.processes import world_size
from craft_opt.bridge.run_guard import describe, exit_code, sigterm_as_interrupt
from craft_opt.bridge.step import StepResult

_USER_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, NotImplementedError, *flags.PARSER_ERRORS)
_SHOWN = ("retention_loss", "lambda", "epsilon", "dot", "cos")
_ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def train(cfg: CraftTrainConfig, *, on_step: Callable[[StepRecord], None] | None = None) -> TrainSummary:
    """Check everything as ``train.py`` does, then let LeRobot's own loop train.

    Args:
        cfg: The configuration; validated here.
        on_step: Called with every step's numbers.

    Returns:
        Where the results are.

    Raises:
        ValueError: Something does not fit, or asks for what LeRobot's loop has not; nothing was trained.
        FileNotFoundError: A cache, dataset, policy or checkpoint is not there.
        FileExistsError: The output folder is there already.
    """
    _refuse_accumulation(cfg)
    if (count := world_size()) > 1:
        raise ValueError(
            f"LeRobot's own loop with retention runs in one process, and the launcher started {count}; several train "
            f"with accelerate launch train.py, which takes the same flags"
        )
    run = prepare(cfg)
    with claimed(run):
        return _train_attached(run, on_step)


def _train_attached(run: Run, on_step: Callable[[StepRecord], None] | None) -> TrainSummary:
    cfg = run.cfg
    assert cfg.output_dir is not None and cfg.policy is not None
    optimizer, term = run.parts.optimizer, run.term
    mode = cfg.craft.retention_mode if cfg.craft.enabled else "none"
    journal = Journal(MetricsFile(cfg.output_dir / METRICS_FILE, run.start), cfg.steps, mode, on_step, None)
    precision = precision_context(cfg.policy)

    def retention_loss() -> Tensor:
        assert term is not None
        with precision:
            return term.loss(run.parts.policy)

    say(f"Output directory: {cfg.output_dir}")
    started = time.perf_counter()
    optimizer.attach_retention(retention_loss if term is not None else None)
    try:
        with _lent_to_lerobot(run, journal):
            lerobot_train.train.__wrapped__(cfg)
    finally:
        optimizer.attach_retention(None)
        journal.flush(show=False)
    return TrainSummary(
        output_dir=cfg.output_dir,
        steps=cfg.steps,
        checkpoint=checkpoint.latest_checkpoint(cfg.output_dir) if cfg.save_checkpoint else None,
        metrics_file=cfg.output_dir / METRICS_FILE,
        skipped_steps=journal.skipped_steps,
        seconds=time.perf_counter() - started,
        last=journal.last,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m craft_opt.bridge.lerobot_train``: ``train.py``'s flags, LeRobot's loop.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit code: 0, 2 for a command that cannot be carried out, 130 after Ctrl-C, 143 after SIGTERM.
    """
    shorten_codec_warning()
    with sigterm_as_interrupt():
        return _run(sys.argv[1:] if argv is None else list(argv))


def _run(argv: list[str]) -> int:
    try:
        command = cli.read_command(argv)
        if command.kind == "help":
            return cli.show_help(command)
        if command.kind == "quickstart":
            raise cli.UsageError(
                "LeRobot's loop trains on your own data: --policy.path and --dataset.repo_id; the quickstart is in "
                "python train.py"
            )
        flags.check_names(command.flags)
        set_up_logging()
        summary = train(parse_config(cli.arguments_of(command)))
    except KeyboardInterrupt as interrupt:
        print(describe(interrupt), file=sys.stderr)
        return exit_code(interrupt)
    except SystemExit as stopped:  # LeRobot's parser, which has said why
        return cli.EXIT_USER_ERROR if stopped.code else 0
    except _USER_ERRORS as error:
        return cli.report_error(error)
    return cli.show_summary(summary)


def _refuse_accumulation(cfg: CraftTrainConfig) -> None:
    """LeRobot's loop steps after every batch; accelerate's setting would only divide its loss."""
    variable = os.environ.get(_ACCUMULATION_VARIABLE, "1")
    for name, count in (
        ("--gradient_accumulation_steps", cfg.gradient_accumulation_steps),
        (_ACCUMULATION_VARIABLE, variable),
    ):
        if str(count) != "1":
            raise ValueError(
                f"{name}={count}: LeRobot's own loop steps after every batch and has no gradient accumulation; "
                f"leave it at 1, or train with python train.py --gradient_accumulation_steps=<n>"
            )


@contextmanager
def _lent_to_lerobot(run: Run, journal: Journal) -> Iterator[None]:
    """Let LeRobot's loop find the run's parts where it looks for its own."""
    cfg, parts = run.cfg, run.parts
    digests = run.term.digests if run.term is not None else ()
    update_policy = lerobot_train.update_policy
    done = run.start
    shown: dict[str, float] = {}

    def update(tracker: Any, policy: Any, batch: Any, optimizer: Any, grad_clip_norm: float, **rest: Any) -> Any:
        nonlocal done
        done += 1
        measured = run.term is not None and parts.optimizer.retention_due
        lr = float(parts.optimizer.param_groups[0]["lr"])
        returned = update_policy(tracker, policy, batch, optimizer, 0.0, **rest)
        result = StepResult(
            step=done,
            loss=torch.tensor(tracker.loss.val, dtype=torch.float32),
            metrics=parts.optimizer.metrics(),
            measured=measured,
            retains=run.term is not None,
            lr=lr,
            data_s=tracker.dataloading_s.val,
            update_s=tracker.update_s.val,
        )
        # LeRobot's loop waits for the device at every step (loss.item()), so nothing is lost by reading now.
        journal.add(result)
        journal.flush(show=cfg.log_freq > 0 and done % cfg.log_freq == 0)
        assert journal.last is not None
        values = journal.last.as_dict()
        # LeRobot's own log line and wandb show these too; between two measurements the latest still holds.
        shown.update((name, values[name]) for name in _SHOWN if name in values)
        tracker.update_metrics(shown)
        return returned

    def restore(folder: Path, optimizer: Any, scheduler: Any, **_: Any) -> tuple[int, Any, Any]:
        # Once more, after prepare() did: LeRobot has seeded the generators since.
        start, _positions = checkpoint.restore(cfg, parts.optimizer, parts.scheduler, digests)
        return start, optimizer, scheduler

    def save(*, step: int, **_: Any) -> None:
        save_run(run, step)

    lent: dict[str, Any] = {
        "make_train_eval_datasets": lambda cfg: (run.dataset, run.eval_dataset),
        "make_policy": lambda **_: parts.policy,
        "make_pre_post_processors": lambda **_: (run.preprocessor, run.postprocessor),
        "make_optimizer_and_scheduler": lambda cfg, policy: (parts.optimizer, parts.scheduler),
        "load_training_state": restore,
        "save_checkpoint": save,
        "push_checkpoint_to_hub": lambda *_, **__: None,  # save_run has done it
        "update_policy": update,
    }
    own = {name: getattr(lerobot_train, name) for name in lent}
    # Validated in prepare(); once more would read the policy's configuration afresh and forget what loading filled in.
    cfg.__dict__["validate"] = lambda: None
    vars(lerobot_train).update(lent)
    try:
        yield
    finally:
        vars(lerobot_train).update(own)
        del cfg.__dict__["validate"]


if __name__ == "__main__":
    raise SystemExit(main())
