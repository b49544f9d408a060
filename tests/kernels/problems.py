"""Problems for the kernel's tests: a layout with parameters and filled buffers, and the error bound of one step."""

import copy
import math
from dataclasses import dataclass

import torch
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.kernels.layout import DEFAULT_CONFIG, LaunchConfig, SegmentSpec, SurgeryBuffers, SurgeryPlan

F32, BF16, F16 = kernel.SUPPORTED_DTYPES

# Few, large programs for the interpreter, which pays per operation and not per element. Segments of more than 512
# elements still span several tiles.
INTERPRETER_CONFIG = LaunchConfig(block=512, reduce_block=8192)

# Lengths with every remainder that matters: nothing but a tail, whole groups, one past and one before, several tiles.
LENGTHS = (1, 15, 16, 17, 33, 512, 513, 1100, 0, 1040)


@dataclass(frozen=True)
class Modes:
    """The keyword arguments of a launch."""

    merge: str = "weighted"
    project: bool = True
    schedule: str = "linear"
    has_ret: bool = True
    amsgrad: bool = False
    controller: str = "ascent"
    rounding: str = "nearest"

    def keywords(self):
        return dict(vars(self))


@dataclass(frozen=True)
class Form:
    """How to launch: one kernel or two phases, and the grid."""

    fused: bool
    grid: int | None = None

    def __str__(self):
        return f"{'fused' if self.fused else 'two-phase'}-{self.grid or 'full'}"

    def run(self, problem, modes):
        arguments = (problem.plan, problem.buffers)
        if self.fused:
            kernel.fused(*arguments, **modes.keywords(), grid=self.grid)
            return
        rows = kernel.reduce(*arguments, **modes.keywords(), grid=self.grid)
        kernel.apply(*arguments, n_partials=rows, **modes.keywords(), grid=self.grid)


class Problem:
    """Parameters, gradients and state of one device, filled from a seed."""

    def __init__(self, specs, groups, device="cpu", seed=0, amsgrad=False, config=None):
        if config is None:
            config = INTERPRETER_CONFIG if torch.device(device).type == "cpu" else DEFAULT_CONFIG
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.plan = SurgeryPlan([SegmentSpec(*spec) for spec in specs], device, config)
        self.buffers = SurgeryBuffers.allocate(self.plan, amsgrad=amsgrad)
        self.params = [self._normal(spec.numel).to(spec.dtype) for spec in self.plan.segments]
        self.plan.set_addresses([p.data_ptr() for p in self.params])
        self.plan.set_groups([kernel.pack_group(**group) for group in groups])
        everyone = [True] * len(self.params)
        self.present(everyone, everyone)
        self.settings()

    def _normal(self, numel):
        return torch.randn(numel, generator=self.generator).to(self.device)

    def settings(self, **changes):
        values = {
            "conflict_threshold": -0.1,
            "max_grad_norm": 1.0,
            "lambda_lr": 0.05,
            "lambda_max": 10.0,
            "epsilon_start": 1.0,
            "epsilon_end": 0.5,
            "decay_steps": 3,
        }
        self.buffers.settings.copy_(kernel.pack_settings(**{**values, **changes}))
        return self

    def present(self, task, retention):
        self.plan.set_present(task, retention)

    def state(
        self, lam=0.7, t=0.0, loss=0.9, measured=True, scale=1.0, found_inf=0.0, weight=1.0, ema=math.nan, xi=math.nan
    ):
        self.buffers.dual.copy_(torch.tensor([lam, t, 0.0, ema, xi], dtype=torch.float64))
        self.inputs(loss, measured, scale, found_inf, weight)

    def inputs(self, loss=0.9, measured=True, scale=1.0, found_inf=0.0, weight=1.0):
        values = [loss, scale, found_inf, float(measured), weight]
        self.buffers.step_in.copy_(torch.tensor(values, dtype=torch.float64))

    def segment(self, index, retention=False):
        spec = self.plan.segments[index]
        flat = (self.buffers.grads_ret if retention else self.buffers.grads_task)[spec.dtype]
        start = self.plan.grad_offset[index]
        return flat[start : start + spec.numel]

    def moments(self, index):
        start = self.plan.moment_offset[index]
        return slice(start, start + self.plan.segments[index].numel)

    def random_gradients(self, scale_task=1.0, scale_ret=1.0, lean=-0.5):
        """Fill the segments that are present; `lean` < 0 makes the two gradients disagree."""
        for index, spec in enumerate(self.plan.segments):
            task, ret = self._normal(spec.numel), self._normal(spec.numel) + lean * self._normal(spec.numel)
            ret += lean * task
            self.segment(index).copy_(scale_task * task * self.plan.task_present[index])
            self.segment(index, retention=True).copy_(scale_ret * ret * self.plan.retention_present[index])

    def random_moments(self, scale=0.1):
        """State of a run under way: moments and step counts that differ between segments."""
        for index, spec in enumerate(self.plan.segments):
            part = self.moments(index)
            self.buffers.m[part] = scale * self._normal(spec.numel)
            self.buffers.v[part] = (scale * self._normal(spec.numel)).square()
            if self.buffers.vmax is not None:
                self.buffers.vmax[part] = self.buffers.v[part] * self._normal(spec.numel).abs()
            self.buffers.steps[index] = 3 * index

    def twin(self):
        """The same problem in tensors of its own, with parameters in fp64: what the reference works on."""
        other = copy.copy(self)
        other.buffers = copy.deepcopy(self.buffers)
        other.params = [p.double() for p in self.params]
        return other

    def bytes(self):
        """Everything a skipped step must leave alone."""
        dual = self.buffers.dual[[0, 1, 3, 4]]
        tensors = [*self.params, self.buffers.m, self.buffers.v, self.buffers.steps, dual]
        if self.buffers.vmax is not None:
            tensors.append(self.buffers.vmax)
        return [t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def metrics(problem):
    return dict(zip(kernel.METRIC_NAMES, problem.buffers.metrics.tolist(), strict=True))


def assert_close(found, expected, bound, what):
    error = (found.double() - expected.double()).abs()
    worst = torch.nan_to_num(error - bound, nan=math.inf)
    assert bool((worst <= 0).all()), (
        f"{what}: element {int(worst.argmax())} is off by {float(error[worst.argmax()]):.3g}, "
        f"allowed {float(bound[worst.argmax()]):.3g}"
    )


def step_and_compare(problem, modes, form):
    """Take one step with the kernel and one with the fp64 reference, and hold every element to its error bound.

    u = 2^-24 is the rounding of one fp32 operation. The kernel forms g from fp32 coefficients: two products, their own
    rounding and a sum, so |dg| <= 4u G with G = |a s||g_t| + |b s||g_r|. m takes one product and two sums of terms of
    size |m| + G: |dm| <= 4u G + 4u (|m| + G) <= 8u (|m| + G). v likewise: |dv| <= 2 G |dg| + 4u (v + G^2)
    <= 12u (v + G^2). The step q = m / (sqrt(v) / sqrt(c2) + eps) inherits dm / denominator and, through the root, half
    the relative error of v, plus its own operations: six at most, and 3u more for the approximate roots of 16-bit
    parameters. p rounds three times in fp32, then once in its own dtype: to nearest, or to either neighbour.
    """
    u = 2.0**-24
    reference = problem.twin()
    before = problem.twin()
    kernel.reference_step(reference.plan, reference.buffers, reference.params, **modes.keywords())
    form.run(problem, modes)
    expected = metrics(reference)
    compare_metrics(metrics(problem), expected)
    assert torch.equal(problem.buffers.steps, reference.buffers.steps), "steps"
    # λ, L̄ and ξ: a few operations in fp64 from a Gram matrix that they do not depend on.
    dual = (problem.buffers.dual, reference.buffers.dual)
    assert torch.allclose(*dual, rtol=1e-14, atol=1e-14, equal_nan=True), dual
    a, b = (abs(expected[name]) * expected["clip_scale"] for name in ("a", "b"))
    scale = float(before.buffers.step_in[1])
    for index, spec in enumerate(problem.plan.segments):
        part = problem.moments(index)
        size = a * problem.segment(index).double().abs()
        if modes.has_ret:
            size += b * problem.segment(index, retention=True).double().abs()
        size /= scale
        m0, v0 = before.buffers.m[part].double().abs(), before.buffers.v[part].double()
        m, v = reference.buffers.m[part].double(), reference.buffers.v[part].double()
        dm, dv = 8 * u * (m0 + size), 12 * u * (v0 + size.square())
        # Below fp32's smallest normal number, 1.2e-38, rounding is absolute.
        tiny = 2.0**-149
        assert_close(problem.buffers.m[part], m, dm + 4 * tiny, f"m of segment {index}")
        assert_close(problem.buffers.v[part], v, dv + 4 * tiny, f"v of segment {index}")
        group = problem.plan.groups[spec.group]
        lr, beta1, beta2, eps = group[:4]
        if modes.amsgrad and group[6]:
            top = reference.buffers.vmax[part].double()
            dv = dv + 2 * u * top
            assert_close(problem.buffers.vmax[part], top, dv + 4 * tiny, f"vmax of segment {index}")
            v = top
        step = float(before.buffers.steps[index]) + 1.0
        denominator = (v.sqrt() / math.sqrt(1.0 - beta2**step) + eps).clamp(min=1e-300)
        relative = 0.5 * dv / v.clamp(min=1e-300) * (v > 0) + (6 if spec.dtype == F32 else 9) * u
        rate = lr / (1.0 - beta1**step)
        dp = 4 * u * before.params[index].abs() + rate / denominator * (dm + m.abs() * relative)
        # The unit in the last place of the result: half of it for rounding once to nearest.
        stochastic = modes.rounding == "stochastic" and spec.dtype == BF16
        share = 1.0 if stochastic else 0.5
        dp += share * torch.finfo(spec.dtype).eps * reference.params[index].abs() * (1 + 1e-3)
        dp += torch.finfo(spec.dtype).smallest_normal * torch.finfo(spec.dtype).eps
        assert_close(problem.params[index], reference.params[index], dp, f"{spec.dtype} parameter {index}")


def compare_metrics(found, expected):
    """Sums in another order: n <= 1e7 terms, each rounded to 2^-53, so 1e-9 of the sums of absolute products."""
    size = expected["tt"] + (0.0 if math.isnan(expected["rr"]) else expected["rr"])
    weight = (abs(expected["a"]) + abs(expected["b"])) ** 2
    for name, value in expected.items():
        if math.isnan(value):
            assert math.isnan(found[name]), f"{name}: found {found[name]}, expected NaN"
            continue
        bound = 1e-9 * max(abs(value), 1e-300)
        if name == "dot":
            bound = 1e-9 * size
        elif name == "grad_norm":
            # d(norm) <= sqrt(d(norm^2)) where the two gradients cancel.
            bound = min(math.sqrt(1e-9 * weight * size), 1e-9 * weight * size / max(value, 1e-300)) + bound
        elif name == "cos":
            bound = 1e-9
        assert abs(found[name] - value) <= bound, f"{name}: found {found[name]!r}, expected {value!r}"


def three_groups(amsgrad=False):
    """Three parameter groups that differ in everything; one maximizes, one may use AMSGrad."""
    return [
        {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01},
        {"lr": 3e-3, "beta1": 0.0, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0, "maximize": True},
        {"lr": 1e-3, "beta1": 0.4, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.3, "amsgrad": amsgrad},
    ]


def mixed_problem(device="cpu", seed=0, amsgrad=False, dtypes=(F32, BF16, F16), lengths=LENGTHS):
    """Segments of every length in every dtype, spread over three groups."""
    specs = [(dtype, length, (i + j) % 3) for i, length in enumerate(lengths) for j, dtype in enumerate(dtypes)]
    # A group without a parameter would shrink the table; an empty parameter holds the place.
    specs.append((dtypes[0], 0, 2))
    return Problem(specs, three_groups(amsgrad), device=device, seed=seed, amsgrad=amsgrad)


def small_problem(device="cpu", seed=0, lengths=(20, 37), dtype=F32, **group):
    values = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01, **group}
    return Problem([(dtype, length, 0) for length in lengths], [values], device=device, seed=seed)
