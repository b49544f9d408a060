"""The kernel's checks on a GPU: the same as under the interpreter, and what only a device can show."""

import math

import pytest
import torch
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.kernels.layout import SegmentSpec, SurgeryBuffers, SurgeryPlan

from tests.kernels.checks import *  # noqa: F403
from tests.kernels.problems import BF16, F32, Form, Modes, Problem, mixed_problem, small_problem, three_groups

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.fail("-m gpu was asked for and torch sees no CUDA device")
    return "cuda"


@pytest.fixture(params=[Form(True), Form(True, 1), Form(False), Form(False, 5)], ids=str)
def form(request):
    return request.param


def _large(seed=0, **changes):
    sizes = [1 << 20, 3 << 18, 100_003, 77, *[2048 * 3 + i for i in range(60)]]
    specs = [((F32, BF16)[i % 2], n, i % 3) for i, n in enumerate(sizes)]
    problem = Problem(specs, three_groups(), device="cuda", seed=seed)
    problem.state()
    problem.random_gradients()
    problem.settings(**changes)
    return problem


def test_the_barrier_holds_over_many_launches_at_full_grid(device):
    # The counter flips its sign at each launch and is never reset; a lost arrival would hang or change the bits.
    results = []
    for _ in range(2):
        problem = _large()
        for _ in range(200):
            kernel.fused(problem.plan, problem.buffers)
        torch.cuda.synchronize()
        results.append((problem.bytes(), problem.buffers.metrics.tolist()))
    assert results[0] == results[1]
    assert problem.buffers.dual[1] == 200.0


def test_forms_and_grids_agree(device):
    found = []
    for form in (Form(True), Form(True, 7), Form(False), Form(False, 33)):
        problem = _large()
        form.run(problem, Modes())
        found.append(problem)
    for other in found[1:]:
        # Another grid adds the partial sums in another order: 1e-16 in the coefficients, so at most one rounding of
        # their fp32 values, one more of each product and sum behind them.
        assert torch.allclose(other.buffers.metrics, found[0].buffers.metrics, rtol=1e-12, atol=0)
        for p, q in zip(other.params, found[0].params, strict=True):
            assert torch.allclose(p.float(), q.float(), rtol=2 * torch.finfo(p.dtype).eps, atol=1e-7)


def test_a_step_never_waits_for_the_device(device):
    problem = mixed_problem(device)
    problem.state()
    problem.random_gradients()
    kernel.fused(problem.plan, problem.buffers)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-3, 1e-4):
            problem.plan.set_groups([(lr, *row[1:]) for row in problem.plan.groups])
            problem.present([True] * problem.plan.n_segments, [False] * problem.plan.n_segments)
            kernel.fused(problem.plan, problem.buffers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_grid_that_cannot_be_resident_is_refused(device):
    problem = small_problem(device)
    problem.state()
    with pytest.raises(ValueError, match="programs fit"):
        kernel.fused(problem.plan, problem.buffers, grid=kernel.MAX_GRID)


def _step(problem, modes):
    kernel.fused(problem.plan, problem.buffers, **modes.keywords())


def _captured(problem, modes):
    """A graph of one launch; the step before it compiles the variant and uploads the tables."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(problem, modes)
    return graph


def test_a_captured_step_follows_eager_steps_through_new_learning_rates(device):
    # Separate graphs with and without retention; the clock, λ and the numbers of the rounding move on the device.
    kinds = {
        True: Modes(controller="nupi", rounding="stochastic"),
        False: Modes(has_ret=False, controller="nupi", rounding="stochastic"),
    }
    eager, replayed = _large(), _large()
    for modes in kinds.values():
        for problem in (eager, replayed):
            problem.inputs(measured=modes.has_ret)
            _step(problem, modes)
    graphs = {has_ret: _captured(replayed, modes) for has_ret, modes in kinds.items()}
    assert eager.bytes() == replayed.bytes(), "a capture must not take the step"
    for number, lr in enumerate((1e-3, 1e-3, 5e-4, 1e-4, 1e-5)):
        has_ret = number % 2 == 0
        for problem in (eager, replayed):
            problem.generator.manual_seed(number)
            problem.random_gradients()
            problem.inputs(loss=0.5 + number, measured=has_ret)
            problem.plan.set_groups([(lr, *row[1:]) for row in problem.plan.groups])
        _step(eager, kinds[has_ret])
        replayed.plan.flush()
        graphs[has_ret].replay()
        torch.cuda.synchronize()
        assert eager.bytes() == replayed.bytes(), number
        assert torch.equal(eager.buffers.metrics.nan_to_num(-1.0), replayed.buffers.metrics.nan_to_num(-1.0))
    assert replayed.buffers.dual[1] == 7.0


def test_a_capture_refuses_what_it_cannot_record(device):
    problem = _large()
    _step(problem, Modes())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        uploaded = problem.plan.groups
        problem.plan.set_groups([(0.5, *row[1:]) for row in uploaded])
        with pytest.raises(RuntimeError, match="hyperparameters of the groups changed"):
            _step(problem, Modes())
        problem.plan.set_groups(uploaded)
        problem.plan._stale_groups = False  # the device's table is this one again
        with pytest.raises(RuntimeError, match="has not been launched yet"):
            _step(problem, Modes(merge="equal"))
        _step(problem, Modes())
    graph.replay()
    torch.cuda.synchronize()
    assert problem.buffers.dual[1] == 2.0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_norm_and_cosine_at_a_billion_elements(device, dtype):
    # The CPU's twin of this test emulates the order of the sums; here it is the device's own.
    plan = SurgeryPlan([SegmentSpec(dtype, 10**9, 0)], device)
    buffers = SurgeryBuffers.allocate(plan)
    plan.set_addresses([buffers.grads_task[dtype].data_ptr()])  # the reduction does not touch parameters
    plan.set_present([True], [True])
    plan.set_groups([kernel.pack_group(1e-3, 0.9, 0.95, 1e-8, 0.0)])
    buffers.settings.copy_(
        kernel.pack_settings(
            conflict_threshold=-0.1, max_grad_norm=1.0, lambda_lr=0.0, lambda_max=1.0, epsilon_start=1.0,
            epsilon_end=1.0, decay_steps=0,
        )
    )  # fmt: skip
    task, ret = buffers.grads_task[dtype][: 10**9], buffers.grads_ret[dtype][: 10**9]
    gen = torch.Generator(device).manual_seed(0)
    task.normal_(generator=gen)
    ret.normal_(generator=gen).sub_(task, alpha=0.2)
    rows = kernel.reduce(plan, buffers)
    found = buffers.partials[:rows].sum(dim=0).tolist()
    exact = [0.0, 0.0, 0.0]
    for start in range(0, 10**9, 1 << 26):
        t, r = (x[start : start + (1 << 26)].double() for x in (task, ret))
        for k, (x, y) in enumerate(((t, t), (t, r), (r, r))):
            exact[k] += float(x @ y)
    for k in (0, 2):
        assert abs(found[k] - exact[k]) <= 1e-7 * exact[k]
    cos, expected = (tr / math.sqrt(tt) / math.sqrt(rr) for tt, tr, rr in (found, exact))
    assert abs(cos - expected) <= 1e-7
