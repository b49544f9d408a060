"""Tuning with equal effort: as many settings for every method, on other seeds than are reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.report.cell import Cell
from craft_opt.bridge.report.matrix import cells_of, run_matrix
from craft_opt.bridge.report.methods import method_named
from craft_opt.bridge.report.results import Group, is_new, is_old

# Seeds from here on are for tuning; the report's lie below, so that nothing reported was chosen on its own rollouts.
FIRST_TUNING_SEED = 1000
TUNING_FILE = "tuning.json"


def trial_cells(
    suite: str, methods: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], tries: int, **shared: Any
) -> list[Cell]:
    """Cells of every setting that is tried.

    Args:
        suite: Name of the suite.
        methods: Names of the methods.
        budgets: Anchors of each old skill.
        seeds: Seeds, at least :data:`FIRST_TUNING_SEED`.
        tries: Settings of each method.
        **shared: ``sizes`` and ``curve`` of the cells.

    Raises:
        ValueError: A seed is one that may be reported, or a method has fewer settings than are to be tried.
    """
    if wrong := [seed for seed in seeds if seed < FIRST_TUNING_SEED]:
        raise ValueError(
            f"seeds {wrong} are kept for what is reported; tune on seeds from {FIRST_TUNING_SEED} on, such as --seeds "
            f"{FIRST_TUNING_SEED}"
        )
    found = []
    for name in methods:
        knobs = method_named(name).knobs
        if len(knobs) < tries:
            raise ValueError(
                f"{name} has {len(knobs)} settings to try, and {tries} are asked for; pass --tries {len(knobs)}"
            )
        for settings in knobs[:tries]:
            found += cells_of(suite, [name], budgets, seeds, settings=_always(settings), **shared)
    return found


def _always(settings: Mapping[str, Any]) -> Callable[[str, int], Mapping[str, Any]]:
    return lambda method, budget: settings


def score(group: Group) -> float:
    """What the tuning maximises: the mean of old and of new success at the end, so that neither can pay for the other.

    ``½ (old + new)``, each the share of its rollouts that succeeded.
    """
    return mean(hits / rollouts for hits, rollouts in (group.counts(is_old), group.counts(is_new)))


def tune(
    output: Path, cells: Sequence[Cell], jobs: int, tries: int, command: str, *, show: bool = True
) -> dict[str, Any]:
    """Run the trials and write what was tried and chosen into ``tuning.json``, beside what it holds of other methods.

    Of equal scores the setting with the lower cross-entropy of the action tokens is chosen, then the earlier one.

    Args:
        output: Folder of the benchmark.
        cells: The trials.
        jobs: Processes side by side.
        tries: Settings of each method.
        command: What was typed.
        show: Whether to show the progress.

    Returns:
        The file's content.

    Raises:
        ValueError: The file's other methods were tuned with another effort.
    """
    seeds, rollouts = sorted({cell.seed for cell in cells}), _rollouts(cells)
    known = read_tuning(output / TUNING_FILE)
    effort = {"seeds": seeds, "rollouts": rollouts, "tries": tries}
    if known and (before := {name: known[name] for name in effort}) != effort:
        raise ValueError(
            f"{output / TUNING_FILE} holds a tuning with {before}, and this one is {effort}; methods are compared with "
            f"equal effort only: tune all with the same, or take another --output"
        )
    results = run_matrix(output, cells, jobs, show=show)
    by_trial: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        cell = result["cell"]
        key = json.dumps([cell["suite"], cell["method"], cell["budget"], cell["settings"]])
        by_trial.setdefault(key, []).append(result)
    trials: list[dict[str, Any]] = []
    for key, members in by_trial.items():
        suite, method, budget, settings = json.loads(key)
        group = Group(tuple(members))
        trials.append(
            {
                "suite": suite,
                "method": method,
                "budget": budget,
                "settings": settings,
                "score": score(group),
                "old": group.counts(is_old),
                "new": group.counts(is_new),
                "action_ce": group.mean_score("action_ce", lambda stage: True),
            }
        )
    chosen: dict[tuple[str, str, int], dict[str, Any]] = {}
    for trial in trials:
        key3 = _key(trial)
        best = chosen.get(key3)
        if best is None or (trial["score"], -trial["action_ce"]) > (best["score"], -best["action_ce"]):
            chosen[key3] = trial
    kept = [entry for entry in known.get("trials", ()) if _key(entry) not in chosen]
    kept_chosen = [entry for entry in known.get("chosen", ()) if _key(entry) not in chosen]
    document = {
        **effort,
        "commands": [*dict.fromkeys([*known.get("commands", ()), command])],
        "trials": kept + trials,
        "chosen": kept_chosen + list(chosen.values()),
    }
    write_atomically(output / TUNING_FILE, json.dumps(document, indent=1))
    return document


def read_tuning(file: Path) -> dict[str, Any]:
    """What the tuning recorded, empty where there is no file."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def chosen_settings(
    tuning: Mapping[str, Any], suite: str, tuned_on: tuple[str, int] | None = None
) -> Callable[[str, int], Mapping[str, Any]]:
    """Method and budget → the settings that the tuning chose; the defaults where it tried none.

    Args:
        tuning: What the tuning recorded.
        suite: The suite that is run.
        tuned_on: Take, whatever is run, what was chosen on this suite with this budget. Then a method that was not
            tuned there is a ``ValueError``, raised by the function returned.
    """
    found = {_key(entry): entry["settings"] for entry in tuning.get("chosen", ())}
    if tuned_on is None:
        return lambda method, budget: found.get((suite, method, budget), {})
    other, with_budget = tuned_on

    def settings(method: str, budget: int) -> Mapping[str, Any]:
        key = (other, method, with_budget if budget else 0)
        if key not in found:
            raise ValueError(
                f"{method} was not tuned on suite {other} with {with_budget} anchors; tune it there first: "
                f"craft-report tune --suite {other} --methods {method} --budgets {with_budget}"
            )
        return found[key]

    return settings


def _key(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return (entry["suite"], entry["method"], entry["budget"])


def _rollouts(cells: Sequence[Cell]) -> int:
    return int(cells[0].sizes["rollouts"])
