"""The layout, its tables and its checks: plain torch, no kernel is launched here."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.kernels.layout import ALIGN, LaunchConfig, SegmentSpec, SurgeryBuffers, SurgeryPlan, pack_group
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.problems import BF16, F16, F32, small_problem

ROOT = Path(__file__).parents[2]

GROUP = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}

specs = st.lists(
    st.tuples(st.sampled_from([F32, BF16, F16]), st.integers(0, 5000), st.integers(0, 2)), min_size=1, max_size=12
)


@given(specs)
def test_segments_are_aligned_disjoint_and_inside_their_buffers(specs):
    plan = SurgeryPlan([SegmentSpec(*spec) for spec in specs], "cpu")
    by_dtype = {dtype: [] for dtype in plan.dtypes}
    for i, (dtype, numel, _) in enumerate(specs):
        by_dtype[dtype].append((plan.grad_offset[i], numel, plan.grad_numel[dtype]))
    moments = [(plan.moment_offset[i], numel, plan.moment_numel) for i, (_, numel, _) in enumerate(specs)]
    for pieces in [*by_dtype.values(), moments]:
        end = 0
        for start, numel, total in sorted(pieces, key=lambda piece: piece[0]):
            assert start % ALIGN == 0
            assert end <= start
            end = start + numel
            assert end <= total
    assert all(
        (numel % plan.config.reduce_block == 0 and numel > 0) or numel == 0 for numel in plan.grad_numel.values()
    )


@given(specs)
def test_tiles_and_tails_cover_every_element_once(specs):
    plan = SurgeryPlan([SegmentSpec(*spec) for spec in specs], "cpu", LaunchConfig(block=64))
    plan.set_addresses([1 << 20] * len(specs))
    plan.set_present([True] * len(specs), [False] * len(specs))
    plan.set_groups([pack_group(**GROUP)] * (1 + max(group for _, _, group in specs)))
    plan.flush()
    covered = [0] * len(specs)
    first = 0
    for dtype in kernel.SUPPORTED_DTYPES:
        for tile in range(plan.tiles[dtype]):
            owner = int(plan.tile_seg[first + tile])
            assert specs[owner][0] == dtype
            row = plan.table[owner].tolist()
            start = tile * 64
            assert row[1] + start == plan.grad_offset[owner] + covered[owner]
            assert row[2] + start == plan.moment_offset[owner] + covered[owner]
            assert row[0] + start * dtype.itemsize == (1 << 20) + covered[owner] * dtype.itemsize
            covered[owner] += min(64, row[3] - start)
        first += plan.tiles[dtype]
    for row, owner in zip(plan.tails.tolist(), plan.tail_order, strict=False):
        assert row[3] == owner
        assert row[1] == plan.grad_offset[owner] + covered[owner]
        covered[owner] += int(plan.table[owner, 7])
    assert covered == [numel for _, numel, _ in specs]


def test_setters_upload_only_what_changed():
    plan = small_problem().plan
    plan.flush()
    uploads = []
    original = plan._upload
    plan._upload = lambda target, rows: (uploads.append(target), original(target, rows))
    plan.set_addresses(plan.addresses)
    plan.set_present(list(plan.task_present), list(plan.retention_present))
    plan.set_groups(list(plan.groups))
    plan.flush()
    assert uploads == []
    plan.set_groups([pack_group(**{**GROUP, "lr": 0.5})])
    plan.flush()
    assert [target is plan.group_table for target in uploads] == [True]
    assert plan.group_table[0, 0] == 0.5
    plan.set_present([False, True], [False, False])
    plan.flush()
    assert plan.table[:, 5].tolist() == [0, 1]


@pytest.mark.parametrize("missing", ["set_addresses", "set_present", "set_groups"])
def test_a_launch_before_the_plan_is_complete_is_refused(missing):
    plan = SurgeryPlan([SegmentSpec(F32, 20, 0)], "cpu")
    for name, argument in (
        ("set_addresses", ([1 << 20],)),
        ("set_present", ([True], [True])),
        ("set_groups", ([pack_group(**GROUP)],)),
    ):
        if name != missing:
            getattr(plan, name)(*argument)
    with pytest.raises(ValueError, match=missing):
        plan.flush()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SurgeryPlan([], "cpu"), "at least one parameter"),
        (lambda: SegmentSpec(torch.float64, 4, 0), "float64"),
        (lambda: SegmentSpec(F32, -1, 0), "numel=-1"),
        (lambda: LaunchConfig(block=1000), "block=1000"),
        (lambda: LaunchConfig(num_warps=3), "num_warps=3"),
        (lambda: LaunchConfig(reduce_block=16384), "reduce_block=16384"),
        (lambda: pack_group(1e-3, 1.0, 0.9, 1e-8, 0.0), "beta=1.0"),
        (lambda: small_problem().plan.set_addresses([8, 16]), "0x8"),
        (lambda: small_problem().plan.set_addresses([0, 16]), "0x0"),
        (lambda: small_problem().plan.set_addresses([16]), "1 entries for 2"),
        (lambda: small_problem().plan.set_present([True], [True, True]), "task has 1"),
        (lambda: small_problem().plan.set_groups([(1.0,)]), "pack_group"),
        (lambda: small_problem().plan.set_groups([]), "0 group rows"),
    ],
)
def test_bad_layouts_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": torch.zeros(4)}, r"SurgeryBuffers\.m: .*\(4,\)"),
        ({"v": torch.zeros(96, dtype=torch.float64)}, "float64"),
        ({"vmax": None}, "vmax is missing"),
        ({"grads_ret": {}}, "grads_ret.*missing"),
        ({"steps": torch.zeros(2, 2)[:, 0]}, "contiguous=False"),
        ({"m": torch.zeros(81)[1:]}, "multiple of 16"),
    ],
)
def test_buffers_that_do_not_fit_the_plan_are_refused(change, message):
    plan = small_problem().plan
    assert plan.moment_numel == 80
    good = SurgeryBuffers.allocate(plan, amsgrad=True)
    good.check(plan, has_ret=True, amsgrad=True)
    bad = dataclasses.replace(good, **change)
    with pytest.raises(ValueError, match=message):
        bad.check(plan, has_ret=True, amsgrad=True)


def test_a_cpu_without_the_interpreter_is_told_what_to_do():
    problem = small_problem()
    problem.state()
    assert not kernel.is_available("cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernel.fused(problem.plan, problem.buffers)


@pytest.mark.parametrize(
    ("keywords", "message"), [({"merge": "sum"}, "weighted, equal"), ({"schedule": "step"}, "linear, cosine")]
)
def test_unknown_modes_are_refused(keywords, message):
    problem = small_problem()
    with pytest.raises(ValueError, match=message):
        kernel.reference_step(problem.plan, problem.buffers, problem.params, **keywords)


@pytest.mark.parametrize("rows", [0, kernel.MAX_GRID + 1])
def test_apply_wants_the_number_of_rows_that_reduce_returned(rows):
    problem = small_problem()
    with pytest.raises(ValueError, match=f"n_partials={rows}"):
        kernel.apply(problem.plan, problem.buffers, n_partials=rows)


def test_settings_without_a_clip():
    row = kernel.pack_settings(
        conflict_threshold=-0.1, max_grad_norm=None, lambda_lr=0.1, lambda_max=1.0, epsilon_start=1.0, epsilon_end=0.5,
        decay_steps=3,
    )  # fmt: skip
    assert row.tolist() == [-0.1, 0.0, 0.1, 1.0, 1.0, 0.5, 3.0, 0.0, 0.0, 0.0, 0.0]
    assert pack_group(**{**GROUP, "beta1": 0.0})[7] == -math.inf


def test_everything_but_the_launch_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None
from tests.kernels.problems import small_problem, kernel, Modes
problem = small_problem()
problem.state()
problem.random_gradients()
kernel.reference_step(problem.plan, problem.buffers, problem.params)
assert problem.buffers.dual[1] == 1.0
assert not kernel.is_available("cuda")
try:
    kernel.fused(problem.plan, problem.buffers)
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout
