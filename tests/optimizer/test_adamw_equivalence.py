"""Without retention CraftOptimizer is torch.optim.AdamW."""

import copy

import pytest
import torch

from craft_opt import CraftOptimizer
from tests.optimizer.models import batches, make_model, task_loss
from tests.support.asserts import assert_norm_close, ulps_apart
from tests.support.oracle import adamw_oracle
from tests.support.tolerances import ADAMW_NORM

OPTIONS = [
    {},
    {"lr": 3e-3},
    {"betas": (0.8, 0.95)},
    {"betas": (0.0, 0.0)},
    {"eps": 1e-3},
    {"weight_decay": 0.3},
    {"weight_decay": 0.0},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "eps": 1e-6},
]


def recorded_gradients(model, steps, scale=1.0):
    """The same gradients for every contender: taken along a plain AdamW run."""
    model = copy.deepcopy(model)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = []
    for batch in batches(steps):
        opt.zero_grad()
        (scale * task_loss(model, batch)).backward()
        record.append([p.grad.clone() for p in model.parameters()])
        opt.step()
    return record


def replay(model, opt, record):
    for grads in record:
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.clone()
        opt.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_100_steps_on_the_same_gradients(options):
    start = make_model()
    record = recorded_gradients(start, 100)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    replay(ours, CraftOptimizer(ours.parameters(), max_grad_norm=None, backend="auto", **options), record)
    replay(theirs, torch.optim.AdamW(theirs.parameters(), **options), record)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_norm_close(p.detach(), q.detach(), ADAMW_NORM, name)


def test_param_groups_with_their_own_options():
    start = make_model()
    record = recorded_gradients(start, 100)

    def groups(model):
        params = list(model.parameters())
        return [
            {"params": params[:2], "lr": 1e-2, "weight_decay": 0.2},
            {"params": params[2:4], "betas": (0.7, 0.9), "eps": 1e-5, "amsgrad": True},
            {"params": params[4:], "maximize": True},
        ]

    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    replay(ours, CraftOptimizer(groups(ours), max_grad_norm=None, backend="auto"), record)
    replay(theirs, torch.optim.AdamW(groups(theirs)), record)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_norm_close(p.detach(), q.detach(), ADAMW_NORM, name)


@pytest.mark.parametrize("bound", [0.05, 1e3])
def test_clipping_is_that_of_torch(bound):
    start = make_model()
    record = recorded_gradients(start, 100)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    replay(ours, CraftOptimizer(ours.parameters(), max_grad_norm=bound, backend="auto"), record)
    reference = torch.optim.AdamW(theirs.parameters())
    for grads in record:
        for p, g in zip(theirs.parameters(), grads, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_norm_close(p.detach(), q.detach(), ADAMW_NORM, name)


def test_clipping_leaves_the_callers_gradients_as_they_were():
    model = make_model()
    opt = CraftOptimizer(model.parameters(), max_grad_norm=1e-3, backend="auto")
    task_loss(model, batches(1)[0]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_updates_lie_within_one_ulp_of_fp32_moments(dtype):
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(5000).to(dtype))
    opt = CraftOptimizer([p], lr=1e-2, weight_decay=0.1, max_grad_norm=None, backend="auto")
    for step in range(1, 21):
        grad = torch.randn(5000).to(dtype)
        state = opt.state[p]
        m = state["exp_avg"].clone() if state else torch.zeros(5000)
        v = state["exp_avg_sq"].clone() if state else torch.zeros(5000)
        expected, _, _ = adamw_oracle(p.detach(), m, v, grad.double(), step, opt.param_groups[0])
        p.grad = grad
        opt.step()
        assert ulps_apart(p.detach(), expected.to(dtype)) <= 1
        assert opt.state[p]["exp_avg"].dtype == torch.float32


def test_lr_schedulers_and_tensor_lr():
    start = make_model()
    record = recorded_gradients(start, 20)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    for model, make in (
        (ours, lambda p: CraftOptimizer(p, max_grad_norm=None, backend="auto", lr=torch.tensor(1e-2))),
        (theirs, lambda p: torch.optim.AdamW(p, lr=1e-2)),
    ):
        opt = make(model.parameters())
        sched = torch.optim.lr_scheduler.SequentialLR(
            opt,
            [
                torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
                torch.optim.lr_scheduler.CosineAnnealingLR(opt, 15),
            ],
            milestones=[5],
        )
        for grads in record:
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g.clone()
            opt.step()
            sched.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_norm_close(p.detach(), q.detach(), ADAMW_NORM, name)


def test_closure_runs_with_gradients_and_returns_its_loss():
    model = make_model()
    opt = CraftOptimizer(model.parameters(), backend="auto")
    batch = batches(1)[0]

    def closure():
        opt.zero_grad()
        loss = task_loss(model, batch)
        loss.backward()
        return loss

    before = task_loss(model, batch).item()
    assert opt.step(closure).item() == before
    assert task_loss(model, batch).item() < before
