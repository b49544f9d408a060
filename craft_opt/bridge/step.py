"""One training step: anchors → L_ret → backward, L_task → backward, and the whole update in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from craft_opt import CraftOptimizer, StepMetrics
from craft_opt.bridge.processes import ALONE, Ranks


class RetentionTerm(Protocol):
    """Gives L_ret of the next anchors."""

    def loss(self, policy: nn.Module) -> Tensor:
        """L_ret, a scalar with a graph."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind; tensors stay on the device until a line is logged.

    Attributes:
        step: Number of the step, counted from 1.
        loss: Task loss, shape (); the mean over the micro-batches and processes.
        metrics: The optimizer's metrics.
        measured: Whether the step measured L_ret.
        lr: Learning rate that it used.
        data_s: Seconds spent on the task batch.
        update_s: Seconds of the update.
        retains: Whether the run has retention at all.
    """

    step: int
    loss: Tensor
    metrics: StepMetrics
    measured: bool
    lr: float
    data_s: float
    update_s: float
    retains: bool = True


@dataclass(frozen=True)
class Trained:
    """The parts that a step works on.

    Attributes:
        policy: The student, as the task's forward has to call it.
        optimizer: It owns λ, the clip and the clock.
        scheduler: Of the learning rate, if any.
        term: L_ret, None without retention.
        ranks: The processes of the run.
    """

    policy: nn.Module
    optimizer: CraftOptimizer
    scheduler: LRScheduler | None
    term: RetentionTerm | None
    ranks: Ranks = ALONE


def train_step(
    parts: Trained,
    batches: Sequence[Mapping[str, Any]],
    precision: AbstractContextManager[Any],
    *,
    step: int,
    data_s: float,
) -> StepResult:
    """Do one step on processed task batches.

    Args:
        parts: Policy, optimizer, scheduler and retention.
        batches: The micro-batches of this step, as the preprocessor gives them; their gradients are averaged.
        precision: A reusable autocast context for the forwards.
        step: Number of this step, counted from 1.
        data_s: Seconds that the batches took.
    """
    started = time.perf_counter()
    policy, optimizer, term, ranks = parts.policy, parts.optimizer, parts.term, parts.ranks
    student = ranks.unwrap(policy)
    policy.train()
    lr = float(optimizer.param_groups[0]["lr"])
    measured = term is not None and optimizer.retention_due
    if term is not None and measured:
        with precision:
            retention_loss = ranks.inside_forward(policy, lambda: term.loss(student))
        with optimizer.retention(retention_loss):
            retention_loss.backward()
    losses = []
    for number, batch in enumerate(batches, start=1):
        with ranks.quietly(policy, is_last=number == len(batches)):
            with precision:
                # The call, not .forward: wrappers (DDP, PEFT) act on the call.
                loss, _ = policy(batch)
            (loss / len(batches)).backward()
        losses.append(loss.detach().to(torch.float32))
    optimizer.step()
    optimizer.zero_grad()
    if parts.scheduler is not None:
        parts.scheduler.step()
    if callable(update := getattr(student, "update", None)):
        update()  # policies with running averages of their own, as in LeRobot's loop
    return StepResult(
        step=step,
        loss=ranks.mean(torch.stack(losses).mean()),
        metrics=optimizer.metrics(),
        measured=measured,
        retains=term is not None,
        lr=lr,
        data_s=data_s,
        update_s=time.perf_counter() - started,
    )
