"""What the tests of torch's optimizer contract share: torch's own entry for AdamW, and a reference to step beside."""

import copy
import functools
from unittest import mock

import torch

from craft_opt import CraftOptimizer
from tests.support.asserts import assert_norm_close, ulps_apart
from tests.support.tolerances import ADAMW_NORM

# What CraftOptimizer takes and ignores, and torch's AdamW refuses on some devices.
IGNORED = ("foreach", "fused", "capturable")


@functools.cache
def torch_testing():
    """torch's optimizer tests' own inputs; imported late, because that takes most of ten seconds."""
    # The import freezes the flags of torch.backends for the whole process, and a training run sets some.
    with mock.patch.object(torch.backends, "disable_global_flags", lambda: None):
        from torch.testing._internal import common_optimizers
    return common_optimizers


@functools.cache
def optim_info():
    """The OptimizerInfo of CraftOptimizer: AdamW's entry of torch's ``optim_db``, less what is refused here."""
    db = torch_testing()
    (adamw,) = (info for info in db.optim_db if info.optim_cls is torch.optim.AdamW)
    return db.OptimizerInfo(
        CraftOptimizer,
        optim_inputs_func=adamw.optim_inputs_func,
        optim_error_inputs_func=adamw.optim_error_inputs_func,
        scheduler_inputs=adamw.scheduler_inputs,
        supported_impls=tuple(impl for impl in adamw.supported_impls if impl != "differentiable"),
        not_og_supported_flags=adamw.not_og_supported_flags,
        supports_fused_on=adamw.supports_fused_on,
        has_capturable_arg=adamw.has_capturable_arg,
        supports_complex=False,
        supports_sparse=False,
    )


def optim_inputs(**changes):
    """Constructor arguments of torch's own cases, times foreach and fused: those of its CUDA list too.

    They need no device: tensors as lr and betas, and ``capturable``, mean the same on a CPU here.
    """
    inputs = torch_testing()._get_optim_inputs_including_global_cliquey_kwargs("cuda", torch.float32, optim_info())
    return [{**copy.deepcopy(one.kwargs), **changes} for one in inputs]


def reference_kwargs(kwargs):
    """The same arguments for torch's AdamW on a CPU, which takes no tensor betas there and no ``capturable``."""
    kept = {name: value for name, value in kwargs.items() if name not in (*IGNORED, "backend", "max_grad_norm")}
    if "betas" in kept:
        kept["betas"] = tuple(float(beta) for beta in kept["betas"])
    return {**kept, "foreach": False}


def wide_copy(params):
    """fp32 copies, for a reference that keeps its moments in fp32 whatever the parameters are."""
    return [torch.nn.Parameter(p.detach().float().clone(), requires_grad=p.requires_grad) for p in params]


def assert_close(found, expected, what):
    """fp32: to ADAMW_NORM of the norm. bf16: the same fp32 update rounded once, so at most one unit apart."""
    if found.dtype is torch.bfloat16:
        assert found.numel() == 0 or ulps_apart(found.detach(), expected.detach().bfloat16()) <= 1, what
    else:
        assert_norm_close(found.detach(), expected.detach(), ADAMW_NORM, what)


def lockstep(params, ours, theirs, grads):
    """Give both the same gradients, step both, compare; a bf16 reference goes on from our rounding.

    Args:
        params: (our parameter, the reference's) pairs; those of the reference are fp32.
        ours: CraftOptimizer.
        theirs: torch.optim.AdamW.
        grads: One a pair; None leaves .grad at None.
    """
    for (p, q), grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.to(p.dtype).clone(memory_format=torch.preserve_format)
        q.grad = None if grad is None else p.grad.float().clone()
    ours.step()
    theirs.step()
    compare(params)


def compare(params):
    for i, (p, q) in enumerate(params):
        assert_close(p, q, f"parameter {i}")
        if p.dtype is torch.bfloat16:
            with torch.no_grad():
                q.copy_(p)
