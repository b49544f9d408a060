"""The optimizer on the Triton kernel: interpreted on a CPU, and on the device where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, make_model, train
from tests.support.asserts import assert_norm_close
from tests.support.tolerances import ADAMW_NORM

pytest.importorskip("triton")


def test_interpreted_kernel_agrees_with_the_torch_backend():
    # The interpreter must be chosen before triton is imported, so it needs a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "tests.optimizer.interpreted_backend"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "backends agree" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_device_kernel_agrees_with_the_torch_backend_without_a_sync(dtype):
    def run(backend):
        model = make_model(dtype=dtype, width=513).cuda()
        opt = CraftOptimizer(model.parameters(), lr=1e-3, backend=backend, config=CraftConfig(conflict_threshold=0.2))
        data = [tuple(x.cuda() for x in batch) for batch in batches(6, dtype=dtype)]
        train(model, opt, data[:1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, opt, data[1:], every=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]), opt.metrics().as_floats()

    ours, metrics = run("triton")
    theirs, expected = run("torch")
    tolerance = ADAMW_NORM if dtype == torch.float32 else 2.0**-8
    assert_norm_close(ours, theirs, tolerance, str(dtype))
    assert metrics["lam_after"] == pytest.approx(expected["lam_after"], rel=1e-5)


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_cuda_device():
    model = make_model().cuda()
    opt = CraftOptimizer(model.parameters())
    model(torch.randn(2, 10, device="cuda")).sum().backward()
    opt.step()
    assert type(opt._backends["cuda"]).__name__ == "TritonBackend"
