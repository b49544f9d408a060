"""Gradients for tests: every rank case at every scale, reproducible from a seed."""

import torch

SCALES = (1e-8, 1e-4, 1.0, 1e4, 1e8)
RANK_CASES = ("zero_task", "zero_ret", "both_zero", "parallel", "opposite", "orthogonal", "obtuse", "acute", "random")
SHAPES = ((3, 5), (17,), (), (2, 3, 4))


def gradient_pair(case: str, scale_task: float = 1.0, scale_ret: float = 1.0, seed: int = 0, shapes=SHAPES):
    """Two lists of fp32 gradients whose joint vectors stand in the named relation."""
    gen = torch.Generator().manual_seed(seed)
    numel = [torch.Size(s).numel() for s in shapes]
    t = torch.randn(sum(numel), generator=gen, dtype=torch.float64)
    r = torch.randn(sum(numel), generator=gen, dtype=torch.float64)
    perp = r - (r @ t) / (t @ t) * t
    perp = perp * (t.norm() / perp.norm())
    if case == "zero_task":
        t = torch.zeros_like(t)
    elif case == "zero_ret":
        r = torch.zeros_like(r)
    elif case == "both_zero":
        t, r = torch.zeros_like(t), torch.zeros_like(r)
    elif case == "parallel":
        r = 0.7 * t
    elif case == "opposite":
        r = -0.7 * t
    elif case == "orthogonal":
        r = perp
    elif case == "obtuse":
        r = -t + 0.8 * perp
    elif case == "acute":
        r = t + 0.8 * perp
    elif case != "random":
        raise ValueError(f"unknown case {case!r}")
    t, r = (t * scale_task).float(), (r * scale_ret).float()
    return (
        [x.reshape(s) for x, s in zip(t.split(numel), shapes, strict=True)],
        [x.reshape(s) for x, s in zip(r.split(numel), shapes, strict=True)],
    )


def flat64(grads):
    return torch.cat([g.reshape(-1).double() for g in grads])
