"""The quickstart's figures: old skills there before, lost by plain fine-tuning, kept by the method.

The full run takes a quarter of an hour on two cores: ``pytest -m slow tests/quickstart``. The same check on made-up
results runs always.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from craft_opt.bridge import cli

OLD = ("drawer-close", "button-press")
NEW = ("window-close",)

Scores = dict[str, float]


def quickstart(output: Path, mode: str, *flags: str) -> dict[str, Any]:
    """Run the command that users type, and return its result file."""
    assert cli.main(["--retention-mode", mode, f"--output_dir={output}", *flags]) == 0
    (folder,) = output.glob(f"{mode}-seed*-001")
    return json.loads((folder / "result.json").read_text())


def successes(result: dict[str, Any], when: str) -> Scores:
    return {score["skill"]: score["successes"] / score["rollouts"] for score in result[when]}


def assert_figures(hidden: dict[str, Any], none: dict[str, Any]) -> None:
    """The figures that the project promises, for one seed."""
    before = successes(hidden, "before")
    assert successes(none, "before") == before, "one teacher for both"
    naive, kept = successes(none, "after"), successes(hidden, "after")
    for skill in OLD:
        assert before[skill] >= 0.9, f"the teacher does {skill}"
    for skill in NEW:
        assert before[skill] <= 0.1, f"the teacher cannot do {skill}"
        assert kept[skill] >= 0.9, f"the method learns {skill}"
    assert old_mean(naive) <= 0.5 * old_mean(before), "plain fine-tuning forgets"
    assert old_mean(kept) >= 0.9 * old_mean(before), "the method keeps"


def old_mean(scores: Scores) -> float:
    return sum(scores[skill] for skill in OLD) / len(OLD)


def result(before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    return {
        when: [
            {"skill": skill, "successes": count, "rollouts": 20, "action_ce": 1.0}
            for skill, count in zip(OLD + NEW, counts, strict=True)
        ]
        for when, counts in (("before", before), ("after", after))
    }


TEACHER = (19, 20, 0)


def test_figures_that_are_reached_pass():
    assert_figures(result(TEACHER, (18, 18, 18)), result(TEACHER, (9, 10, 20)))


@pytest.mark.parametrize(
    ("hidden", "none", "why"),
    [
        (result((17, 20, 0), (20, 20, 20)), result((17, 20, 0), (0, 0, 20)), "the teacher does drawer-close"),
        (result((19, 20, 3), (20, 20, 20)), result((19, 20, 3), (0, 0, 20)), "the teacher cannot do window-close"),
        (result(TEACHER, (19, 20, 17)), result(TEACHER, (0, 0, 20)), "the method learns window-close"),
        (result(TEACHER, (19, 20, 20)), result(TEACHER, (10, 10, 20)), "plain fine-tuning forgets"),
        (result(TEACHER, (17, 17, 20)), result(TEACHER, (0, 0, 20)), "the method keeps"),
        (result(TEACHER, (19, 20, 20)), result((20, 20, 0), (0, 0, 20)), "one teacher for both"),
    ],
)
def test_figures_that_are_missed_fail(hidden, none, why):
    with pytest.raises(AssertionError, match=why):
        assert_figures(hidden, none)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_reaches_its_figures(tmp_path):
    hidden, none = (quickstart(tmp_path, mode) for mode in ("hidden", "none"))
    assert_figures(hidden, none)
    assert hidden["peak_memory_gib"] < 4
