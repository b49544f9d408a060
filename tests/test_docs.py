"""What the documentation shows, runs: the examples in docstrings and the Python blocks of README.md."""

import doctest
import importlib
import re

import pytest
import torch

from tests.support.rooms import ROOT, module_name, source_files

MODULES = [module_name(p) for p in source_files() if p != "train.py" and not p.startswith("craft_opt/bridge/")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def readme_blocks():
    """(line, source) of every block marked python."""
    text = (ROOT / "README.md").read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


def examples(module):
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module, capsys):
    for test in examples(module):
        torch.manual_seed(0)
        failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=True)
        assert attempted > 0
        assert not failed, f"{test.name}: {capsys.readouterr().out}"


def test_the_public_names_have_examples():
    shown = {
        test.name
        for module in ("craft_opt.surgery", "craft_opt.dual", "craft_opt.retention")
        for test in examples(module)
    }
    shown |= {test.name for test in examples("craft_opt.optimizer._optimizer") + examples("craft_opt.config")}
    for name in (
        "craft_opt.optimizer._optimizer.CraftOptimizer",
        "craft_opt.config.CraftConfig",
        "craft_opt.surgery.compute_dot",
        "craft_opt.surgery.project_if_conflict",
        "craft_opt.surgery.merge_grads",
        "craft_opt.dual.epsilon_schedule",
        "craft_opt.dual.update_lambda",
        "craft_opt.retention.feature_loss",
    ):
        assert name in shown, f"{name} has no runnable example"


def test_readme_has_a_python_block():
    assert readme_blocks(), "README.md shows no ```python block"


@pytest.mark.parametrize(("line", "source"), [pytest.param(*b, id=f"line{b[0]}") for b in readme_blocks()])
def test_readme_blocks_run(line, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # Compiled with the README's own line numbers, so that a failure points into it.
    exec(compile("\n" * (line - 1) + source, str(ROOT / "README.md"), "exec"), {"__name__": "__readme__"})
