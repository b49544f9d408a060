"""Everybody who does the work of one step: ours, what SPEC section 6 describes, ablations, peers and lower bounds.

All clip the merged gradient to the same norm, run AdamW with the same settings and start from the same state, so that
they differ in how they reach the update (and the peers in which surgery rule they are published with).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from benchmarks import harness
from benchmarks.harness import (
    BETAS,
    EPS,
    LAMBDA,
    LR,
    MAX_GRAD_NORM,
    STEPS_BEFORE,
    THRESHOLD,
    WEIGHT_DECAY,
    Give,
    Gram,
    Problem,
    Weights,
)
from craft_opt import CraftConfig, CraftOptimizer
from craft_opt import surgery as method
from craft_opt.optimizer._backends import TritonBackend

CONFIG = CraftConfig(initial_lambda=LAMBDA, lambda_lr=0.0, conflict_threshold=THRESHOLD)


def craft_weights(gram: Gram) -> Weights:
    """SPEC section 2: project the task gradient where the cosine is below the threshold, add λ g_r."""
    conflict = gram.tr / math.sqrt(gram.tt) / math.sqrt(gram.rr) < THRESHOLD
    return 1.0, LAMBDA - (gram.tr / gram.rr if conflict else 0.0)


class Contender(ABC):
    """One way to do a step."""

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str]  # ours | baseline | ablation | peer | bound
    floor: ClassVar[str] = "surgery"  # key of STEP_BYTES: what the work cannot do without
    # Bytes a parameter that this way moves, by dtype, where they were counted.
    moves: ClassVar[dict[str, int] | None] = None
    # What more it moves on a CUDA device.
    lands: ClassVar[dict[str, int]] = {"fp32": 0, "bf16": 0}
    tolerance: ClassVar[dict[str, float]] = harness.TOLERANCE
    clips: ClassVar[bool] = True
    needs: ClassVar[str | None] = None  # a package
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "mixed")
    rule: ClassVar[Callable[[Gram], Weights]] = staticmethod(craft_weights)

    def __init__(self, problem: Problem) -> None:
        self.device = problem.device
        self.params: list[Parameter] = problem.parameters()

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Why this contender cannot run here, or None."""
        if cls.needs is not None and find_spec(cls.needs) is None:
            return f"{cls.needs} is not installed: `uv sync --group bench`"
        return None

    @classmethod
    def moved_bytes(cls, case: harness.Case, precision: str, device: str) -> int | None:
        """Bytes that a step moves, or None where they were not counted."""
        if cls.moves is None:
            return None
        landing = case.bytes_of(cls.lands, precision) if device == "cuda" else 0
        return case.bytes_of(cls.moves, precision) + landing

    @abstractmethod
    def run(self, give_ret: Give, give_task: Give) -> None:
        """One step; ``give_ret`` and ``give_task`` leave gradients in ``.grad``. Ends without any ``.grad``."""

    def start(self, optimizer: torch.optim.Optimizer, problem: Problem) -> None:
        """Load the moments that everybody starts from."""
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": problem.adamw_state(), "param_groups": groups})

    def fused_adamw(self, problem: Problem) -> AdamW:
        optimizer = AdamW(self.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
        self.start(optimizer, problem)
        return optimizer


# -- ours --------------------------------------------------------------------------------------------------------


class Craft(Contender):
    """CraftOptimizer as `auto` chooses it: on a CUDA device the one kernel, on a CPU the native loops."""

    name, title, kind = "craft", "CraftOptimizer", "ours"
    moves: ClassVar = {"fp32": 40, "bf16": 28}
    # Both gradients are copied into the flat buffers; on a CPU they are read where they lie.
    lands: ClassVar = {"fp32": 16, "bf16": 8}
    tolerance: ClassVar = harness.TOLERANCE_OURS
    backend: ClassVar[str] = "auto"
    config: ClassVar[CraftConfig] = CONFIG

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = CraftOptimizer(
            self.params,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            config=self.config,
            backend=self.backend,
        )
        self.prepare()
        self.start(self.optimizer, problem)
        self.loss = torch.ones((), device=problem.device)

    def prepare(self) -> None:
        """What a variant changes before the state is loaded."""

    def run(self, give_ret: Give, give_task: Give) -> None:
        with self.optimizer.retention(self.loss):
            give_ret()
        give_task()
        self.optimizer.step()
        self.optimizer.zero_grad()


class CraftTwoPhase(Craft):
    """The same kernel source in two launches, as several devices use it."""

    name, title = "craft_two_phase", "CraftOptimizer, two launches"

    class Backend(TritonBackend):
        def step(self, layout: Any, groups: Any, rule: Any, has_ret: bool) -> None:
            self.apply(layout, groups, rule, has_ret, self.reduce(layout, groups, rule, has_ret))

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "the kernel needs a CUDA device"

    def prepare(self) -> None:
        # On one device the optimizer would choose the single launch: only here is it told otherwise.
        self.optimizer._backends["cuda"] = self.Backend()


class CraftTorch(Craft):
    """Flat tensor operations, where neither kernel runs."""

    name, title, backend = "craft_torch", "CraftOptimizer, torch backend", "torch"
    # Landing 16, dots (three of two operands, from chunks that a cache holds) 8, combining 12, AdamW 28 + 4.
    moves: ClassVar = {"fp32": 16 + 8 + 12 + 32, "bf16": 8 + 4 + 4 + 22}
    lands: ClassVar = {"fp32": 0, "bf16": 0}


class CraftStochastic(Craft):
    """The same with stochastic rounding of bf16 parameters."""

    name, title = "craft_stochastic", "CraftOptimizer, stochastic rounding"
    config = dataclasses.replace(CONFIG, bf16_rounding="stochastic")
    precisions = ("bf16", "mixed")
    # Rounding to one of the two neighbours errs by up to a whole unit in the last place.
    tolerance = harness.TOLERANCE


class CraftPlain(Craft):
    """CraftOptimizer on a step without retention: AdamW with fp32 moments and the clip."""

    name, title, kind = "craft_plain", "CraftOptimizer without retention", "bound"
    floor = "plain"
    moves: ClassVar = {"fp32": 28 + 4, "bf16": 22 + 2}
    lands: ClassVar = {"fp32": 8, "bf16": 4}
    rule = staticmethod(lambda gram: (1.0, 0.0))

    def run(self, give_ret: Give, give_task: Give) -> None:
        give_task()
        self.optimizer.step()
        self.optimizer.zero_grad()


# -- what the report describes, and the same with flat tensors -----------------------------------------------------


class Eager(Contender):
    """SPEC section 6: clone both lists, dots tensor by tensor, three .item(), project, merge, clip, AdamW."""

    name, title, kind = "eager", "eager sequence + AdamW(fused)", "baseline"
    # Clones 16, dots 16, projection 12, merge 12, norm and scaling 12, AdamW 28; AdamW has bf16 moments in bf16.
    moves: ClassVar = {"fp32": 96, "bf16": 8 + 8 + 6 + 6 + 6 + 14}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = self.fused_adamw(problem)

    def run(self, give_ret: Give, give_task: Give) -> None:
        give_ret()
        grads_ret = [_grad(p).clone() for p in self.params]
        self.optimizer.zero_grad()
        give_task()
        grads_task = [_grad(p).clone() for p in self.params]

        pairs = list(zip(grads_task, grads_ret, strict=True))
        dot = torch.stack([torch.dot(t.flatten(), r.flatten()).float() for t, r in pairs]).sum().item()
        norm_t = torch.stack([torch.dot(t.flatten(), t.flatten()).float() for t, _ in pairs]).sum().sqrt().item()
        norm_r = torch.stack([torch.dot(r.flatten(), r.flatten()).float() for _, r in pairs]).sum().sqrt().item()
        if dot / (norm_t * norm_r) < THRESHOLD:
            grads_task = [t - (dot / norm_r**2) * r for t, r in pairs]
        for p, t, r in zip(self.params, grads_task, grads_ret, strict=True):
            p.grad = t + LAMBDA * r
        clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Flat(Contender):
    """Shared by the flat ablations: one buffer a dtype, parameters are views into it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.groups: list[list[int]] = []
        for dtype in dict.fromkeys(p.dtype for p in self.params):
            self.groups.append([i for i, p in enumerate(self.params) if p.dtype == dtype])
        with torch.no_grad():
            self.flat = [torch.cat([self.params[i].flatten() for i in group]) for group in self.groups]
            for flat, group in zip(self.flat, self.groups, strict=True):
                for i, view in zip(group, self.views(flat, group), strict=True):
                    self.params[i].data = view
        self.task = [torch.empty_like(flat) for flat in self.flat]
        self.ret = [torch.empty_like(flat) for flat in self.flat]
        moments = [problem.moments(i) for i in range(len(self.params))]
        self.m = [torch.cat([moments[i][0].flatten() for i in group]) for group in self.groups]
        self.v = [torch.cat([moments[i][1].flatten() for i in group]) for group in self.groups]

    def views(self, flat: Tensor, group: Sequence[int]) -> list[Tensor]:
        parts = flat.split([self.params[i].numel() for i in group])
        return [part.view(self.params[i].shape) for i, part in zip(group, parts, strict=True)]

    def land(self, targets: list[Tensor]) -> None:
        for flat, group in zip(targets, self.groups, strict=True):
            torch._foreach_copy_(self.views(flat, group), [_grad(self.params[i]) for i in group])
        for p in self.params:
            p.grad = None


class FlatEager(Flat):
    """The eager sequence on flat tensors, without waiting for the device."""

    name, title, kind = "flat_eager", "flat eager tensors + AdamW(fused)", "ablation"
    # Landing 16, dots 16, combining 12, AdamW 28 + scaling 8; bf16 moments in bf16.
    moves: ClassVar = {"fp32": 80, "bf16": 8 + 8 + 6 + 4 + 14}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.leaves = [Parameter(flat) for flat in self.flat]
        self.optimizer = AdamW(self.leaves, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
        moments = zip(self.m, self.v, strict=True)
        step = torch.tensor(float(STEPS_BEFORE))
        state = {i: {"step": step, "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in enumerate(moments)}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        del self.m, self.v

    @torch.no_grad()
    def run(self, give_ret: Give, give_task: Give) -> None:
        give_ret()
        self.land(self.ret)
        give_task()
        self.land(self.task)
        pairs = list(zip(self.task, self.ret, strict=True))
        sums = [torch.stack([torch.dot(x, y).double() for x, y in part]).sum() for part in _gram_parts(pairs)]
        rule = method.coefficients(method.Gram(*sums), LAMBDA, CONFIG, MAX_GRAD_NORM)
        for leaf, task, ret in zip(self.leaves, self.task, self.ret, strict=True):
            leaf.grad = task.mul_(rule.clip * rule.a).add_(ret.mul_(rule.clip * rule.b))
        self.optimizer.step()


class FlatCompiled(Flat):
    """The whole step on flat tensors in one torch.compile'd function, moments in fp32."""

    name, title, kind = "flat_compiled", "flat tensors, torch.compile", "ablation"
    moves: ClassVar = {"fp32": 40 + 16, "bf16": 28 + 8}

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
            return "torch.compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.steps = torch.full((), float(STEPS_BEFORE), device=problem.device)
        # One graph a case: sizes are constants of it.
        self.compiled = torch.compile(_flat_step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run(self, give_ret: Give, give_task: Give) -> None:
        give_ret()
        self.land(self.ret)
        give_task()
        self.land(self.task)
        with warnings.catch_warnings():
            # Inductor warns about how it compiles, not about what.
            warnings.simplefilter("ignore")
            self.compiled(self.flat, self.m, self.v, self.task, self.ret, self.steps)


def _gram_parts(pairs: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    return [[(t, t) for t, _ in pairs], [(t, r) for t, r in pairs], [(r, r) for _, r in pairs]]


def _flat_step(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    task: list[Tensor],
    ret: list[Tensor],
    step: Tensor,
) -> None:
    tt = tr = rr = torch.zeros((), device=step.device)
    for t, r in zip(task, ret, strict=True):
        wide_t, wide_r = t.float(), r.float()
        tt, tr, rr = tt + (wide_t * wide_t).sum(), tr + (wide_t * wide_r).sum(), rr + (wide_r * wide_r).sum()
    cos = tr / (tt.sqrt() * rr.sqrt())
    b = LAMBDA - torch.where(cos < THRESHOLD, tr / rr, torch.zeros_like(tr))
    norm = (tt + 2 * b * tr + b * b * rr).clamp(min=0.0).sqrt()
    scale = (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0)
    step += 1
    beta1, beta2 = BETAS
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step).sqrt()
    for p, m, v, t, r in zip(params, exp_avgs, exp_avg_sqs, task, ret, strict=True):
        grad = scale * (t.float() + b * r.float())
        m.copy_(m + (1 - beta1) * (grad - m))
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        p.copy_(p.float() * (1 - LR * WEIGHT_DECAY) - LR / correction1 * m / (v.sqrt() / correction2 + EPS))


# -- peers ---------------------------------------------------------------------------------------------------------


class TorchJD(Contender):
    """torchjd: the two gradients stacked as a Jacobian, an aggregator with our weights, AdamW."""

    name, title, kind, needs = "torchjd", "torchjd, our weights + AdamW(fused)", "peer", "torchjd"
    # jac_to_grad's own switch: add up the Gramians of the tensors instead of concatenating them.
    gramian_sum: ClassVar[bool] = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = self.fused_adamw(problem)
        self.aggregator = self.make_aggregator()

    def make_aggregator(self) -> Any:
        from torchjd.aggregation import GramianWeightedAggregator, Weighting

        class CraftWeighting(Weighting):
            def forward(self, gramian: Tensor, /) -> Tensor:
                gram = method.Gram(gramian[0, 0], gramian[0, 1], gramian[1, 1])
                rule = method.coefficients(gram, LAMBDA, CONFIG, None)
                return torch.stack((rule.a, rule.b)).to(gramian.dtype)

        return GramianWeightedAggregator(CraftWeighting())

    @torch.no_grad()
    def run(self, give_ret: Give, give_task: Give) -> None:
        from torchjd.autojac import jac_to_grad

        give_ret()
        grads_ret = [_grad(p) for p in self.params]
        self.optimizer.zero_grad()
        give_task()
        for p, ret in zip(self.params, grads_ret, strict=True):
            p.jac = torch.stack((_grad(p), ret))
        del grads_ret
        self.optimizer.zero_grad()
        jac_to_grad(self.params, self.aggregator, optimize_gramian_computation=self.gramian_sum)
        clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TorchJDGramianSum(TorchJD):
    name, title, gramian_sum = "torchjd_sum", "torchjd, our weights, Gramians summed + AdamW(fused)", True


class TorchJDDualProj(TorchJD):
    """torchjd's DualProj (GEM, arXiv 1706.08840, equation 11): its own rule, from a quadratic program."""

    name, title = "torchjd_dualproj", "torchjd DualProj + AdamW(fused)"
    # Its solver takes the Gramian through NumPy, which has no bf16.
    precisions = ("fp32", "mixed")

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if find_spec("quadprog") is None:
            return "torchjd's DualProj needs its extra quadprog_projector: `uv sync --group bench`"
        return super().missing(device)

    def make_aggregator(self) -> Any:
        from torchjd.aggregation import DualProj

        return DualProj()

    @staticmethod
    def rule(gram: Gram) -> Weights:
        """Minimise wᵀGw subject to w >= ½, G divided by its trace and with 1e-4 on the diagonal."""
        trace = gram.tt + gram.rr
        tt, rr, tr = gram.tt / trace + 1e-4, gram.rr / trace + 1e-4, gram.tr / trace
        points = [(0.5, 0.5), (0.5, max(0.5, -tr * 0.5 / rr)), (max(0.5, -tr * 0.5 / tt), 0.5)]
        return min(points, key=lambda w: w[0] ** 2 * tt + 2 * w[0] * w[1] * tr + w[1] ** 2 * rr)


class PCGrad(Contender):
    """pytorch_optimizer's PCGrad (arXiv 2001.06782): both gradients projected, mean."""

    name, title, kind = "pcgrad", "pytorch_optimizer PCGrad + AdamW(fused)", "peer"
    needs = "pytorch_optimizer"

    class Objective:
        """A loss whose backward leaves the given gradients."""

        def __init__(self, give: Give) -> None:
            self.give = give

        def backward(self, retain_graph: bool) -> None:
            self.give()

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        from pytorch_optimizer import PCGrad as Wrapper

        self.optimizer = Wrapper(self.fused_adamw(problem))

    @torch.no_grad()
    def run(self, give_ret: Give, give_task: Give) -> None:
        self.optimizer.pc_backward([self.Objective(give_ret), self.Objective(give_task)])
        clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def rule(gram: Gram) -> Weights:
        against = min(gram.tr, 0.0)
        return 0.5 * (1 - against / gram.tt), 0.5 * (1 - against / gram.rr)


class ConFIG(Contender):
    """conflictfree's ConFIG for two gradients (arXiv 2408.11104).

    Its get_gradient_vector grows a vector tensor by tensor (quadratic: seconds for 600 tensors), so one torch.cat makes
    the vectors here, to its advantage.
    """

    name, title, kind, needs = "config", "conflictfree ConFIG + AdamW(fused)", "peer", "conflictfree"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = self.fused_adamw(problem)
        self.network = torch.nn.ParameterList(self.params)
        with warnings.catch_warnings():
            # Backslashes in its docstrings, on the first import.
            warnings.simplefilter("ignore", SyntaxWarning)
            from conflictfree.grad_operator import ConFIG_update_double
            from conflictfree.utils import apply_gradient_vector_para_based
        self.update, self.apply = ConFIG_update_double, apply_gradient_vector_para_based

    @torch.no_grad()
    def run(self, give_ret: Give, give_task: Give) -> None:
        give_ret()
        ret = torch.cat([_grad(p).flatten() for p in self.params])
        self.optimizer.zero_grad()
        give_task()
        task = torch.cat([_grad(p).flatten() for p in self.params])
        self.optimizer.zero_grad()
        self.apply(self.network, self.update(task, ret))
        clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def rule(gram: Gram) -> Weights:
        """½ (‖g_t‖ + ‖g_r‖) (g_t/‖g_t‖ + g_r/‖g_r‖): what its construction comes to for two gradients."""
        norm_t, norm_r = math.sqrt(gram.tt), math.sqrt(gram.rr)
        return (norm_t + norm_r) / (2 * norm_t), (norm_t + norm_r) / (2 * norm_r)

    # The vector is of one dtype, and .grad must have the parameter's.
    precisions = ("fp32", "bf16")


# -- lower bounds --------------------------------------------------------------------------------------------------


class FusedAdamW(Contender):
    """torch.optim.AdamW(fused=True) on the task gradient alone: no surgery, no clip."""

    name, title, kind, floor = "adamw_fused", "AdamW(fused), no surgery, no clip", "bound", "torch_adamw"
    moves = harness.STEP_BYTES["torch_adamw"]
    clips = False
    rule = staticmethod(lambda gram: (1.0, 0.0))

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = self.fused_adamw(problem)

    def run(self, give_ret: Give, give_task: Give) -> None:
        give_task()
        self.optimizer.step()
        self.optimizer.zero_grad()


CONTENDERS: dict[str, type[Contender]] = {
    c.name: c
    for c in (
        Craft,
        CraftTwoPhase,
        CraftTorch,
        CraftStochastic,
        Eager,
        FlatEager,
        FlatCompiled,
        TorchJD,
        TorchJDGramianSum,
        TorchJDDualProj,
        PCGrad,
        ConFIG,
        CraftPlain,
        FusedAdamW,
    )
}


def contenders(device: str, precision: str) -> list[str]:
    """Names of those that have something to show on this device at this precision."""
    return [
        name
        for name, c in CONTENDERS.items()
        if precision in c.precisions and (device == "cuda" or c is not CraftTwoPhase)
    ]


def checked(problem: Problem, name: str) -> tuple[Contender, float]:
    """Make a contender, take two steps and hold them against the fp64 reference; also the relative error of those.

    Skips where the contender cannot run.
    """
    kind = CONTENDERS[name]
    why = kind.missing(problem.device)
    if why is not None:
        pytest.skip(why)
    made = kind(problem)
    for _ in range(2):
        step(made, problem)
    assert all(p.grad is None for p in made.params), f"{name} leaves gradients behind"
    return made, harness.check(problem, made.params, kind.rule, clip=kind.clips, tolerance=kind.tolerance)


def step(made: Contender, problem: Problem) -> None:
    """One step on fresh copies of the problem's gradients."""
    ret, task = harness.clones(problem.ret), harness.clones(problem.task)
    made.run(lambda: harness.place(made.params, ret), lambda: harness.place(made.params, task))


def _grad(p: Parameter) -> Tensor:
    assert p.grad is not None, "every parameter of a case has a gradient"
    return p.grad
