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
    uploads = uploads_of(plan)
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


def test_steps_without_retention_leave_the_table_of_those_with_it():
    plan = SurgeryPlan([SegmentSpec(F32, 20, 0)] * 2, "cpu")
    plan.set_addresses([1 << 20, 1 << 21])
    plan.set_groups([pack_group(**GROUP)])
    plan.set_present([True, False], None)
    plan.flush()
    assert plan.table[:, 5].tolist() == [1, 0]
    plan.set_present([True, False], [True, True])
    plan.flush()
    uploads = uploads_of(plan)
    plan.set_present([True, False], None)
    plan.flush()
    assert uploads == []
    assert plan.table[:, 5].tolist() == [3, 2]


@pytest.fixture
def capturing(monkeypatch):
    """Make torch say that the current stream is being captured; no GPU is needed for what the host then does."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def uploads_of(plan):
    found = []
    original = plan._upload
    plan._upload = lambda target, rows: (found.append(target), original(target, rows))
    return found


def test_a_capture_with_nothing_new_uploads_nothing(capturing, monkeypatch):
    plan = small_problem().plan
    with monkeypatch.context() as before_capture:
        before_capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        plan.flush()
    uploads = uploads_of(plan)
    plan.set_groups(list(plan.groups))
    plan.flush()
    assert uploads == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.set_addresses([1 << 20, 1 << 21]), "addresses changed"),
        (lambda plan: plan.set_present([True, False], [True, True]), "which losses reached which parameters changed"),
        (lambda plan: plan.set_groups([pack_group(**{**GROUP, "lr": 0.5})]), "hyperparameters of the groups changed"),
        (
            lambda plan: (plan.set_present([True, False], [True, True]), plan.set_groups([pack_group(**GROUP)])),
            "which losses reached which parameters and the hyperparameters",
        ),
    ],
)
def test_a_capture_with_something_new_is_refused_by_name(monkeypatch, change, message):
    plan = small_problem().plan
    plan.flush()
    tables = [plan.table.clone(), plan.group_table.clone()]
    uploads = uploads_of(plan)
    change(plan)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=message + r".*run one step.*prepare_replay\(\)"):
            plan.flush()
        assert uploads == []
        assert torch.equal(plan.table, tables[0])
        assert torch.equal(plan.group_table, tables[1])
    plan.flush()
    assert uploads, "what was refused is still to be uploaded"


def test_a_variant_that_was_never_launched_is_refused_in_a_capture(capturing):
    plan = small_problem().plan
    with pytest.raises(RuntimeError, match=r"HAS_RET=True.*before the capture run one step of the same kind"):
        kernel._fit(plan, [], {"PHASE": 0, "HAS_RET": True})
    plan.fit[tuple({"PHASE": 0, "HAS_RET": True}.items())] = (528, 64)
    assert kernel._fit(plan, [], {"PHASE": 0, "HAS_RET": True}) == (528, 64)


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
        (lambda: SegmentSpec(BF16, 4, 0, stream=2**32), "stream=4294967296"),
        (lambda: small_problem().settings(rounding_seed=-1), "rounding_seed=-1"),
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
    ("keywords", "message"),
    [
        ({"merge": "sum"}, "weighted, equal"),
        ({"schedule": "step"}, "linear, cosine"),
        ({"controller": "pid"}, "ascent, nupi"),
        ({"rounding": "up"}, "nearest, stochastic"),
    ],
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


def test_new_buffers_have_measured_nothing_and_weigh_a_fresh_gradient():
    buffers = SurgeryBuffers.allocate(small_problem().plan)
    assert dict(zip(kernel.STEP_IN_NAMES, buffers.step_in.tolist(), strict=True)) == {
        "retention_loss": 0.0,
        "grad_scale": 1.0,
        "found_inf": 0.0,
        "measured": 0.0,
        "ret_weight": 1.0,
    }
    dual = dict(zip(kernel.DUAL_NAMES, buffers.dual.tolist(), strict=True))
    assert math.isnan(dual["ema"])
    assert math.isnan(dual["xi"])


def test_settings_that_a_variant_has_no_use_for_make_no_second_one():
    arguments = {"phase": 0, "merge": "weighted", "project": True, "schedule": "linear", "amsgrad": False}
    chosen = {"controller": "nupi", "rounding": "stochastic"}
    for dtype, has_ret in ((F32, True), (BF16, False), (BF16, True)):
        plan = SurgeryPlan([SegmentSpec(dtype, 20, 0)], "cpu")
        plain = kernel.kernel_constants(plan, **arguments, has_ret=has_ret, soft_cast=False)
        other = kernel.kernel_constants(plan, **arguments, has_ret=has_ret, soft_cast=False, **chosen)
        differing = {name for name in plain if plain[name] != other[name]}
        assert ("NUPI" in differing, "STOCHASTIC" in differing) == (has_ret, dtype == BF16)
        assert differing <= {"NUPI", "STOCHASTIC"}


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
