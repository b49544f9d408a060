"""Every contender of benchmarks/ computes what it is timed for; the check that says so can fail."""

import math

import pytest
import torch

from benchmarks import harness
from benchmarks.contenders import CONTENDERS, Craft, Eager, checked, contenders, craft_weights, step
from benchmarks.harness import Case, Problem

CPU = torch.device("cpu")
SMALL = Case("small", "odd sizes", ((None, (7, 33)), (None, (129,)), (None, (64, 64)), (None, (1, 5, 3))))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def problem(request):
    return Problem(SMALL, request.param, CPU)


# Compiling takes half a minute, and a run of the benchmark checks it as well.
SLOW = {"flat_compiled": pytest.mark.slow}


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        pytest.param(precision, name, marks=SLOW.get(name, ()))
        for precision in ("fp32", "bf16")
        for name in contenders("cpu", precision)
    ],
)
def test_two_steps_match_fp64(precision, name):
    checked(Problem(SMALL, precision, CPU), name)


def test_every_contender_runs_somewhere():
    assert set(CONTENDERS) == {*contenders("cuda", "fp32"), *contenders("cuda", "mixed")} | set(
        contenders("cpu", "bf16")
    )


class WithoutProjection(Eager):
    rule = staticmethod(craft_weights)

    def run(self, give_ret, give_task):
        give_ret()
        ret = [p.grad for p in self.params]
        give_task()
        for p, r in zip(self.params, ret, strict=True):
            p.grad = p.grad + harness.LAMBDA * r
        torch.nn.utils.clip_grad_norm_(self.params, harness.MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class WithoutClip(Craft):
    def prepare(self):
        self.optimizer.max_grad_norm = None


class WithoutRetention(Craft):
    def run(self, give_ret, give_task):
        give_task()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("wrong", [WithoutProjection, WithoutClip, WithoutRetention])
def test_the_check_finds_a_wrong_contender(wrong, problem):
    made = wrong(problem)
    for _ in range(2):
        step(made, problem)
    with pytest.raises(AssertionError, match="away from the fp64 reference"):
        harness.check(problem, made.params, craft_weights)


def test_gradients_conflict_and_are_never_zero(problem):
    gram = problem.gram
    assert gram.tr / math.sqrt(gram.tt * gram.rr) < harness.THRESHOLD
    assert harness.clip_scale(craft_weights(gram), gram) < 1.0
    assert all((g != 0).all() for g in (*problem.task, *problem.ret))


def test_cases_have_the_sizes_they_are_named_for():
    sizes = {name: (case.numel, len(case.tensors)) for name, case in harness.cases().items()}
    assert sizes["tiny"][0] == 1_000_000
    assert abs(sizes["adapter"][0] - 20e6) < 1e6 and sizes["adapter"][1] == 600
    assert sizes["100M"][0] == 100_000_000 and sizes["300M"][0] == 300_000_000
    assert sizes["pi0_fast"] == (3_449_982_704, 604)
    adapter = harness.cases()["adapter"]
    assert any(math.prod(shape) % 16 for _, shape in adapter.tensors), "uneven means not all divisible by 16"


def test_floor_of_pi0_fast_is_between_its_dtypes():
    case = harness.cases()["pi0_fast"]
    per_parameter = case.bytes_of(harness.STEP_BYTES["surgery"], "mixed") / case.numel
    assert 28 < per_parameter < 40


def test_unknown_case_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown case 'huge'; there are tiny, adapter"):
        harness.runs(["huge"])


def test_peak_bytes_sees_what_is_allocated_and_freed():
    def action():
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        del kept
        torch.empty(1 << 18, dtype=torch.uint8)

    # Both fit the first block one after the other; the allocator's own bookkeeping is not tensors.
    assert 1 << 20 <= harness.peak_bytes(action, CPU) < (1 << 20) + (1 << 18)
