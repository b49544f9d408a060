"""Imports point one way: train.py -> bridge -> optimizer -> kernels, and the core needs neither LeRobot nor a GPU."""

import subprocess
import sys
import textwrap

import pytest

from tests.support.rooms import ROOT, imports, source_files, wrong_arrows


@pytest.mark.parametrize("path", source_files())
def test_imports_point_one_way(path):
    assert not wrong_arrows(path, (ROOT / path).read_text())


def test_every_room_is_walked():
    walked = {path.split("/")[0] if path.count("/") < 2 else "/".join(path.split("/")[:2]) for path in source_files()}
    assert {"train.py", "craft_opt", "craft_opt/bridge", "craft_opt/optimizer", "kernels"} <= walked


OFFENDERS = {
    "kernel reaches up": ("kernels/x.py", "from craft_opt.optimizer import CraftOptimizer", "not from optimizer"),
    "kernel reaches the method": ("kernels/x.py", "from craft_opt import surgery", "not from method"),
    "kernel takes a library": ("kernels/x.py", "import scipy", "kernels may use llvmlite, numba, numpy, torch, triton"),
    "method reaches the optimizer": (
        "craft_opt/surgery.py",
        "from craft_opt.optimizer._metrics import StepMetrics",
        "not from optimizer",
    ),
    "method reaches the package": ("craft_opt/dual.py", "import craft_opt", "not from package"),
    "method reaches a kernel": ("craft_opt/dual.py", "from craft_opt.kernels import surgery_adamw", "not from kernels"),
    "optimizer reaches the bridge": (
        "craft_opt/optimizer/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from craft_opt.bridge import loop",
        "not from bridge",
    ),
    "relative": ("craft_opt/optimizer/x.py", "from ..bridge.config import CraftTrainConfig", "not from bridge"),
    "in a function": ("craft_opt/retention.py", "def f():\n    import lerobot.datasets", "method may use"),
    "by string": (
        "craft_opt/optimizer/x.py",
        "import importlib\nimportlib.import_module('transformers')",
        "optimizer may use",
    ),
    "package takes the bridge": ("craft_opt/__init__.py", "from craft_opt.bridge import cli", "not from bridge"),
    "bridge goes round the optimizer": (
        "craft_opt/bridge/x.py",
        "import craft_opt.kernels.surgery_adamw",
        "not from kernels",
    ),
    "bridge takes top-level kernels": ("craft_opt/bridge/x.py", "import kernels", "as craft_opt.kernels only"),
    "train.py goes round the bridge": ("train.py", "from craft_opt import CraftOptimizer", "not from package"),
    "train.py takes lerobot": ("train.py", "import lerobot", "standard library only"),
}


@pytest.mark.parametrize(("path", "source", "complaint"), OFFENDERS.values(), ids=OFFENDERS)
def test_the_walk_finds_an_offender(path, source, complaint):
    found = wrong_arrows(path, source)
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "docs"])
def test_nobody_imports_kernels_as_a_top_level(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for line, name in imports(str(path.relative_to(ROOT)), path.read_text()):
            assert name.split(".")[0] != "kernels", f"{path}:{line}: import craft_opt.kernels instead"


def test_the_core_works_without_lerobot_triton_and_a_gpu():
    """In a process where they cannot be imported: the door opens, a step runs, and CUDA stays asleep."""
    program = textwrap.dedent(
        """
        import sys

        class Absent:
            names = {"lerobot", "triton", "transformers", "metaworld", "mujoco", "datasets", "matplotlib", "kernels",
                     "numba"}
            asked = set()

            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in self.names:
                    self.asked.add(name.split(".")[0])
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        absent = Absent()
        sys.meta_path.insert(0, absent)
        import craft_opt
        import torch

        assert "triton" in absent.asked, "the kernels never tried triton, so this test shows nothing"
        assert not torch.cuda.is_initialized(), "import craft_opt initialised CUDA"
        for name in ("lerobot", "transformers", "metaworld", "numba"):
            assert name not in absent.asked, f"import craft_opt tried to import {name}"

        p = torch.nn.Parameter(torch.ones(3))
        opt = craft_opt.CraftOptimizer([p], lr=0.1)
        loss = p.square().sum()
        with opt.retention(loss):
            loss.backward()
        (p - 2).square().sum().backward()
        opt.step()
        assert opt.metrics().as_floats()["skipped"] == 0.0 and bool((p != 1).all())
        assert not torch.cuda.is_initialized(), "a step on the CPU initialised CUDA"
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
