"""Pictures of the report: the matrix of success, bars with intervals, and success against storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from craft_opt.bridge.report.metrics import wilson
from craft_opt.bridge.report.results import Group, at_budget, budgets_of, is_new, is_old

# Okabe and Ito's colours: told apart by readers who do not see red and green.
_OLD, _NEW = "#0072B2", "#E69F00"
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^Dv<>P*X"
_DPI = 110
_COLUMNS = 4


def success_bars(file: Path, groups: Sequence[Group], title: str) -> None:
    """Draw old and new success at the end with Wilson's intervals, a panel for each budget."""
    budgets = budgets_of(groups)
    rows = max(len(at_budget(groups, budget)) for budget in budgets)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(1.5 + 5 * len(budgets), 1.3 + 0.42 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axis, budget in zip(axes[0], budgets, strict=True):
        shown = at_budget(groups, budget)
        places = np.arange(len(shown))
        for offset, wanted, colour, label in ((-0.2, is_old, _OLD, "old skills"), (0.2, is_new, _NEW, "new skills")):
            counts = [group.counts(wanted) for group in shown]
            rates = np.array([hits / rollouts for hits, rollouts in counts])
            ends = np.array([wilson(*count) for count in counts])
            errors = np.clip(np.abs(ends.T - rates), 0, None)
            axis.barh(places + offset, rates, 0.38, color=colour, label=label)
            axis.errorbar(rates, places + offset, xerr=errors, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
        before, rollouts = shown[0].counts(is_old, stage=0)
        axis.axvline(before / rollouts, color=_OLD, ls="--", lw=1, label="old skills before")
        axis.set_yticks(places, [group.method for group in shown])
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.set(xlim=(0, 1.02), xlabel="success", title=f"{budget} anchors a skill" if budget else "")
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    _save(file)


def success_matrices(file: Path, groups: Sequence[Group], title: str) -> None:
    """Draw R of every method and budget, mean over the seeds; a line under the stage that taught a skill."""
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    stages, skills = groups[0].success.shape[1:]
    width, height = 0.9 + 0.62 * skills, 0.75 + 0.42 * stages
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width + 1.4, rows * height + 1.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for number, axis in enumerate(axes.flat):
        if number >= len(groups):
            axis.set_axis_off()
            continue
        _matrix(axis, groups[number], first_column=number % columns == 0, last=number // columns == rows - 1)
    picture = plt.cm.ScalarMappable(cmap="viridis", norm=plt.Normalize(0, 1))
    figure.colorbar(picture, ax=axes, shrink=0.6, label="success", aspect=30)
    _save(file)


def _matrix(axis: Axes, group: Group, *, first_column: bool, last: bool) -> None:
    success = group.success.mean(axis=0)
    stages, skills = success.shape
    axis.imshow(success, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (stage, skill), value in np.ndenumerate(success):
        colour = "black" if value > 0.6 else "white"
        axis.text(skill, stage, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    for skill, stage in enumerate(group.learned):
        axis.plot([skill - 0.5, skill + 0.5], [stage + 0.5] * 2, color="#D55E00", lw=2.5, clip_on=False)
    axis.set_title(group.label, fontsize=9)
    axis.set_xticks(range(skills), group.skills if last else [], rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(stages), [_stage_name(stage) for stage in range(stages)] if first_column else [], fontsize=8)
    axis.tick_params(length=0)


def _stage_name(stage: int) -> str:
    return f"after stage {stage}" if stage else "before"


def success_by_storage(file: Path, groups: Sequence[Group], title: str) -> None:
    """Draw success on old skills at the end against the bytes that a method stores."""
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    names = list(dict.fromkeys(group.method for group in groups))
    for number, name in enumerate(names):
        points = sorted((g for g in groups if g.method == name), key=lambda g: g.stored_bytes)
        rates = [hits / rollouts for hits, rollouts in (g.counts(is_old) for g in points)]
        axis.plot(
            [max(g.stored_bytes, 1) / 1e6 for g in points],
            rates,
            marker=_MARKERS[number % len(_MARKERS)],
            color=_PALETTE[number % len(_PALETTE)],
            lw=1,
            label=name,
        )
    axis.set_xscale("symlog", linthresh=0.1)
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set(title=title, xlabel="stored beside the policy, MB", ylabel="success on old skills at the end")
    axis.set(ylim=(-0.03, 1.03), xlim=(-0.01, None))
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(file)


def _save(file: Path) -> None:
    plt.savefig(file, dpi=_DPI)
    plt.close()
