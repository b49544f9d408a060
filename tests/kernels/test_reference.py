"""The fp64 reference that the kernel is held against is itself held against torch and the oracle of the method."""

import pytest
import torch
from craft_opt.kernels import surgery_adamw as kernel

from craft_opt import CraftConfig
from tests.kernels.problems import F32, Modes, Problem, metrics, small_problem
from tests.support.asserts import assert_norm_close
from tests.support.oracle import adamw_oracle, surgery_oracle

# m and v are stored in fp32 whatever the arithmetic: half a unit in the last place each step, 2^-24 relative.
STORED = 2.0**-22


@pytest.mark.parametrize("group", [{}, {"maximize": True}, {"amsgrad": True}, {"beta1": 0.0, "weight_decay": 0.3}])
def test_without_retention_it_is_torchs_adamw(group):
    values = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01, **group}
    amsgrad = group.get("amsgrad", False)
    problem = Problem([(F32, n, 0) for n in (5, 40)], [values], amsgrad=amsgrad)
    problem.settings(max_grad_norm=None)
    problem.state(measured=False)
    params = [p.double() for p in problem.params]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    peer = torch.optim.AdamW(
        theirs, lr=values["lr"], betas=(values["beta1"], values["beta2"]), weight_decay=values["weight_decay"],
        maximize=values.get("maximize", False), amsgrad=amsgrad,
    )  # fmt: skip
    for _ in range(10):
        problem.random_gradients()
        for i, p in enumerate(theirs):
            p.grad = problem.segment(i).double()
        kernel.reference_step(problem.plan, problem.buffers, params, has_ret=False, amsgrad=amsgrad)
        peer.step()
    for ours, p in zip(params, theirs, strict=True):
        assert_norm_close(ours, p.detach(), STORED, str(group))


@pytest.mark.parametrize("merge", kernel.MERGE_MODES)
def test_with_retention_it_is_the_oracle_of_the_method(merge):
    problem = small_problem(seed=3)
    problem.state(lam=0.7)
    problem.random_gradients()
    t = torch.cat([problem.segment(i).double() for i in range(2)])
    r = torch.cat([problem.segment(i, retention=True).double() for i in range(2)])
    oracle = surgery_oracle(t, r, 0.7, CraftConfig(projection_mode=merge), 1.0)
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    before = torch.cat([p.double() for p in problem.params])
    zeros = torch.zeros_like(before)
    p, m, v = adamw_oracle(before, zeros, zeros, oracle.clip * oracle.merged, 1, group)
    params = [p.double() for p in problem.params]
    kernel.reference_step(problem.plan, problem.buffers, params, **Modes(merge).keywords())
    found = metrics(problem)
    assert oracle.conflict
    for name, value in (("a", oracle.a), ("b", oracle.b), ("grad_norm", oracle.norm), ("clip_scale", oracle.clip)):
        assert found[name] == pytest.approx(value, rel=1e-12)
    assert_norm_close(torch.cat(params), p, 1e-12, "parameters")
    for name, flat, expected in (("m", problem.buffers.m, m), ("v", problem.buffers.v, v)):
        assert_norm_close(torch.cat([flat[problem.moments(i)] for i in range(2)]), expected, STORED, name)
