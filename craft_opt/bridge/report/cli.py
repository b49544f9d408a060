"""``craft-report``: run the benchmark, show it again from its results, tune its methods."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from craft_opt.bridge import shorten_codec_warning
from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.report.cell import STEPS, Cell
from craft_opt.bridge.report.matrix import CellsFailedError, cells_of, finished, read_matrix, remember, run_matrix
from craft_opt.bridge.report.methods import METHODS, SHORT_LIST
from craft_opt.bridge.report.provenance import usable_cores
from craft_opt.bridge.report.results import Result, csv_text, groups_of, jsonl
from craft_opt.bridge.report.suites import SUITES
from craft_opt.bridge.report.tuning import (
    FIRST_TUNING_SEED,
    TUNING_FILE,
    chosen_settings,
    read_tuning,
    trial_cells,
    tune,
)

PROGRAM = "craft-report"
DEFAULT_OUTPUT = Path("outputs/report")
# Fields of QuickstartSettings that the command line gives.
_SIZES = {
    "rollouts": (50, "closed-loop episodes of each skill, after every stage"),
    "steps": (STEPS, "steps of each stage"),
    "episodes": (None, "demonstrations of each skill"),
    "held-out-episodes": (None, "demonstrations of each skill that the errors are measured on"),
    "teacher-steps": (None, "steps of the pre-training"),
    "batch-size": (None, "samples a step"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, or 1 where something failed, or 2 where the arguments do not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    shorten_codec_warning()
    try:
        return int(options.action(options, shlex.join([PROGRAM, *arguments])))
    except CellsFailedError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="The retention benchmark; see docs/report.md.", allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True)
    run = actions.add_parser("run", allow_abbrev=False, help="run what is missing of a matrix, then write the report")
    _matrix_arguments(run, seeds=[0, 1, 2])
    run.add_argument(
        "--tuning", type=Path, help=f"what a tuning chose; the default is {TUNING_FILE} in the output folder"
    )
    run.add_argument(
        "--tuned-on",
        nargs=2,
        metavar=("SUITE", "BUDGET"),
        help="take what the tuning chose on this suite with this many anchors, whatever suite and budget are run",
    )
    run.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of every method, over what the tuning chose: for ablations, into an --output of their own",
    )
    run.set_defaults(action=_run)
    show = actions.add_parser("show", allow_abbrev=False, help="write tables and report again from the results")
    show.add_argument("output", type=Path, help="folder of a benchmark")
    show.set_defaults(action=_show)
    against = actions.add_parser(
        "compare", allow_abbrev=False, help="compare two methods, also with different budgets, such as of equal bytes"
    )
    against.add_argument("output", type=Path, help="folder of a benchmark")
    against.add_argument("--suite", required=True, choices=list(SUITES), help="sequence of skills")
    against.add_argument(
        "--methods",
        required=True,
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="method, or method,budget: hidden,20 replay,45",
    )
    against.set_defaults(action=_compare)
    tuning = actions.add_parser(
        "tune", allow_abbrev=False, help="choose each method's settings, with equal effort, on other seeds"
    )
    _matrix_arguments(tuning, seeds=[FIRST_TUNING_SEED])
    tuning.add_argument("--tries", type=int, default=4, help="settings of each method (default: 4)")
    tuning.set_defaults(action=_tune)
    listing = actions.add_parser("list", allow_abbrev=False, help="name the suites and methods")
    listing.set_defaults(action=_list)
    return parser


def _matrix_arguments(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    add = parser.add_argument
    add("--suite", required=True, choices=list(SUITES), help="sequence of skills")
    add("--methods", nargs="+", help="names of methods; the default is all on suite S, and a short list on the others")
    add("--seeds", type=int, nargs="+", default=seeds, help=f"default: {' '.join(map(str, seeds))}")
    add("--budgets", type=int, nargs="+", default=[20, 200], help="anchors of each old skill (default: 20 200)")
    add("--curve", type=int, default=1, help="measurements within a stage, for FWT and AUC (default: 1)")
    for name, (default, text) in _SIZES.items():
        add(f"--{name}", type=int, default=default, help=text + (f" (default: {default})" if default else ""))
    add("--jobs", type=int, help="cells side by side (default: the cores, or 1 with a GPU; 0: in this process)")
    add("--output", type=Path, default=DEFAULT_OUTPUT, help=f"folder of everything (default: {DEFAULT_OUTPUT})")


def _check(options: argparse.Namespace) -> None:
    names = options.methods or (list(METHODS) if options.suite == "S" else list(SHORT_LIST))
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    options.methods = list(dict.fromkeys(names))
    for name, lowest in (("budgets", 1), ("seeds", 0)):
        if wrong := [value for value in getattr(options, name) if value < lowest]:
            raise ValueError(f"--{name} must be at least {lowest}, got {wrong}")
    for name in ("rollouts", "steps", "curve", *(n.replace("-", "_") for n in _SIZES)):
        value, lowest = getattr(options, name), 0 if name == "curve" else 1
        if value is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if options.steps <= options.curve:
        raise ValueError(f"--curve {options.curve} measurements do not fit within --steps {options.steps}")
    if options.jobs is None:
        options.jobs = 1 if torch.cuda.is_available() else usable_cores()
    if options.jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {options.jobs}")


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _SIZES}
    return {name: value for name, value in given.items() if value is not None}


def _tuned_on(given: Sequence[str] | None) -> tuple[str, int] | None:
    if given is None:
        return None
    suite, budget = given
    if suite not in SUITES or not budget.isdecimal():
        raise ValueError(
            f"--tuned-on takes a suite ({', '.join(SUITES)}) and a number of anchors, got {suite} {budget}"
        )
    return suite, int(budget)


def _given_settings(given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` → settings, the values as JSON where they are and as text where not."""
    found = {}
    for entry in given:
        name, separator, text = entry.partition("=")
        if not (name and separator):
            raise ValueError(f"--set takes name=value, such as selection=coverage, got {entry!r}")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _run(options: argparse.Namespace, command: str) -> int:
    _check(options)
    if tuning_seeds := [seed for seed in options.seeds if seed >= FIRST_TUNING_SEED]:
        raise ValueError(f"seeds {tuning_seeds} are for tuning; report on seeds below {FIRST_TUNING_SEED}")
    if options.tuning is not None and not options.tuning.is_file():
        raise FileNotFoundError(f"{options.tuning} does not exist; make one with craft-report tune")
    tuning = read_tuning(options.tuning or options.output / TUNING_FILE)
    chosen, over = chosen_settings(tuning, options.suite, _tuned_on(options.tuned_on)), _given_settings(options.set)
    for name in options.methods:
        METHODS[name].with_settings(over)
    cells = cells_of(
        options.suite,
        options.methods,
        options.budgets,
        options.seeds,
        settings=lambda method, budget: {**chosen(method, budget), **over},
        sizes=_sizes(options),
        curve=options.curve,
    )
    remember(options.output, cells, command)
    try:
        run_matrix(options.output, cells, options.jobs)
    finally:
        # Also after Ctrl-C or a failure: what is finished can be read.
        _write(options.output, finished(options.output), tuning)
    return 0


def _show(options: argparse.Namespace, command: str) -> int:
    results = finished(options.output)
    if not results:
        raise ValueError(f"no cell of {options.output} is finished yet")
    _write(options.output, results, read_tuning(options.output / TUNING_FILE))
    return 0


def _compare(options: argparse.Namespace, command: str) -> int:
    from craft_opt.bridge.report.tables import differences

    groups = {
        group.label.replace(" ", ""): group
        for group in groups_of(finished(options.output))
        if group.suite == options.suite
    }
    if missing := [name for name in options.methods if name.replace(" ", "") not in groups]:
        raise ValueError(
            f"{options.output} has no finished cell of {', '.join(missing)} on suite {options.suite}; it has "
            f"{' '.join(groups) or 'none at all'}"
        )
    first, second = (groups[name.replace(" ", "")] for name in options.methods)
    print(differences(first, second))
    return 0


def _tune(options: argparse.Namespace, command: str) -> int:
    _check(options)
    shared = {"sizes": _sizes(options), "curve": options.curve}
    cells: list[Cell] = trial_cells(
        options.suite, options.methods, options.budgets, options.seeds, options.tries, **shared
    )
    document = tune(options.output, cells, options.jobs, options.tries, command)
    for entry in document["chosen"]:
        name = f"{entry['suite']} {entry['method']} b{entry['budget']}"
        print(f"{name}: {entry['settings'] or 'defaults'} ({entry['score']:.3f})")
    print(f"written to {options.output / TUNING_FILE}")
    return 0


def _list(options: argparse.Namespace, command: str) -> int:
    for suite in SUITES.values():
        stages = " → ".join(" + ".join(skill.name for skill in stage) for stage in suite.stages)
        print(f"{suite.name}: {suite.title}\n   {stages}")
    for method in METHODS.values():
        print(f"{method.name}: {method.what}")
    return 0


def _write(output: Path, results: Sequence[Result], tuning: dict[str, Any]) -> None:
    """Write tables, pictures and report, and print the table."""
    if not results:
        return
    # Here: matplotlib takes a second to import, and ``list`` needs none of it.
    from craft_opt.bridge.report.figures import success_bars, success_by_storage, success_matrices
    from craft_opt.bridge.report.html import report
    from craft_opt.bridge.report.tables import markdown

    write_atomically(output / "results.jsonl", jsonl(results))
    write_atomically(output / "results.csv", csv_text(results))
    groups = groups_of(results)
    pictures: dict[str, list[Path]] = {}
    for suite in dict.fromkeys(group.suite for group in groups):
        chosen = [group for group in groups if group.suite == suite]
        for draw, name, what in (
            (success_bars, "success", "success at the end, with 95 % intervals"),
            (success_matrices, "matrix", "success after every stage"),
            (success_by_storage, "storage", "what the old skills' success costs in storage"),
        ):
            file = output / f"{name}-{suite}.png"
            draw(file, chosen, f"Suite {suite}: {what}")
            pictures.setdefault(suite, []).append(file)
    write_atomically(output / "report.html", report(groups, pictures, read_matrix(output)["commands"], tuning))
    print(markdown(groups))
    print(f"\nreport: {output / 'report.html'}\ntables: {output / 'results.jsonl'}, {output / 'results.csv'}")
