"""``python -m tests.faults``: inject every fault, count what became of it, write it down.

``--only kill,nan`` takes some parts, ``--scale 0.2`` fewer points of each, ``--list`` names the parts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import commit, write_document
from tests.faults.campaign import Campaign
from tests.faults.judge import OUTCOMES, SILENT, UNCLEAR
from tests.faults.lab import Lab
from tests.faults.soak import soak
from tests.faults.world import World


def main(argv: list[str] | None = None) -> int:
    """Run the campaign.

    Returns:
        0, or 1 where an outcome was silently wrong or unclear, or a long run grew.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the points of every part")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--results", type=Path, help="folder of the results file; none without it")
    parser.add_argument("--merge", type=Path, help="a results file whose other kinds are taken over")
    parser.add_argument("--keep", type=Path, help="folder to work in and to leave; a temporary one without it")
    arguments = parser.parse_args(argv)
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="craft-faults-"))
    # Before the program is loaded: what others commit while it runs is not what it runs.
    about = {"commit": commit(), "date": datetime.date.today().isoformat()}
    began = time.monotonic()
    lab = Lab(root / "lab")
    try:
        campaign = Campaign(World(root, lab), lab, arguments.scale)
        long_run: dict = {}
        parts = dict(campaign.kinds()) | {"soak": lambda: long_run.update(soak(campaign.world, lab))}
        if arguments.list:
            print("\n".join(parts))
            return 0
        wanted = arguments.only.split(",") if arguments.only else list(parts)
        for name in wanted:
            parts[name]()
    finally:
        lab.close()
        if arguments.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - began
    print("\n".join(["", *campaign.table(), ""]))
    for name, seen in campaign.points.items():
        print(f"{name}: {seen['calls']} calls that change a file, {seen['faults']} faults at them")
    print(f"{len(campaign.outcomes)} faults in {seconds / 60:.1f} minutes")
    bad = [o for o in campaign.outcomes if o.outcome in (SILENT, UNCLEAR)]
    for outcome in bad:
        print(f"{outcome.outcome}: {outcome.kind} | {outcome.name} | {outcome.detail}")
    flat = all(process["flat"] for process in long_run.get("processes", ())) and not long_run.get("different")
    for process in long_run.get("processes", ()):
        print(
            f"soak, {process['run']}, steps {process['steps']}: {process['bytes_a_step']:.0f} bytes a step, handles "
            f"{process['handles']}, threads {process['threads']}, {'flat' if process['flat'] else 'GROWS'}"
        )
    if long_run:
        print(
            f"soak: {long_run['steps']} steps, in parts as in one go; different: {long_run['different'] or 'nothing'}"
        )
    if arguments.results is not None:
        counts: dict[str, dict] = {}
        for o in campaign.outcomes:
            of_kind = counts.setdefault(o.kind, dict(about))
            of_kind[o.outcome] = of_kind.get(o.outcome, 0) + 1
        before = json.loads(arguments.merge.read_text()) if arguments.merge is not None else {}
        by_kind = before.get("by_kind", {}) | counts
        totals = {name: sum(of_kind.get(name, 0) for of_kind in by_kind.values()) for name in OUTCOMES}
        options = [part for part in (argv if argv is not None else sys.argv[1:]) if "/" not in part]
        options = [part for part in options if part not in ("--results", "--merge", "--keep")]
        runs = [*before.get("runs", []), {"options": options, "minutes": round(seconds / 60, 1), **about}]
        file, _ = write_document(
            arguments.results,
            "faults",
            "python -m tests.faults",
            faults=sum(totals.values()),
            totals=totals,
            by_kind=by_kind,
            points=before.get("points", {}) | campaign.points,
            soak=long_run or before.get("soak", {}),
            runs=runs,
        )
        print(file)
    return int(bool(bad) or not flat)


if __name__ == "__main__":
    sys.exit(main())
