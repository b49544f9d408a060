"""The quickstart's table and its picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from craft_opt.bridge.quickstart.measure import SkillScore

# Okabe and Ito's colours: told apart by readers who do not see red and green.
_TASK, _RETENTION, _LAMBDA, _CONFLICT = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def table(before: Sequence[SkillScore], after: Sequence[SkillScore], old: int) -> str:
    """Return the table: a row a skill, success and cross-entropy before and after.

    Args:
        before: Scores of the teacher.
        after: Scores of the fine-tuned policy, same order.
        old: How many of the skills, from the first on, are old.
    """
    head = ("", "skill", "success before", "success after", "action CE before", "action CE after")
    rows = []
    for i, (first, last) in enumerate(zip(before, after, strict=True)):
        rows.append(
            (
                "old" if i < old else "new",
                first.skill,
                f"{first.success:.2f} ({first.successes}/{first.rollouts})",
                f"{last.success:.2f} ({last.successes}/{last.rollouts})",
                f"{first.action_ce:.2f}",
                f"{last.action_ce:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    rule = "-+-".join("-" * width for width in widths)
    return "\n".join((line(head), rule, *map(line, rows)))


def picture(
    file: Path, metrics_file: Path, before: Sequence[SkillScore], after: Sequence[SkillScore], old: int, title: str
) -> None:
    """Draw losses, λ against ε, cosine with conflicts, and success before and after.

    Args:
        file: The PNG to write.
        metrics_file: One JSON object a step.
        before: Scores of the teacher.
        after: Scores of the fine-tuned policy.
        old: How many of the skills are old.
        title: What was run.
    """
    steps = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    measured = [step for step in steps if step.get("retention_loss") is not None and step.get("cos") is not None]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    _draw_losses(axes[0, 0], steps, measured)
    _draw_dual(axes[0, 1], measured)
    _draw_cosine(axes[1, 0], measured)
    _draw_success(axes[1, 1], before, after, old)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _column(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in steps]


def _draw_losses(axis: Axes, steps: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> None:
    finite = [step for step in steps if step["loss"] is not None]
    axis.plot(_column(finite, "step"), _column(finite, "loss"), color=_TASK, lw=1, label="task loss")
    if measured:
        axis.plot(
            _column(measured, "step"),
            _column(measured, "retention_loss"),
            color=_RETENTION,
            lw=1,
            label="retention loss",
        )
    axis.set(title="Losses", xlabel="step", yscale="log")
    axis.legend()


def _draw_dual(axis: Axes, measured: Sequence[dict[str, Any]]) -> None:
    axis.set(title="Multiplier λ; drift L_ret against its bound ε", xlabel="step")
    if not measured:
        _empty(axis)
        return
    steps = _column(measured, "step")
    lam = _column(measured, "lambda")
    axis.plot(steps, lam, color=_LAMBDA, label="λ (left)")
    axis.set_ylim(0, 1.1 * max(lam) or 1.0)  # a λ that hardly moves would otherwise lie on the frame
    right = axis.twinx()
    right.plot(steps, _column(measured, "retention_loss"), color=_RETENTION, lw=1, label="L_ret (right)")
    right.plot(steps, _column(measured, "epsilon"), color="black", ls="--", lw=1, label="ε (right)")
    right.set_ylim(bottom=0)
    handles = [*axis.get_lines(), *right.get_lines()]
    axis.legend(handles, [str(handle.get_label()) for handle in handles])


def _draw_cosine(axis: Axes, measured: Sequence[dict[str, Any]]) -> None:
    axis.set(title="Cosine of task and retention gradient", xlabel="step")
    if not measured:
        _empty(axis)
        return
    axis.axhline(0, color="0.8", lw=1)
    axis.plot(_column(measured, "step"), _column(measured, "cos"), color=_TASK, lw=0.8, label="cosine")
    conflicts = [step for step in measured if step["conflict"]]
    axis.plot(
        _column(conflicts, "step"), _column(conflicts, "cos"), ".", color=_CONFLICT,
        label=f"projected ({len(conflicts)} of {len(measured)})",
    )  # fmt: skip
    axis.legend()


def _draw_success(axis: Axes, before: Sequence[SkillScore], after: Sequence[SkillScore], old: int) -> None:
    places = list(range(len(before)))
    for offset, scores, colour, label in ((-0.2, before, "0.7", "before"), (0.2, after, _LAMBDA, "after")):
        bars = axis.bar([x + offset for x in places], [s.success for s in scores], 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%.2f")
    names = [f"{s.skill}\n({'old' if i < old else 'new'})" for i, s in enumerate(before)]
    axis.set(title=f"Success in closed loop ({before[0].rollouts} episodes each)", ylim=(0, 1.3))
    axis.set_xticks(places, names)
    axis.legend(loc="upper center", ncols=2)


def _empty(axis: Axes) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, "no retention in this run", ha="center", va="center", transform=axis.transAxes)
