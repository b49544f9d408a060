"""Nothing untrusted runs: no construct in the code that could run data, and no folder from a stranger that does."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "train.py", *sorted((ROOT / "craft_opt").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
# Modules whose loaders run what they read, and builtins that run text.
RUNNING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNING_BUILTINS = {"eval", "exec", "compile", "__import__"}


def findings(source: str) -> list[str]:
    """What in a module could run data: each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node, f"import {alias.name}") for alias in node.names if root(alias.name) in RUNNING_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [(node, f"from {node.module}")] if root(node.module or "") in RUNNING_MODULES else []
        elif isinstance(node, ast.Call):
            found += [(node, what) for what in _of_call(node)]
    return [f"line {node.lineno}: {what}" for node, what in found]


def root(name: str) -> str:
    return name.split(".")[0]


def _of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    found = [name] if name in RUNNING_BUILTINS else []
    if name.endswith("torch.load") and named.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if name in ("np.load", "numpy.load") and named.get("allow_pickle", "False") != "False":
        found.append("np.load with pickles")
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        found.append(name)
    # Anything but the literal False or a name that a flag filled in.
    if named.get("trust_remote_code") == "True":
        found.append("trust_remote_code=True")
    if name in ("subprocess.run", "subprocess.Popen", "subprocess.call", "os.system", "os.popen") and (
        named.get("shell") == "True" or name.startswith("os.")
    ):
        found.append(f"{name} through a shell")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "yaml.load(stream, Loader=yaml.Loader)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
    ],
)
def test_each_construct_is_found(source):
    assert len(findings(source)) == 1


def test_what_is_safe_is_not_found():
    safe = """
import json
torch.load(file, weights_only=True)
np.load(file, allow_pickle=False)
yaml.safe_load(text)
policy.eval()
re.compile(pattern)
load_policy(config, trust_remote_code=cfg.trust_remote_code)
subprocess.run(["git", "status"])
"""
    assert findings(safe) == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_can_run_data(file):
    assert findings(file.read_text(encoding="utf-8")) == []
