"""What the compiler makes of the kernel for GPUs that are not there: held so that an edit cannot quietly undo it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from craft_opt.kernels import aot
from craft_opt.kernels.aot import ARCHITECTURES, Variant, compile_variant, standard_variants
from craft_opt.kernels.layout import DEFAULT_CONFIG

from tests.kernels.problems import BF16, F16, F32

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

WATCHED = [
    Variant((F32,)),
    Variant((BF16,)),
    Variant((F16,)),
    Variant((BF16, F32)),
    Variant((BF16,), phase="reduce"),
    Variant((BF16,), phase="apply"),
    Variant((F32,), has_ret=False),
    Variant((F32,), amsgrad=True, tails=True),
    Variant((BF16,), controller="nupi"),
    Variant((BF16,), rounding="stochastic"),
    Variant((BF16, F32), controller="nupi", rounding="stochastic"),
]


def expected_widths(variant, dtype):
    """128-bit accesses of one thread on a tile of 8 elements: two of fp32, one of 16 bits."""
    own = 2 if dtype == F32 else 1
    gradients = own * (2 if variant.has_ret else 1)
    moments = 6 if variant.amsgrad else 4
    return {"reduce": ({128: gradients}, {}), "update": ({128: gradients + own + moments}, {128: own + moments})}


def assert_report(report, variant):
    assert not report.spills, f"{report.stack_bytes} bytes of stack, {report.spill_instructions} LDL/STL"
    # 64 registers keep 32 warps on a multiprocessor. Three dtypes with AMSGrad may take what they need. The hash of
    # stochastic rounding passes 64 on sm_80 and sm_100: 24 warps still have 86 KB of loads in flight, three times what
    # 700 ns of an H200's bandwidth call for.
    many = variant.amsgrad or len(variant.dtypes) > 1 or (variant.rounding == "stochastic" and report.arch != 90)
    assert report.registers <= (128 if len(variant.dtypes) == 3 else 80 if many else 64)
    # Shared memory carries the moments between the layouts of 16-bit and 32-bit accesses: 2048 fp32 and no more.
    assert report.shared_bytes <= 8192

    roles = {"fused": ("reduce", "update"), "reduce": ("reduce",), "apply": ("update",)}[variant.phase]
    for role in roles:
        found = sorted(
            (sorted(loop.loads.items()), sorted(loop.stores.items())) for loop in report.loops if loop.role == role
        )
        wanted = sorted(
            (sorted(loads.items()), sorted(stores.items()))
            for loads, stores in (expected_widths(variant, dtype)[role] for dtype in variant.dtypes)
        )
        assert found == wanted, f"accesses of the {role} loops by width"
    assert len(report.loops) == len(roles) * len(variant.dtypes)

    barrier = variant.phase == "fused"
    assert sum(report.atomics.values()) == report.barrier_arrivals == int(barrier), report.atomics
    assert all(".ADD" in name and ".GPU" in name and "F" not in name.split(".ADD")[1] for name in report.atomics)
    assert (report.barrier_polls > 0) == barrier
    assert report.float_atomics == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", WATCHED, ids=lambda variant: variant.name)
def test_no_spills_128_bit_accesses_one_barrier_atomic(variant, arch):
    assert_report(compile_variant(variant, arch), variant)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", standard_variants(), ids=lambda variant: variant.name)
def test_every_variant_of_the_committed_report(variant, arch):
    assert_report(compile_variant(variant, arch), variant)


def test_instructions_leave_room_for_memory():
    # An H200 issues 132·4·32 instructions a clock at about 1.7 GHz: 29e12 a second. At 4.8 TB/s it streams 1.2e12
    # elements of the bf16 reduction (4 bytes each) and 0.17e12 of the update (28 bytes): 24 and 170 instructions an
    # element. Half of that leaves the waiting to memory.
    for loop in compile_variant(Variant((BF16,)), 90).loops:
        assert loop.per_element <= {"reduce": 12, "update": 85}[loop.role]


def test_the_report_sees_spills_and_narrow_accesses():
    tight = dataclasses.replace(DEFAULT_CONFIG, register_ceilings=(32,))
    spilled = compile_variant(Variant((F32,)), 90, tight)
    assert spilled.spills
    assert spilled.registers == 32
    narrow = dataclasses.replace(DEFAULT_CONFIG, vec_16bit=4)
    loops = compile_variant(Variant((BF16,), phase="apply"), 90, narrow).loops
    assert loops[0].loads == {64: 6, 128: 4}
    assert loops[0].stores == {64: 2, 128: 4}


def test_the_command_writes_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aot, "standard_variants", lambda: WATCHED[:2])
    out = tmp_path / "results" / "aot.json"
    assert aot.main(["--arch", "90", "--out", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [report["variant"] for report in document["reports"]] == [variant.name for variant in WATCHED[:2]]
    assert document["config"]["block"] == DEFAULT_CONFIG.block
    assert "sm_90" in capsys.readouterr().out


def test_the_report_is_about_the_kernel_that_a_launch_compiles():
    # The launcher lets Triton derive signature and alignment from the arguments, the report writes them down. Without
    # a GPU there is no driver to name a target, so a process of its own is given one; nothing is launched.
    script = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Target:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Target())
from craft_opt.kernels import aot, surgery_adamw as kernel
from craft_opt.kernels.layout import DEFAULT_CONFIG, SegmentSpec, SurgeryBuffers, SurgeryPlan

plan = SurgeryPlan([SegmentSpec(torch.bfloat16, 1, 0), SegmentSpec(torch.bfloat16, 100_000, 0)], "cpu")
constants = kernel.kernel_constants(
    plan, phase=0, merge="weighted", project=True, schedule="linear", has_ret=True, amsgrad=False, soft_cast=False
)
arguments = kernel.kernel_arguments(plan, SurgeryBuffers.allocate(plan), 1)
options = kernel.launch_options(DEFAULT_CONFIG, 0, 64)
launched = kernel.surgery_adamw_kernel.warmup(*arguments, **constants, **options, grid=(1,))
reported, _ = aot._source(aot.Variant((torch.bfloat16,), tails=True), DEFAULT_CONFIG)
for name in ("signature", "attrs", "constants"):
    assert getattr(launched.src, name) == getattr(reported, name), name
assert launched.metadata.launch_cooperative_grid and launched.metadata.maxnreg == 64
print("the same")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]
