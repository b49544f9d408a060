"""A parameter that the retention loss never reaches must not meet its own old gradient as a retention gradient."""

import math

import torch

from craft_opt import CraftConfig, CraftOptimizer


def test_a_parameter_without_retention_gradient_stays_without_one_over_many_steps():
    torch.manual_seed(0)
    shared, head = torch.nn.Parameter(torch.randn(7)), torch.nn.Parameter(torch.randn(5))
    opt = CraftOptimizer([shared, head], lr=1e-2, config=CraftConfig(use_grad_projection=False), backend="auto")
    for _ in range(3):
        task, retention = torch.randn(7), torch.randn(7)
        with opt.retention(shared @ retention):
            (shared @ retention).backward()
        (shared @ task + head.sum()).backward()
        opt.step()
        opt.zero_grad()
        assert math.isclose(opt.metrics().dot.item(), (task @ retention).item(), rel_tol=1e-5)


def test_a_skipped_step_leaves_nothing_behind_for_a_parameter_without_retention_gradient():
    shared, head = torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(5))
    opt = CraftOptimizer([shared, head], lr=1e-2, backend="auto")
    skipped = []
    for factor in (1.0, math.nan, 1.0, 1.0):
        with opt.retention(shared.sum()):
            shared.sum().backward()
        (factor * (shared.sum() + head.sum())).backward()
        opt.step()
        opt.zero_grad()
        skipped.append(bool(opt.metrics().skipped))
    assert skipped == [False, True, False, False]
