"""The measuring commands: every variant is a run that can start, and a table says what the cells say."""

import json
from pathlib import Path

import pytest

from benchmarks import quickstart, retention_cost
from benchmarks.quickstart import VARIANTS, Job
from craft_opt.bridge.quickstart.settings import QuickstartSettings
from craft_opt.retention import POOLINGS

SIZES = {"settings": quickstart.TABLE_SETTINGS, "craft": quickstart.TABLE_CRAFT}


def test_the_variants_cover_modes_poolings_off_steps_and_statistics(tmp_path):
    made = {name: next(Job(tmp_path, 0, (name,), **SIZES).quickstarts()) for name in VARIANTS}
    assert {q.mode for q in made.values()} == {"none", "hidden", "token_ce"}
    assert {q.settings.pooling for q in made.values() if q.mode == "hidden"} == set(POOLINGS)
    assert {q.craft.token_loss for q in made.values() if q.mode == "token_ce"} == {"kl", "ce"}
    off = {(q.craft.retention_freq, q.craft.off_steps, q.craft.reuse_decay) for q in made.values() if q.craft.enabled}
    assert off == {(1, "skip", 1.0), (5, "skip", 1.0), (5, "reuse", 1.0), (5, "reuse", 0.8)}
    assert {q.mode for q in made.values() if q.settings.normalization_stats == "dataset"} == {
        "none",
        "hidden",
        "token_ce",
    }
    assert all(q.craft.enabled == (q.mode != "none") for q in made.values())
    # Cells of one output folder differ in what they are, so that none is taken for another.
    assert len({(q.name, q._text) for q in made.values()}) == len(VARIANTS)
    for q in made.values():
        assert q.settings.steps == 400
        assert q.craft.anchor_batch_size == QuickstartSettings().batch_size // 2


def test_a_finished_cell_is_taken_as_it_is(tmp_path, monkeypatch):
    job = Job(tmp_path, 3, ("token_ce-kl",), **SIZES)
    (first,) = job.quickstarts()
    assert first.finished() is None
    folder = first._run_folder()
    assert folder.name == "token_ce-kl-seed3-001"
    (folder / "training").mkdir()
    steps = [{"step": 1, "retention_loss": 0.0, "lambda": 1.0, "epsilon": 0.05}, {"step": 2}]
    (folder / "training" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "result.json").write_text(json.dumps({"mode": "token_ce", "seed": 3, "seconds": {}}))
    monkeypatch.setattr(type(first), "run", lambda self: pytest.fail("a finished cell was run again"))
    cell = quickstart.run(job)
    assert (cell["variant"], cell["seed"]) == ("token_ce-kl", 3)
    assert cell["last"] == {"retention_loss": 0.0, "lambda": 1.0, "epsilon": 0.05}
    # Other sizes are another cell.
    longer = {**SIZES, "settings": {"steps": 500}}
    assert next(Job(tmp_path, 3, ("token_ce-kl",), **longer).quickstarts()).finished() is None


def cell(variant, seed, old, new, last=None):
    def scores(hits):
        skills = ("drawer-close", "button-press", "window-close")
        return [
            {"skill": skill, "successes": hit, "rollouts": 20, "action_ce": 0.5}
            for skill, hit in zip(skills, hits, strict=True)
        ]

    found = {"variant": variant, "mode": variant, "seed": seed, "seconds": {"Fine-tuning on window-close": 30.0}}
    return {**found, "before": scores((20, 18, 0)), "after": scores((*old, new)), "last": last or {}}


def test_the_table_counts_old_and_new_skills_over_the_seeds():
    cells = [
        cell("none", 0, (0, 4), 20),
        cell("none", 1, (0, 0), 18),
        cell("hidden", 0, (20, 19), 20, {"retention_loss": 0.02, "lambda": 0.5, "epsilon": 0.02}),
        cell("hidden", 1, (18, 19), 19, {"retention_loss": 0.04, "lambda": 1.5, "epsilon": 0.02}),
    ]
    shown = quickstart.markdown({"cells": cells}).splitlines()
    assert shown[2].startswith("| none | 0.05 (4/80) | 0.02 to 0.12 | 0.05 ± 0.07 | 0.95 ± 0.07 | – | – | 30 |")
    assert shown[3].startswith(
        "| hidden | 0.95 (76/80) | 0.88 to 0.98 | 0.95 ± 0.04 | 0.97 ± 0.04 | 0.030 | 1.00 | 30 |"
    )
    assert "| hidden | window-close (new) | 0.00 | 0.97 (39/40) | 0.87 to 1.00 |" in "\n".join(shown)
    assert "| none | drawer-close (old) | 1.00 | 0.00 (0/40) |" in "\n".join(shown)


def test_the_published_figures_print(capsys):
    for file in sorted((Path(quickstart.__file__).parent / "results").glob("quickstart_*.json")):
        quickstart.main(["--print", str(file)])
        assert "| hidden | drawer-close (old) |" in capsys.readouterr().out


def test_the_cost_is_a_median_of_ratios_within_rounds():
    """A machine that is three times slower in one round is so for both."""
    rows = [
        {"variant": "naive", "seconds": [1.0, 3.0, 1.0], "peak": 10, "numel": 2**18},
        {"variant": "hidden K=1", "seconds": [1.5, 4.5, 1.6], "peak": 14, "numel": 2**18},
    ]
    naive, hidden = retention_cost.with_ratios(rows)
    assert (naive["ratio"], naive["target"], naive["extra_bytes"]) == (1.0, None, 0)
    assert hidden["ratio"] == 1.5
    assert (hidden["target"], hidden["extra_bytes"]) == (1.65, 4)
    shown = retention_cost.markdown({"rows": rows})
    assert "| hidden K=1 | 320 | 1.50 | 1.50 to 1.55 | ≤ 1.65 | 0.0 |" in shown
    assert "One fp32 gradient buffer is 1.0 MiB" in shown
