"""The CPU kernel against the fp64 reference that the Triton kernel is held to, element by element."""

import itertools
import multiprocessing
import sys

import pytest
import torch
from craft_opt.kernels import rounding, surgery_adamw_cpu
from craft_opt.kernels.surgery_adamw_cpu import CpuPlan

from craft_opt import CraftConfig
from craft_opt.optimizer._backends import Rule, decide
from tests.kernels.problems import BF16, F16, F32, LENGTHS, Modes, Problem, step_and_compare
from tests.support.samplers import SCALES
from tests.support.tolerances import SUM_ORDER

GROUPS = [
    {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 3e-2, "beta1": 0.3, "beta2": 0.8, "eps": 1e-6, "weight_decay": 0.0, "maximize": True},
]
# One past a piece, and a piece and a half: every parameter but these is a single piece.
LONG = (surgery_adamw_cpu.PIECE + 1, surgery_adamw_cpu.PIECE * 3 // 2)


def specs(dtypes=(F32, BF16)):
    lengths = (*LENGTHS, *LONG)
    return [(dtype, n, i // len(dtypes) % 2) for i, (n, dtype) in enumerate(itertools.product(lengths, dtypes))]


def plan_of(problem, has_ret=True):
    segments = problem.plan.segments
    plan = CpuPlan([s.numel for s in segments], [s.dtype for s in segments])
    k = surgery_adamw_cpu
    plan.table[:, k.GROUP] = [s.group for s in segments]
    parts = [problem.moments(i) for i in range(len(segments))]
    plan.table[:, k.P] = [p.data_ptr() for p in problem.params]
    plan.table[:, k.M] = [problem.buffers.m[part].data_ptr() for part in parts]
    plan.table[:, k.V] = [problem.buffers.v[part].data_ptr() for part in parts]
    if problem.buffers.vmax is not None:
        plan.table[:, k.V_MAX] = [problem.buffers.vmax[part].data_ptr() for part in parts]
    for column, retention, present in (
        (k.TASK, False, problem.plan.task_present),
        (k.RET, True, problem.plan.retention_present if has_ret else [False] * len(segments)),
    ):
        addresses = [problem.segment(i, retention=retention).data_ptr() for i in range(len(segments))]
        plan.table[:, column] = [a if there else 0 for a, there in zip(addresses, present, strict=True)]
    return plan


class Native:
    """The kernel's two launches with the scalars between them, as the optimizer's backend does it."""

    def run(self, problem, modes):
        buffers = problem.buffers
        settings = buffers.settings.tolist()
        config = CraftConfig(
            projection_mode=modes.merge,
            use_grad_projection=modes.project,
            epsilon_schedule=modes.schedule,
            lambda_controller=modes.controller,
            bf16_rounding=modes.rounding,
            conflict_threshold=settings[0],
            lambda_lr=settings[2],
            lambda_max=settings[3],
            epsilon_start=settings[4],
            epsilon_end=settings[5],
        )
        plan = plan_of(problem, modes.has_ret)
        dual = buffers.dual.tolist()
        rule = Rule(config, settings[1] or None, int(settings[6]))
        decision = decide(plan.gram(), buffers.step_in.tolist(), dual, rule, modes.has_ret)
        if decision.finite:
            keys = rounding.rounding_keys(0, range(len(problem.params)), int(dual[1]))
            plan.table[:, surgery_adamw_cpu.KEY] = keys.numpy()
            stochastic = modes.rounding == "stochastic"
            plan.update(problem.plan.groups, buffers.steps, decision.a, decision.b, stochastic=stochastic)
            ret = problem.plan.retention_present if modes.has_ret else [False] * len(problem.params)
            pairs = zip(problem.plan.task_present, ret, strict=True)
            buffers.steps += torch.tensor([t or r for t, r in pairs])
        buffers.dual.copy_(torch.tensor(decision.dual, dtype=torch.float64))
        buffers.metrics.copy_(torch.tensor(decision.metrics, dtype=torch.float64))


def filled(amsgrad=False, seed=0):
    groups = [{**GROUPS[0], "amsgrad": amsgrad}, GROUPS[1]]
    problem = Problem(specs(), groups, seed=seed, amsgrad=amsgrad)
    problem.random_moments()
    problem.state()
    return problem


MODES = [
    Modes(),
    Modes(merge="equal", schedule="cosine"),
    Modes(merge="task_priority", schedule="exponential", controller="nupi"),
    Modes(project=False),
    Modes(has_ret=False),
    Modes(rounding="stochastic"),
]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("modes", MODES, ids=str)
def test_every_element_is_within_the_error_bound_of_the_reference(modes, amsgrad):
    modes = Modes(**{**modes.keywords(), "amsgrad": amsgrad})
    problem = filled(amsgrad)
    problem.random_gradients()
    step_and_compare(problem, modes, Native())


def test_parameters_that_only_one_loss_or_neither_reached():
    problem = filled()
    count = len(problem.params)
    problem.present([i % 3 != 0 for i in range(count)], [i % 4 < 2 for i in range(count)])
    problem.random_gradients()
    step_and_compare(problem, Modes(), Native())


@pytest.mark.parametrize("grad_scale", [1.0, 256.0])
def test_scale_and_weight_of_the_retention_gradient(grad_scale):
    problem = filled()
    problem.state(scale=grad_scale, weight=0.5)
    problem.random_gradients(scale_task=grad_scale, scale_ret=grad_scale)
    step_and_compare(problem, Modes(), Native())


def test_nothing_moves_in_a_skipped_step():
    problem = filled()
    problem.random_gradients()
    problem.segment(len(problem.params) - 1)[-1] = torch.inf
    before = problem.bytes()
    Native().run(problem, Modes())
    assert problem.bytes() == before
    assert problem.buffers.dual[2] == 1


def test_gram_matrix_at_every_scale():
    for st, sr in itertools.product(SCALES, SCALES):
        problem = Problem(specs((F32,)), GROUPS, seed=3)
        problem.random_gradients(st, sr)
        task, ret = (problem.buffers.__dict__[name][F32].double() for name in ("grads_task", "grads_ret"))
        sums = plan_of(problem).gram()
        norms = float(task.norm()), float(ret.norm())
        for found, x, y, size in zip(
            sums, (task, task, ret), (task, ret, ret), (norms[0] ** 2, norms[0] * norms[1], norms[1] ** 2), strict=True
        ):
            assert abs(found - float(x @ y)) <= SUM_ORDER * size


def test_torch_brings_the_threads_on_linux():
    assert surgery_adamw_cpu._openmp() is not None or sys.platform != "linux"


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(surgery_adamw_cpu, "ALONE", 0)
    results = []
    for threads, whose in ((1, "own"), (2, "own"), (3, "own"), (2, "Python's")):
        if whose != "own":
            monkeypatch.setattr(surgery_adamw_cpu, "_openmp", lambda: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        problem = filled()
        problem.random_gradients()
        sums = plan_of(problem).gram()
        Native().run(problem, Modes(rounding="stochastic"))
        results.append((sums, problem.bytes()))
    assert all(found == results[0] for found in results)


def test_stochastic_rounding_has_the_bits_of_the_plain_statement():
    problem = Problem([(BF16, n, 0) for n in (*LENGTHS, *LONG)], GROUPS[:1])
    problem.random_moments()
    problem.state(t=7.0)
    problem.random_gradients()
    # The same step in fp32 parameters gives what is to be rounded.
    wide = Problem([(F32, s.numel, 0) for s in problem.plan.segments], GROUPS[:1])
    wide.buffers.steps.copy_(problem.buffers.steps)
    wide.state(t=7.0)
    for i in range(len(problem.params)):
        wide.params[i].copy_(problem.params[i])
        for retention in (False, True):
            wide.segment(i, retention=retention).copy_(problem.segment(i, retention=retention))
        for name in ("m", "v"):
            getattr(wide.buffers, name)[wide.moments(i)] = getattr(problem.buffers, name)[problem.moments(i)]
    Native().run(problem, Modes(rounding="stochastic"))
    Native().run(wide, Modes(rounding="stochastic"))
    for i, p in enumerate(problem.params):
        key = rounding.rounding_key(0, i, 7)
        expected = rounding.stochastic_round_(torch.empty_like(p), wide.params[i], key)
        assert torch.equal(p.view(torch.int16), expected.view(torch.int16)), f"parameter {i}"


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"fp32 and bf16 parameters, got torch\.float16"):
        CpuPlan([3], [F16])


def _step_in_a_child(problem, modes, queue):
    torch.set_num_threads(1)  # torch's own operations would wait for the parent's threads; what is patched still says 2
    Native().run(problem, modes)
    queue.put(problem.params[-1].sum().item())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_too(monkeypatch):
    """A pool of threads that was started before the fork does not exist in the child."""
    monkeypatch.setattr(surgery_adamw_cpu, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    problem = filled()
    problem.random_gradients()
    Native().run(problem, Modes())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_a_child, args=(problem, Modes(), queue))
    child.start()
    found = queue.get(timeout=60)
    child.join(timeout=60)
    Native().run(problem, Modes())
    assert found == problem.params[-1].sum().item()
