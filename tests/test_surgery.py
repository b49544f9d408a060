import itertools
import math

import pytest
import torch

from craft_opt import CraftConfig
from craft_opt.surgery import (
    Gram,
    coefficients,
    compute_dot,
    merge_grads,
    project_if_conflict,
    task_only_coefficients,
)
from tests.support.asserts import assert_coefficients, assert_relative
from tests.support.oracle import surgery_oracle
from tests.support.samplers import RANK_CASES, SCALES, flat64, gradient_pair
from tests.support.tolerances import ROUNDING, SUM_ORDER

MODES = ("weighted", "equal", "task_priority")


@pytest.mark.parametrize("case", RANK_CASES)
@pytest.mark.parametrize("mode", MODES)
def test_coefficients_match_the_definition_at_every_scale(case, mode):
    for (i, st), (j, sr) in itertools.product(enumerate(SCALES), enumerate(SCALES)):
        task, ret = gradient_pair(case, st, sr, seed=10 * i + j)
        t, r = flat64(task), flat64(ret)
        for lam in (0.0, 0.3, 4.0):
            config = CraftConfig(projection_mode=mode)
            oracle = surgery_oracle(t, r, lam, config, 1.0)
            found = coefficients(compute_dot(task, ret), lam, config, 1.0)
            assert found.conflict.item() == oracle.conflict
            assert abs(found.cos.item() - oracle.cos) <= SUM_ORDER
            assert_coefficients(found.a, found.b, found.grad_norm, oracle, float(t.norm()), float(r.norm()))


@pytest.mark.parametrize("case", RANK_CASES)
def test_the_conflict_decision_does_not_depend_on_scale(case):
    decisions = set()
    for st, sr in itertools.product(SCALES, SCALES):
        task, ret = gradient_pair(case, st, sr, seed=3)
        decisions.add(coefficients(compute_dot(task, ret), 1.0, CraftConfig()).conflict.item())
    assert len(decisions) == 1


def test_projection_removes_exactly_the_component_along_the_retention_gradient():
    task, ret = gradient_pair("obtuse", seed=5)
    projected, conflict = project_if_conflict(task, ret)
    assert conflict.item()
    t, r, p = flat64(task), flat64(ret), flat64(projected)
    # fp32 results: the rounding of each element, against the size of the whole.
    assert abs(float(p @ r)) <= ROUNDING[torch.float32] * float(t.norm() * r.norm()) * 4
    # What was removed is a multiple of r: it has no component across r.
    removed = t - p
    across = removed - (removed @ r) / (r @ r) * r
    assert float(across.norm()) <= ROUNDING[torch.float32] * float(t.norm()) * 4


@pytest.mark.parametrize("case", ["parallel", "acute", "orthogonal", "zero_ret", "zero_task", "both_zero"])
def test_no_conflict_leaves_the_task_gradient_bit_for_bit(case):
    task, ret = gradient_pair(case, seed=2)
    projected, conflict = project_if_conflict(task, ret)
    assert not conflict.item()
    assert all(torch.equal(a, b) for a, b in zip(projected, task, strict=True))


def test_projection_is_idempotent():
    task, ret = gradient_pair("obtuse", seed=8)
    once, _ = project_if_conflict(task, ret)
    twice, conflict = project_if_conflict(once, ret)
    assert not conflict.item()
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_the_threshold_is_a_cosine_and_exclusive():
    gram = Gram(torch.tensor(4.0), torch.tensor(-3.0), torch.tensor(9.0))  # cos = -3 / (2 * 3) = -0.5
    assert coefficients(gram, 0.0, CraftConfig(conflict_threshold=-0.4)).conflict.item()
    assert not coefficients(gram, 0.0, CraftConfig(conflict_threshold=-0.5)).conflict.item()
    assert not coefficients(gram, 0.0, CraftConfig(conflict_threshold=-0.6)).conflict.item()


def test_without_projection_there_is_never_a_conflict():
    task, ret = gradient_pair("opposite")
    config = CraftConfig(use_grad_projection=False)
    found = coefficients(compute_dot(task, ret), 2.0, config)
    assert not found.conflict.item()
    assert (found.a.item(), found.b.item()) == (1.0, 2.0)
    assert found.cos.item() == pytest.approx(-1.0, abs=1e-7)


def test_a_positive_threshold_never_projects_on_a_zero_gradient():
    task, ret = gradient_pair("zero_ret")
    found = coefficients(compute_dot(task, ret), 1.0, CraftConfig(conflict_threshold=0.5))
    assert not found.conflict.item()
    assert math.isfinite(found.b.item())


def test_the_gram_matrix_neither_overflows_nor_underflows():
    huge = [torch.full((8,), 3e38)]
    tiny = [torch.full((8,), 1e-38)]
    gram = compute_dot(huge, tiny)
    found = coefficients(gram, 1.0, CraftConfig(), max_grad_norm=None)
    assert found.cos.item() == pytest.approx(1.0, rel=1e-6)
    assert math.isfinite(found.grad_norm.item())
    assert gram.dot_rr.item() > 0


def test_the_norm_survives_cancellation():
    # g_t = -λ g_r up to fp32 rounding: a² tt + 2ab tr + b² rr cancels in all but the last digits.
    task, ret = gradient_pair("random", seed=4)
    task = [-3.0 * r for r in ret]
    config = CraftConfig(use_grad_projection=False)
    t, r = flat64(task), flat64(ret)
    oracle = surgery_oracle(t, r, 3.0, config, None)
    found = coefficients(compute_dot(task, ret), 3.0, config, None)
    assert_coefficients(found.a, found.b, found.grad_norm, oracle, float(t.norm()), float(r.norm()))


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_the_clip_is_that_of_torch(bound):
    task, ret = gradient_pair("random", seed=1)
    merged = merge_grads(task, ret, 0.5)
    found = coefficients(compute_dot(task, ret), 0.5, CraftConfig(use_grad_projection=False), bound)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in merged]
    for p, g in zip(params, merged, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, bound)
    for p, g in zip(params, merged, strict=True):
        # torch takes its norm in fp32: relative error of a few roundings over a few dozen elements.
        torch.testing.assert_close(p.grad, g * found.clip.float(), rtol=16 * ROUNDING[torch.float32], atol=0)


def test_no_bound_means_no_clip():
    found = coefficients(compute_dot(*gradient_pair("random", 1e8, 1e8)), 1.0, CraftConfig(), None)
    assert found.clip.item() == 1.0


@pytest.mark.parametrize(("mode", "b"), [("weighted", 2.5), ("equal", 0.5), ("task_priority", 1.0)])
def test_merge_modes_without_conflict(mode, b):
    task, ret = gradient_pair("acute", seed=6)
    merged = merge_grads(task, ret, 2.5, mode)
    a = 0.5 if mode == "equal" else 1.0
    for m, t, r in zip(merged, task, ret, strict=True):
        torch.testing.assert_close(m, (a * t.double() + b * r.double()).float(), rtol=0, atol=0)


def test_task_priority_caps_lambda_at_one_and_keeps_smaller_values():
    gram = compute_dot(*gradient_pair("acute"))
    config = CraftConfig(projection_mode="task_priority")
    assert coefficients(gram, 7.0, config).b.item() == 1.0
    assert coefficients(gram, 0.25, config).b.item() == 0.25


def test_a_step_without_retention_is_the_task_gradient():
    found = task_only_coefficients(torch.tensor(25.0), max_grad_norm=1.0)
    assert (found.a.item(), found.b.item(), found.conflict.item()) == (1.0, 0.0, False)
    assert_relative(found.grad_norm, 5.0, 1e-15, "norm")
    assert_relative(found.clip, 1.0 / (5.0 + 1e-6), 1e-15, "clip")


@pytest.mark.parametrize(
    ("task", "ret", "match"),
    [
        ([], [], "at least one"),
        ([torch.zeros(2)], [], "1 task and 0 retention"),
        ([torch.zeros(2)], [torch.zeros(3)], r"\(2,\) \(task\) and \(3,\)"),
    ],
)
def test_gradients_that_do_not_match_are_refused(task, ret, match):
    with pytest.raises(ValueError, match=match):
        compute_dot(task, ret)


def test_half_precision_gradients_are_accumulated_exactly():
    t = [torch.full((4096,), 1.0, dtype=torch.bfloat16), torch.full((4096,), 2.0**-8, dtype=torch.bfloat16)]
    # A bf16 or fp32 running sum would lose or round the small terms; fp64 holds 4096 + 4096 * 2**-16 exactly.
    assert compute_dot(t, t).dot_tt.item() == 4096 + 4096 * 2.0**-16
