"""What the kernel must satisfy, written once: run by the interpreter on a CPU and by a GPU where there is one.

Collected through interpreted.py (in a process with TRITON_INTERPRET=1) and test_device.py, which provide the
fixtures `device` and `form`.
"""

import copy
import itertools
import math

import pytest
import torch
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.kernels.layout import LaunchConfig
from craft_opt.kernels.rounding import rounding_key, stochastic_round_

from craft_opt import CraftConfig
from craft_opt.dual import Multiplier, advance, epsilon_schedule
from tests.kernels.problems import (
    BF16,
    F16,
    F32,
    LENGTHS,
    Form,
    Modes,
    Problem,
    metrics,
    mixed_problem,
    small_problem,
    step_and_compare,
    three_groups,
)
from tests.support.asserts import assert_coefficients, assert_norm_close, ulps_apart
from tests.support.oracle import surgery_oracle
from tests.support.samplers import RANK_CASES, SCALES, flat64, gradient_pair
from tests.support.tolerances import ADAMW_NORM

MERGES = tuple(kernel.MERGE_MODES)
SCHEDULES = tuple(kernel.SCHEDULES)


class TestAgainstReference:
    @pytest.mark.parametrize("seed", range(3))
    def test_mixed_dtypes_groups_lengths_and_presence(self, device, form, seed):
        problem = mixed_problem(device, seed=seed, amsgrad=seed == 2)
        modes = Modes(MERGES[seed], schedule=SCHEDULES[seed], amsgrad=seed == 2)
        gen = torch.Generator().manual_seed(seed)
        count = problem.plan.n_segments
        problem.state(t=1.0)
        problem.random_moments()
        for _ in range(2):
            problem.present(*(torch.rand(2, count, generator=gen) < 0.75).tolist())
            problem.random_gradients()
            step_and_compare(problem, modes, form)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_first_steps_of_one_dtype(self, device, form, dtype):
        problem = mixed_problem(device, seed=5, dtypes=(dtype,))
        problem.state()
        for _ in range(2):
            problem.random_gradients()
            step_and_compare(problem, Modes(), form)

    def test_without_retention_the_retention_buffer_is_never_read(self, device, form):
        problem = mixed_problem(device, seed=6)
        problem.state(measured=False)
        problem.random_gradients()
        for flat in problem.buffers.grads_ret.values():
            flat.fill_(math.nan)
        step_and_compare(problem, Modes(has_ret=False), form)
        found = metrics(problem)
        assert (found["a"], found["b"], found["skipped"], found["lam_after"]) == (1.0, 0.0, 0.0, 0.7)
        assert all(math.isnan(found[name]) for name in ("dot", "cos", "rr", "retention_loss"))

    def test_moments_survive_gradients_of_every_scale(self, device, form):
        for scale_task, scale_ret in ((1e-8, 1e-8), (1e8, 1e8), (1e-8, 1e8), (1e8, 1e-8)):
            problem = small_problem(device)
            problem.settings(max_grad_norm=None)
            problem.state()
            problem.random_gradients(scale_task, scale_ret)
            step_and_compare(problem, Modes(), form)


class TestReduction:
    @pytest.mark.parametrize("numel", [8192, 8192 + 1024])
    def test_every_tile_of_the_flat_buffers_counts_once(self, device, form, numel):
        group = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
        config = LaunchConfig(block=512, reduce_block=1024)
        problem = Problem([(dtype, numel, 0) for dtype in (F32, BF16)], [group], device=device, config=config)
        problem.state()
        for index in range(2):
            # One power of four a tile: a tile left out or taken twice changes a digit of its own in each sum.
            tile = (torch.arange(numel, device=device) // 1024).double()
            problem.segment(index).copy_(2.0**tile)
            problem.segment(index, retention=True).copy_(-(2.0**-tile) * (1 + index))
        form.run(problem, Modes())
        task = torch.cat([problem.segment(i).double() for i in range(2)])
        ret = torch.cat([problem.segment(i, retention=True).double() for i in range(2)])
        found = metrics(problem)
        # Powers of two: every sum is exact.
        assert found["tt"] == float(task @ task)
        assert found["dot"] == float(task @ ret)
        assert found["rr"] == float(ret @ ret)


class TestSurgery:
    @pytest.mark.parametrize("merge", MERGES)
    def test_coefficients_in_every_rank_case_at_every_scale(self, device, form, merge):
        config = CraftConfig(projection_mode=merge)
        problem = Problem(
            [(F32, n, 0) for n in (15, 17, 1, 24)],
            [{"lr": 1e-3, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}],
            device=device,
        )
        scales = [(s, s) for s in SCALES] + [(1e-8, 1e8), (1e8, 1e-8)]
        # Each rank case at two scales and each scale in two cases keeps the interpreter quick; the GPU takes all.
        cases = list(itertools.product(RANK_CASES, scales))
        if problem.device.type == "cpu":
            cases = cases[:: len(scales) - 2]
        for case, (scale_task, scale_ret) in cases:
            tasks, rets = gradient_pair(case, scale_task, scale_ret)
            for index, (task, ret) in enumerate(zip(tasks, rets, strict=True)):
                problem.segment(index).copy_(task.reshape(-1))
                problem.segment(index, retention=True).copy_(ret.reshape(-1))
            problem.state()
            form.run(problem, Modes(merge))
            found = metrics(problem)
            t, r = flat64(tasks), flat64(rets)
            oracle = surgery_oracle(t, r, 0.7, config, 1.0)
            assert bool(found["conflict"]) == oracle.conflict, (case, scale_task, scale_ret)
            assert abs(found["cos"] - oracle.cos) <= 1e-12
            assert_coefficients(found["a"], found["b"], found["grad_norm"], oracle, float(t.norm()), float(r.norm()))
            assert found["skipped"] == 0.0

    def test_the_decision_to_project_does_not_depend_on_scale(self, device, form):
        decisions = set()
        for exponent in (-26, -10, 0, 10, 26):
            problem = small_problem(device, seed=3)
            problem.state()
            problem.random_gradients(2.0**exponent, 2.0**-exponent)
            form.run(problem, Modes())
            decisions.add((metrics(problem)["conflict"], metrics(problem)["cos"]))
        # Powers of two change no bit of a mantissa, so even the cosine is the same number.
        assert len(decisions) == 1
        assert decisions.pop()[0] == 1.0

    def test_threshold_is_a_cosine_and_projection_can_be_turned_off(self, device, form):
        problem = small_problem(device, seed=3)
        problem.random_gradients()
        problem.state()
        form.run(problem, Modes())
        cos = metrics(problem)["cos"]
        for threshold, project, expected in (
            (cos + 1e-9, True, 1.0),
            (cos - 1e-9, True, 0.0),
            (cos + 1e-9, False, 0.0),
        ):
            problem.settings(conflict_threshold=threshold)
            problem.state()
            form.run(problem, Modes(project=project))
            assert metrics(problem)["conflict"] == expected
            assert (metrics(problem)["b"] == 0.7) == (expected == 0.0)

    def test_a_zero_retention_gradient_is_no_conflict_at_any_threshold(self, device, form):
        problem = small_problem(device, seed=3)
        problem.settings(conflict_threshold=0.5)
        problem.present([True, True], [False, False])
        problem.random_gradients()
        problem.state()
        form.run(problem, Modes())
        assert metrics(problem)["conflict"] == 0.0
        assert metrics(problem)["b"] == 0.7

    @pytest.mark.parametrize(("merge", "expected"), [("weighted", 3.0), ("equal", 0.5), ("task_priority", 1.0)])
    def test_what_lambda_above_one_weighs(self, device, form, merge, expected):
        problem = small_problem(device, seed=3)
        problem.random_gradients(lean=1.0)
        problem.state(lam=3.0)
        form.run(problem, Modes(merge))
        assert metrics(problem)["b"] == expected

    def test_a_retention_gradient_of_subnormal_numbers_is_projected_without_inf_or_nan(self, device, form):
        problem = small_problem(device, seed=4)
        problem.settings(max_grad_norm=None)
        problem.state()
        problem.random_gradients()
        for index in range(problem.plan.n_segments):
            # 1e-44 is 7 units of the smallest fp32: g_r is -7 or 0 or 7 of them, against g_t everywhere.
            problem.segment(index, retention=True).copy_(-1e-44 * problem.segment(index).sign())
        step_and_compare(problem, Modes(), form)
        found = metrics(problem)
        assert found["conflict"] == 1.0
        assert found["b"] > 3.5e38, "the case must need more than fp32 holds"
        assert found["skipped"] == 0.0
        assert all(bool(p.isfinite().all()) for p in problem.params)

    def test_opposite_gradients_cancel_to_the_accuracy_of_the_spec(self, device, form):
        problem = small_problem(device, seed=7, lengths=(700, 900))
        problem.random_gradients()
        for index in range(problem.plan.n_segments):
            problem.segment(index, retention=True).copy_(-problem.segment(index) / 0.75)
        problem.state(lam=0.75)
        form.run(problem, Modes(project=False))
        found = metrics(problem)
        # g_t + λ g_r is zero but for the rounding of g_r to fp32: 2^-24 of each element.
        assert found["grad_norm"] <= 1e-5 * 2.0 * math.sqrt(found["tt"])


class TestClip:
    @pytest.mark.parametrize("bound", [None, 0.0, math.inf, 0.5, 1e9])
    def test_clip_follows_torch(self, device, form, bound):
        problem = small_problem(device, seed=8)
        problem.settings(max_grad_norm=bound)
        problem.state()
        problem.random_gradients()
        step_and_compare(problem, Modes(), form)
        found = metrics(problem)
        clipped = bound == 0.5
        expected = 0.5 / (found["grad_norm"] + 1e-6) if clipped else 1.0
        assert found["clip_scale"] == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("merge", MERGES)
    def test_grad_scale_divides_both_gradients(self, device, form, merge):
        plain, scaled = small_problem(device, seed=9), small_problem(device, seed=9)
        for problem, scale in ((plain, 1.0), (scaled, 1024.0)):
            problem.state(scale=scale)
            problem.random_gradients(scale, scale)
            form.run(problem, Modes(merge))
        # A power of two leaves every mantissa alone: the same bits.
        assert plain.bytes() == scaled.bytes()
        assert metrics(plain) == metrics(scaled)


class TestAdamW:
    @pytest.mark.parametrize(
        "group",
        [
            {},
            {"maximize": True, "weight_decay": 0.2},
            {"amsgrad": True, "beta1": 0.0},
            {"beta1": 0.3, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.0},
        ],
    )
    def test_follows_torch_over_many_steps(self, device, form, group):
        amsgrad = group.get("amsgrad", False)
        values = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01, **group}
        problem = Problem([(F32, n, 0) for n in (37, 530)], [values], device=device, seed=10, amsgrad=amsgrad)
        problem.settings(max_grad_norm=None)
        problem.state(measured=False)
        theirs = [torch.nn.Parameter(p.clone()) for p in problem.params]
        peer = torch.optim.AdamW(
            theirs,
            lr=values["lr"],
            betas=(values["beta1"], values["beta2"]),
            eps=values["eps"],
            weight_decay=values["weight_decay"],
            maximize=values.get("maximize", False),
            amsgrad=amsgrad,
        )
        for _ in range(12 if problem.device.type == "cpu" else 100):
            problem.random_gradients()
            for index, p in enumerate(theirs):
                p.grad = problem.segment(index).clone()
            form.run(problem, Modes(has_ret=False, amsgrad=amsgrad))
            peer.step()
        for ours, p in zip(problem.params, theirs, strict=True):
            assert_norm_close(ours, p.detach(), ADAMW_NORM, f"after many steps with {group}")

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_16_bit_parameters_round_once_to_nearest(self, device, form, dtype):
        problem = small_problem(device, seed=11, dtype=dtype, lengths=(1500, 33))
        problem.state()
        problem.random_moments()
        problem.random_gradients()
        reference = problem.twin()
        kernel.reference_step(reference.plan, reference.buffers, reference.params, **Modes().keywords())
        form.run(problem, Modes())
        for found, wide in zip(problem.params, reference.params, strict=True):
            expected = wide.to(dtype)
            assert ulps_apart(found, expected) <= 1
            # Truncation instead of rounding would miss half of them; the fp32 arithmetic moves a tie now and then.
            assert float((found != expected).float().mean()) < 0.01

    def test_a_parameter_that_no_loss_reached_keeps_every_byte(self, device, form):
        problem = mixed_problem(device, seed=12)
        problem.state()
        problem.random_moments()
        count = problem.plan.n_segments
        untouched = [i for i in range(count) if i % 4 == 0]
        problem.present([i % 2 == 1 for i in range(count)], [i % 4 in (1, 2) for i in range(count)])
        problem.random_gradients()
        before = problem.twin()
        kept = [problem.params[i].clone() for i in untouched]
        step_and_compare(problem, Modes(), form)
        for i, p in zip(untouched, kept, strict=True):
            part = problem.moments(i)
            assert torch.equal(problem.params[i], p)
            assert torch.equal(problem.buffers.m[part], before.buffers.m[part])
            assert torch.equal(problem.buffers.v[part], before.buffers.v[part])
            assert problem.buffers.steps[i] == before.buffers.steps[i]
        moved = [i for i in range(count) if i not in untouched and problem.plan.segments[i].numel]
        assert all(problem.buffers.steps[i] == before.buffers.steps[i] + 1 for i in moved)

    def test_without_retention_a_parameter_of_retention_alone_is_untouched(self, device, form):
        problem = small_problem(device, seed=13)
        problem.present([True, False], [True, True])
        problem.state(measured=False)
        problem.random_gradients()
        kept = problem.params[1].clone()
        form.run(problem, Modes(has_ret=False))
        assert torch.equal(problem.params[1], kept)
        assert problem.buffers.steps.tolist() == [1.0, 0.0]

    def test_gaps_between_segments_stay_zero(self, device, form):
        problem = mixed_problem(device, seed=14)
        problem.state()
        problem.random_gradients()
        form.run(problem, Modes())
        inside = torch.zeros(problem.plan.moment_numel, dtype=torch.bool)
        for index in range(problem.plan.n_segments):
            inside[problem.moments(index)] = True
        assert not problem.buffers.m.cpu()[~inside].any()
        assert not problem.buffers.v.cpu()[~inside].any()


class TestSkippedStep:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["task", "retention", "loss", "found_inf", "bf16 task"])
    def test_nothing_moves_but_the_count(self, device, form, value, where):
        problem = mixed_problem(device, seed=15, amsgrad=True, lengths=(17, 520))
        problem.state(t=2.0)
        problem.random_moments()
        problem.random_gradients()
        if where == "task":
            problem.segment(0)[-1] = value
        elif where == "bf16 task":
            problem.segment(4)[3] = value
        elif where == "retention":
            problem.segment(2, retention=True)[5] = value
        elif where == "loss":
            problem.inputs(loss=value)
        else:
            problem.inputs(found_inf=1.0)
        before = problem.bytes()
        for skipped in (1.0, 2.0):
            form.run(problem, Modes(amsgrad=True))
            assert problem.bytes() == before
            found = metrics(problem)
            assert (found["skipped"], found["skipped_total"], found["t"]) == (1.0, skipped, 2.0)
            assert found["lam_after"] == found["lam_before"] == 0.7
            assert problem.buffers.dual[:3].tolist() == [0.7, 2.0, skipped]

    def test_a_finite_step_after_a_skipped_one_is_taken(self, device, form):
        problem = small_problem(device, seed=16)
        problem.state(found_inf=1.0)
        problem.random_gradients()
        form.run(problem, Modes())
        problem.inputs()
        step_and_compare(problem, Modes(), form)
        assert problem.buffers.dual.tolist()[1:3] == [1.0, 1.0]

    def test_an_unmeasured_loss_may_be_anything(self, device, form):
        problem = small_problem(device, seed=17)
        problem.state(loss=math.nan, measured=False)
        problem.random_gradients()
        step_and_compare(problem, Modes(), form)
        assert metrics(problem)["skipped"] == 0.0
        assert metrics(problem)["lam_after"] == 0.7

    def test_zero_gradients_are_a_step_and_no_skip(self, device, form):
        problem = small_problem(device, seed=18)
        problem.state()
        step_and_compare(problem, Modes(), form)
        assert metrics(problem)["skipped"] == 0.0
        assert metrics(problem)["cos"] == 0.0


class TestDual:
    def test_the_schedule_of_the_spec(self, device, form):
        problem = small_problem(device, seed=19)
        problem.state(t=0.0, loss=0.9)
        problem.random_gradients()
        seen = []
        for _ in range(5):
            form.run(problem, Modes())
            seen.append(metrics(problem)["epsilon"])
        assert [round(value, 3) for value in seen[:3]] == [1.0, 0.833, 0.667]
        assert seen[0] == 1.0
        assert seen[3:] == [0.5, 0.5]
        lam = 0.7
        for value in seen:
            lam = lam + 0.05 * (0.9 - value)
        # λ is fp64 from end to end: five additions.
        assert problem.buffers.dual[:3].tolist() == pytest.approx([lam, 5.0, 0.0], rel=1e-14)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_schedules_reach_both_ends_exactly(self, device, form, schedule):
        problem = small_problem(device, seed=20)
        problem.settings(epsilon_start=0.3, epsilon_end=0.07, decay_steps=7)
        formula = {
            "linear": lambda x: 0.3 + x * (0.07 - 0.3),
            "cosine": lambda x: 0.07 + 0.5 * (1 + math.cos(math.pi * x)) * (0.3 - 0.07),
            "exponential": lambda x: 0.3 * (0.07 / 0.3) ** x,
        }[schedule]
        for t in range(9):
            problem.state(t=float(t))
            form.run(problem, Modes(schedule=schedule))
            found = metrics(problem)["epsilon"]
            if t == 0:
                assert found == 0.3
            elif t >= 7:
                assert found == 0.07
            else:
                # fp64: a handful of operations, each 1.1e-16.
                assert found == pytest.approx(formula(t / 7), rel=1e-14)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_no_decay_steps_hold_epsilon(self, device, form, schedule):
        problem = small_problem(device, seed=20)
        problem.settings(decay_steps=0)
        problem.state(t=100.0)
        form.run(problem, Modes(schedule=schedule))
        assert metrics(problem)["epsilon"] == 1.0

    def test_lambda_stays_in_its_interval_and_moves_only_when_measured(self, device, form):
        problem = small_problem(device, seed=21)
        for loss, measured, expected in ((1e6, True, 10.0), (-1e6, True, 0.0), (5.0, False, 0.7), (1.0, True, 0.7)):
            problem.state(loss=loss, measured=measured)
            form.run(problem, Modes())
            assert problem.buffers.dual[0] == expected
            assert metrics(problem)["lam_before"] == 0.7
            assert math.isnan(metrics(problem)["retention_loss"]) != measured

    def test_the_merge_uses_lambda_before_the_step(self, device, form):
        problem = small_problem(device, seed=22)
        problem.random_gradients(lean=1.0)
        problem.state(loss=1e6)
        form.run(problem, Modes())
        assert metrics(problem)["b"] == 0.7
        assert problem.buffers.dual[0] == 10.0

    @pytest.mark.parametrize("controller", tuple(kernel.CONTROLLERS))
    def test_the_dual_state_is_that_of_the_method_over_many_steps(self, device, form, controller):
        config = CraftConfig(
            lambda_controller=controller, lambda_lr=0.3, lambda_max=2.0, nupi_kp=2.5, nupi_nu=0.4, retention_ema=0.6,
            epsilon_start=1.0, epsilon_end=0.5,
        )  # fmt: skip
        problem = small_problem(device, seed=26)
        problem.settings(lambda_lr=0.3, lambda_max=2.0, nupi_kp=2.5, nupi_nu=0.4, retention_ema=0.6, decay_steps=6)
        problem.random_gradients()
        problem.state()
        expected, t = Multiplier(0.7), 0
        gen = torch.Generator().manual_seed(26)
        seen = []
        for k in range(16):
            loss, measured, skipped = float(2.0 * torch.rand((), generator=gen)), k not in (0, 5, 6), k == 9
            problem.inputs(loss, measured, found_inf=float(skipped))
            form.run(problem, Modes(controller=controller))
            epsilon = epsilon_schedule(float(t), config, decay_steps=6)
            expected = advance(expected, loss, epsilon, config, moves=measured and not skipped)
            t += not skipped
            found = problem.buffers.dual.tolist()
            # fp64 from end to end; every step adds a few roundings of numbers below 10.
            assert [found[i] for i in (0, 3, 4)] == pytest.approx(list(expected), abs=1e-13, nan_ok=True), k
            assert found[1] == t
            seen.append(found[0])
        assert 2.0 in seen, "the clip must have been met"
        assert math.isnan(found[4]) == (controller == "ascent")

    def test_without_a_retention_gradient_the_dual_state_waits(self, device, form):
        problem = small_problem(device, seed=27)
        problem.settings(retention_ema=0.5)
        problem.random_gradients()
        problem.state(loss=5.0, ema=0.25, xi=-0.5)
        form.run(problem, Modes(has_ret=False, controller="nupi"))
        assert problem.buffers.dual.tolist() == [0.7, 1.0, 0.0, 0.25, -0.5]


class TestReuse:
    """A retention gradient of an earlier step: it weighs less, is projected against as it is, and λ waits."""

    @pytest.mark.parametrize(("merge", "kept"), [("weighted", 3.0), ("equal", 0.5), ("task_priority", 1.0)])
    @pytest.mark.parametrize("lean", [-1.0, 1.0])
    def test_the_weight_is_on_the_merge_and_not_on_the_projection(self, device, form, merge, kept, lean):
        found = {}
        for weight in (1.0, 0.25, 0.0):
            problem = small_problem(device, seed=28)
            problem.random_gradients(lean=lean)
            problem.state(lam=3.0, measured=False, weight=weight)
            step_and_compare(problem, Modes(merge), form)
            found[weight] = metrics(problem)
            assert problem.buffers.dual.tolist()[0] == 3.0
            assert math.isnan(problem.buffers.dual[3])
            assert math.isnan(found[weight]["retention_loss"])
        half = 0.5 if merge == "equal" else 1.0
        conflict = lean < 0
        for weight, values in found.items():
            assert bool(values["conflict"]) == conflict
            projection = half * values["dot"] / values["rr"] if conflict else 0.0
            assert values["b"] == pytest.approx(kept * weight - projection, rel=1e-12, abs=1e-15)
            assert values["a"] == half


class TestStochasticRounding:
    SEED, T = 5, 11.0
    MODES = Modes(rounding="stochastic")
    # With no gradient and no moment the update is p·(1 − lr·wd), rounded once in fp32: the value before
    # the rounding to bf16 is known to the bit, and so must be the parameter.
    DECAY = ({"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.3},)

    def decaying(self, device, streams=None, seed=SEED, t=T, dtypes=(BF16,), lengths=LENGTHS):
        specs = [(dtype, length, 0) for length in lengths for dtype in dtypes]
        if streams is not None:
            specs = [(*spec, stream) for spec, stream in zip(specs, streams, strict=True)]
        problem = Problem(specs, self.DECAY, device=device, seed=29)
        problem.settings(rounding_seed=seed)
        problem.state(t=t)
        return problem

    def test_the_bits_are_those_of_the_plain_statement(self, device, form):
        streams = [2**32 - 1, 0, 7, 7, *range(100, 100 + 3 * len(LENGTHS) - 4)]
        for dtypes, chosen in (((BF16,), None), ((F32, BF16, F16), streams)):
            problem = self.decaying(device, chosen, dtypes=dtypes)
            before = [p.clone() for p in problem.params]
            form.run(problem, self.MODES)
            factor = torch.tensor(1.0 - 1e-2 * 0.3, dtype=torch.float64).float().item()
            moved = 0
            for index, (p, old) in enumerate(zip(problem.params, before, strict=True)):
                if p.dtype != BF16:
                    assert torch.equal(p, (old.float() * factor).to(p.dtype))
                    continue
                key = rounding_key(self.SEED, problem.plan.streams[index], int(self.T))
                expected = stochastic_round_(torch.empty_like(old), old.float() * factor, key)
                assert torch.equal(p, expected), index
                moved += int((expected != (old.float() * factor).to(BF16)).sum())
            # A third of a percent is most of a unit in the last place: nearest rounding differs in many elements.
            assert moved > 100

    def test_the_reference_draws_the_same_bits(self, device, form):
        problem = self.decaying(device, dtypes=(BF16, F32))
        twin = problem.twin()
        twin.params = [p.clone() for p in problem.params]
        kernel.reference_step(
            twin.plan, twin.buffers, twin.params, **self.MODES.keywords(), compute_dtype=torch.float32
        )
        form.run(problem, self.MODES)
        assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_a_whole_step_stays_within_a_unit_in_the_last_place(self, device, form, amsgrad):
        problem = mixed_problem(device, seed=30, amsgrad=amsgrad)
        problem.state(t=3.0)
        problem.random_moments()
        problem.random_gradients()
        nearest = copy.deepcopy(problem)
        nearest.plan.set_addresses([p.data_ptr() for p in nearest.params])
        form.run(nearest, Modes(amsgrad=amsgrad))
        step_and_compare(problem, Modes(amsgrad=amsgrad, rounding="stochastic"), form)
        different = 0
        for p, q in zip(problem.params, nearest.params, strict=True):
            if p.dtype == BF16:
                different += int((p != q).sum())
            else:
                assert torch.equal(p, q)
        assert different > 100
        assert torch.equal(problem.buffers.m, nearest.buffers.m)
        assert torch.equal(problem.buffers.v, nearest.buffers.v)

    def test_the_clock_and_the_seed_choose_the_numbers(self, device, form):
        def bits(**changes):
            problem = self.decaying(device, lengths=(1100, 33), **changes)
            form.run(problem, self.MODES)
            return problem.bytes()[:2]

        first = bits()
        assert bits() == first
        assert bits(streams=[0, 1]) == first
        assert all(bits(**other) != first for other in ({"t": 12.0}, {"seed": 6}, {"streams": [1, 0]}))

    def test_values_that_are_not_finite_stay_as_they_are(self, device, form):
        problem = self.decaying(device, lengths=(40,))
        strange = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40], dtype=BF16)
        problem.params[0][: len(strange)] = strange.to(problem.device)
        form.run(problem, self.MODES)
        found = problem.params[0][: len(strange)].cpu()
        assert torch.equal(found[[0, 1, 3, 4]], strange[[0, 1, 3, 4]])
        assert math.isnan(found[2])
        assert math.copysign(1.0, float(found[4])) == -1.0
        assert bool(problem.params[0][len(strange) :].isfinite().all())


class TestDeterminism:
    def test_the_same_inputs_give_the_same_bits(self, device, form):
        results = []
        for _ in range(2):
            problem = mixed_problem(device, seed=23)
            problem.state()
            problem.random_moments()
            problem.random_gradients()
            form.run(problem, Modes())
            results.append((problem.bytes(), problem.buffers.metrics.tolist()))
        assert results[0] == results[1]

    def test_one_launch_and_two_phases_agree_to_the_bit_at_one_program(self, device):
        results = []
        for form in (Form(True, 1), Form(False, 1)):
            problem = mixed_problem(device, seed=24)
            problem.state()
            problem.random_gradients()
            form.run(problem, Modes())
            results.append((problem.bytes(), problem.buffers.metrics.tolist()))
        assert results[0] == results[1]

    def test_two_shards_with_summed_partials_are_one_device(self, device):
        whole = mixed_problem(device, seed=25, lengths=(40, 700, 33))
        whole.state()
        whole.random_gradients()
        shards = []
        for part in (slice(0, 4), slice(4, 9)):
            specs = [(s.dtype, s.numel, s.group) for s in whole.plan.segments[part]]
            shard = Problem([*specs, (F32, 0, 2)], three_groups(), device=device)
            indices = range(whole.plan.n_segments)[part]
            for mine, index in enumerate(indices):
                shard.params[mine].copy_(whole.params[index])
                shard.segment(mine).copy_(whole.segment(index))
                shard.segment(mine, retention=True).copy_(whole.segment(index, retention=True))
            shard.state()
            shards.append((shard, indices))
        modes = Modes()
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for shard, _ in shards:
            rows = kernel.reduce(shard.plan, shard.buffers, **modes.keywords(), grid=2)
            total += shard.buffers.partials[:rows].sum(dim=0)
        reference = whole.twin()
        kernel.reference_step(reference.plan, reference.buffers, reference.params, **modes.keywords())
        for shard, indices in shards:
            shard.buffers.partials[0] = total
            kernel.apply(shard.plan, shard.buffers, n_partials=1, **modes.keywords(), grid=2)
            assert torch.allclose(shard.buffers.metrics, reference.buffers.metrics, rtol=1e-9, atol=0, equal_nan=True)
            for mine, index in enumerate(indices):
                wide = reference.params[index]
                # Every error of a first step is far below two units in the last place of the parameter.
                bound = 2 * torch.finfo(whole.plan.segments[index].dtype).eps * wide.abs() + 1e-7
                assert bool(((shard.params[mine].double() - wide).abs() <= bound).all())
