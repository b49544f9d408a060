"""Where parameters, gradients and moments of one device lie, and the device tables that tell the kernel so.

Plain torch: the torch backend and machines without triton use the same layout.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP_IN_NAMES = ("retention_loss", "grad_scale", "found_inf", "measured", "ret_weight")
DUAL_NAMES = ("lam", "t", "skipped_total", "ema", "xi")
METRIC_NAMES = (
    "dot",
    "cos",
    "conflict",
    "grad_norm",
    "lam_before",
    "lam_after",
    "epsilon",
    "retention_loss",
    "skipped",
    "skipped_total",
    "a",
    "b",
    "clip_scale",
    "tt",
    "rr",
    "t",
)
GROUP_COLUMNS = 10
SETTINGS_SIZE = 11
MAX_GRID = 2048  # rows of partial sums; 148 SMs (B200) hold at most 148·8 programs of 256 threads

ALIGN = 16  # elements: 32 bytes of bf16, 64 of fp32, so that every segment starts on a 128-bit boundary
_GRAD_MULTIPLE = 8192  # every reduce block divides it, so the layout of the state does not depend on a tuning knob
TABLE_COLUMNS = 10
TAIL_COLUMNS = 4
HYPER_COLUMNS = 16


@dataclass(frozen=True)
class LaunchConfig:
    """Numbers of the launch, chosen from the ahead-of-time reports in benchmarks/results/aot_*.json.

    No autotuning: a kernel that updates in place cannot be tried twice on the same data.

    Attributes:
        num_warps: 8. With 4, twice as many programs would add twice as many rows of partial sums and
            arrivals at the barrier.
        block: Elements of a tile of the update, 8 a thread: one 128-bit access of bf16, two of fp32. 16 a thread (4096)
            take over 100 registers, so half as many programs are resident and no more bytes are in flight.
        reduce_block: Elements of a tile of the reduction, from each of the two buffers. 4096 with the next tile
            on its way would make the reduction, not the update, decide the kernel's registers.
        vec_32bit: Consecutive elements a thread holds of an fp32 tile (4 = 128 bits).
        vec_16bit: The same for bf16 and fp16 (8 = 128 bits). m and v then change their layout through shared memory
            on the way out; 4 would do without, at 64 bits an access. To be measured on a GPU.
        register_ceilings: Ceilings on a thread's registers, tried in this order until a variant does not spill. Under
            64 a multiprocessor holds 4 programs (32 warps): all but AMSGrad, three dtypes at once, some variants with
            two, and stochastic rounding on sm_80 and sm_100. Under 80 it holds 3, under 128 two.
    """

    num_warps: int = 8
    block: int = 2048
    reduce_block: int = 2048
    vec_32bit: int = 4
    vec_16bit: int = 8
    register_ceilings: tuple[int, ...] = (64, 80, 128)

    def __post_init__(self) -> None:
        for name in ("num_warps", "block", "reduce_block"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"LaunchConfig.{name}={value}: needs a power of two")
        if self.block < ALIGN or _GRAD_MULTIPLE % self.reduce_block:
            raise ValueError(
                f"LaunchConfig(block={self.block}, reduce_block={self.reduce_block}): block needs at least {ALIGN}, "
                f"and reduce_block must divide {_GRAD_MULTIPLE}"
            )


DEFAULT_CONFIG = LaunchConfig()


@dataclass(frozen=True)
class SegmentSpec:
    """One parameter as the kernel sees it: `numel` elements of `dtype` in parameter group `group`.

    `stream` numbers the parameter's random numbers for stochastic rounding, in [0, 2^32); None takes the position in
    the plan. A number that outlives the plan makes every layout of the same parameters round alike.
    """

    dtype: torch.dtype
    numel: int
    group: int
    stream: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"parameter dtype {self.dtype}: CRaFT updates {', '.join(map(str, SUPPORTED_DTYPES))}")
        if self.numel < 0 or self.group < 0:
            raise ValueError(f"numel={self.numel}, group={self.group}: neither may be negative")
        if self.stream is not None and not 0 <= self.stream < 2**32:
            raise ValueError(f"stream={self.stream}: needs a number in [0, 2^32)")


def pack_group(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    amsgrad: bool = False,
) -> tuple[float, ...]:
    """Return the row of `GROUP_COLUMNS` doubles that describes one parameter group to the kernel."""

    def log(beta: float) -> float:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta={beta}: needs 0 <= beta < 1")
        return math.log(beta) if beta > 0.0 else -math.inf

    sign = -1.0 if maximize else 1.0
    return (lr, beta1, beta2, eps, weight_decay, sign, float(amsgrad), log(beta1), log(beta2), 0.0)


def pack_settings(
    *,
    conflict_threshold: float,
    max_grad_norm: float | None,
    lambda_lr: float,
    lambda_max: float,
    epsilon_start: float,
    epsilon_end: float,
    decay_steps: float,
    nupi_kp: float = 0.0,
    nupi_nu: float = 0.0,
    retention_ema: float = 0.0,
    rounding_seed: int = 0,
) -> Tensor:
    """Return what to copy into `SurgeryBuffers.settings`: fp64 `[SETTINGS_SIZE]`, on the CPU.

    `max_grad_norm` None, ≤ 0 or infinite means no clip; `decay_steps` ≤ 0 holds ε at `epsilon_start`.

    Raises:
        ValueError: `rounding_seed` is no number in [0, 2^32).
    """
    if not 0 <= rounding_seed < 2**32:
        raise ValueError(f"rounding_seed={rounding_seed}: needs a number in [0, 2^32)")
    clip = 0.0 if max_grad_norm is None else float(max_grad_norm)
    row = [
        conflict_threshold, clip, lambda_lr, lambda_max, epsilon_start, epsilon_end, decay_steps, nupi_kp, nupi_nu,
        retention_ema, rounding_seed,
    ]  # fmt: skip
    return torch.tensor(row, dtype=torch.float64, device="cpu")


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    # Without a driver the second question is an error.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# Explicitly on the CPU: a caller may have set another default device.
_host_tensor = functools.partial(torch.tensor, device="cpu")


class SurgeryPlan:
    """Where every parameter of one device lies in the flat buffers, and the device tables that say so.

    Segments of one dtype share a pair of flat gradient buffers; all segments share the moments. Every segment starts at
    a multiple of 16 elements, so that accesses stay 128 bits wide; what lies between segments is zero for ever.

    Attributes:
        segments: The parameters, in the order of all lists below.
        device: Where the tables live, and the buffers and parameters must.
        dtypes: The parameter dtypes present, in the order of `SUPPORTED_DTYPES`.
        grad_offset: First element of each segment in the gradient buffers of its dtype.
        moment_offset: First element of each segment in m, v and vmax.
        grad_numel: Length of the gradient buffers by dtype.
        moment_numel: Length of m, v and vmax.
        n_segments: Number of segments.
        streams: The number under which each segment draws for stochastic rounding.
        config: Launch configuration that the tile maps were built for.
    """

    def __init__(
        self,
        segments: Sequence[SegmentSpec],
        device: torch.device | str,
        config: LaunchConfig = DEFAULT_CONFIG,
    ) -> None:
        if not segments:
            raise ValueError("a SurgeryPlan needs at least one parameter, got none")
        self.segments = tuple(segments)
        self.device = torch.device(device)
        self.config = config
        self.n_segments = len(self.segments)
        self.streams = [i if segment.stream is None else segment.stream for i, segment in enumerate(self.segments)]
        present = {segment.dtype for segment in self.segments}
        self.dtypes = tuple(dtype for dtype in SUPPORTED_DTYPES if dtype in present)

        self.grad_offset: list[int] = []
        self.moment_offset: list[int] = []
        grad_end = dict.fromkeys(self.dtypes, 0)
        moment_end = 0
        first_tile: list[int] = []
        self.tiles = dict.fromkeys(SUPPORTED_DTYPES, 0)
        tile_owner: dict[torch.dtype, list[tuple[int, int]]] = {dtype: [] for dtype in SUPPORTED_DTYPES}
        self.tail_segments: dict[torch.dtype, list[int]] = {dtype: [] for dtype in SUPPORTED_DTYPES}
        for index, segment in enumerate(self.segments):
            room = round_up(segment.numel, ALIGN)
            self.grad_offset.append(grad_end[segment.dtype])
            self.moment_offset.append(moment_end)
            grad_end[segment.dtype] += room
            moment_end += room
            tiles = -(-(segment.numel // ALIGN * ALIGN) // config.block)
            first_tile.append(self.tiles[segment.dtype])
            tile_owner[segment.dtype].append((index, tiles))
            self.tiles[segment.dtype] += tiles
            if segment.numel % ALIGN:
                self.tail_segments[segment.dtype].append(index)
        self.grad_numel = {dtype: round_up(end, _GRAD_MULTIPLE) for dtype, end in grad_end.items()}
        self.moment_numel = moment_end
        self.tail_order = [index for dtype in SUPPORTED_DTYPES for index in self.tail_segments[dtype]]

        owners = [pair for dtype in SUPPORTED_DTYPES for pair in tile_owner[dtype]]
        tile_seg = torch.repeat_interleave(
            _host_tensor([index for index, _ in owners], dtype=torch.int32),
            _host_tensor([tiles for _, tiles in owners], dtype=torch.int64),
        )
        # Kernel arguments may not be empty tensors: Triton would see a null pointer.
        self.tile_seg = torch.cat([tile_seg, tile_seg.new_zeros(1)]).to(self.device)
        # Host copies of the device tables. The columns, in the kernel's order: address, offsets in the gradient and
        # moment buffers (all three as if the segment began at tile 0), end with and without retention, who is present,
        # group, length of the tail, stream, offset in the moment buffers as it is. Tails: address, offsets, segment.
        numel = _host_tensor([segment.numel for segment in self.segments], dtype=torch.int64)
        self._itemsize = _host_tensor([segment.dtype.itemsize for segment in self.segments], dtype=torch.int64)
        self._whole = numel // ALIGN * ALIGN
        self._tile_start = _host_tensor(first_tile, dtype=torch.int64) * config.block
        offsets = _host_tensor([self.grad_offset, self.moment_offset], dtype=torch.int64).T
        self._host_table = torch.zeros((self.n_segments, TABLE_COLUMNS), dtype=torch.int64, device="cpu")
        self._host_table[:, 1:3] = offsets - self._tile_start[:, None]
        self._host_table[:, 6] = _host_tensor([segment.group for segment in self.segments])
        self._host_table[:, 7] = numel % ALIGN
        self._host_table[:, 8] = _host_tensor(self.streams, dtype=torch.int64)
        self._host_table[:, 9] = offsets[:, 1]
        self._host_tails = torch.zeros((len(self.tail_order), TAIL_COLUMNS), dtype=torch.int64, device="cpu")
        self._host_tails[:, 3] = _host_tensor(self.tail_order, dtype=torch.int64)
        self._host_tails[:, 1:3] = (offsets + self._whole[:, None])[self._host_tails[:, 3]]

        new = functools.partial(torch.zeros, device=self.device)
        self.table = new((self.n_segments, TABLE_COLUMNS), dtype=torch.int64)
        self.tails = new((len(self.tail_order) + 1, TAIL_COLUMNS), dtype=torch.int64)
        n_groups = 1 + max(segment.group for segment in self.segments)
        self.group_table = new((n_groups, GROUP_COLUMNS), dtype=torch.float64)
        self.hyper = new((self.n_segments, HYPER_COLUMNS), dtype=torch.float32)
        self.dual_in = new(len(DUAL_NAMES), dtype=torch.float64)
        self.barrier = new(1, dtype=torch.int32)
        self.fit: dict[tuple[Any, ...], tuple[int, int]] = {}

        self.addresses: list[int] | None = None
        self.task_present: list[bool] | None = None
        self.retention_present: list[bool] | None = None
        self.groups: list[tuple[float, ...]] | None = None
        self._stale_addresses = self._stale_table = self._stale_groups = True

    def set_addresses(self, addresses: Sequence[int]) -> None:
        """Say where the parameters lie: `data_ptr()` of each, dense and 16-byte aligned.

        Raises:
            ValueError: Wrong count, or an address that 128-bit accesses cannot use.
        """
        addresses = list(addresses)
        if addresses == self.addresses:
            return
        self._check_count("addresses", len(addresses))
        for index, address in enumerate(addresses):
            if address % 16 or (address == 0 and self.segments[index].numel):
                raise ValueError(
                    f"parameter {index} lies at address {address:#x}: the kernel needs a multiple of 16; "
                    "give it a tensor of its own (`.clone()`) and copy back"
                )
        self.addresses = addresses
        self._stale_addresses = True

    def set_present(self, task: Sequence[bool], retention: Sequence[bool] | None) -> None:
        """Say which parameters each loss reached; a parameter that neither reached is left untouched.

        `retention` None is for a launch with `has_ret=False`, which does not ask: what was said last stays, so that
        steps and graphs with and without retention take turns on one table.
        """
        if retention is None:
            retention = [False] * self.n_segments if self.retention_present is None else self.retention_present
        task, retention = list(task), list(retention)
        if task == self.task_present and retention == self.retention_present:
            return
        self._check_count("task", len(task))
        self._check_count("retention", len(retention))
        self.task_present, self.retention_present = task, retention
        self._stale_table = True

    def set_groups(self, rows: Sequence[Sequence[float]]) -> None:
        """Give the hyperparameters of every group, as `pack_group` makes them."""
        groups = [tuple(row) for row in rows]
        if groups == self.groups:
            return
        if len(groups) != self.group_table.shape[0] or any(len(row) != GROUP_COLUMNS for row in groups):
            raise ValueError(
                f"{len(groups)} group rows of lengths {sorted({len(row) for row in groups})}: this plan needs "
                f"{self.group_table.shape[0]} rows of {GROUP_COLUMNS} from pack_group()"
            )
        self.groups = groups
        self._stale_groups = True

    def _check_count(self, name: str, count: int) -> None:
        if count != self.n_segments:
            raise ValueError(f"{name} has {count} entries for {self.n_segments} parameters")

    def _upload(self, target: Tensor, host: Tensor) -> None:
        if target.is_cuda:
            # A fresh pinned copy every time: torch's allocator hands the block out again only once this copy is done.
            target.copy_(host.pin_memory(), non_blocking=True)
        else:
            target.copy_(host)

    def flush(self) -> None:
        """Upload what changed since the last launch, without synchronising. The launchers call this.

        While a CUDA graph is captured nothing may be uploaded, because every replay would upload it again. Before
        a replay, call the setters and this: the captured launch reads the device tables.

        Raises:
            ValueError: One of the setters was never called.
            RuntimeError: Something changed and the stream is capturing.
        """
        if self.addresses is None or self.task_present is None or self.retention_present is None:
            raise ValueError("set_addresses() and set_present() must be called before the first launch")
        if self.groups is None:
            raise ValueError("set_groups() must be called before the first launch")
        stale = {
            "the parameters' addresses": self._stale_addresses,
            "which losses reached which parameters": self._stale_table,
            "the hyperparameters of the groups": self._stale_groups,
        }
        if any(stale.values()) and is_capturing():
            raise RuntimeError(
                f"{' and '.join(what for what, changed in stale.items() if changed)} changed since the last launch, "
                "and a CUDA graph is being captured, which cannot upload them: before the capture run one step with "
                "the same gradients and groups, or call opt.prepare_replay()"
            )
        if self._stale_addresses:
            addresses = _host_tensor(self.addresses, dtype=torch.int64)
            self._host_table[:, 0] = addresses - self._tile_start * self._itemsize
            if self.tail_order:
                self._host_tails[:, 0] = (addresses + self._whole * self._itemsize)[self._host_tails[:, 3]]
                self._upload(self.tails[: len(self.tail_order)], self._host_tails)
            self._stale_addresses = False
            self._stale_table = True
        if self._stale_table:
            task, retention = _host_tensor([self.task_present, self.retention_present])
            end = self._tile_start + self._whole
            self._host_table[:, 3] = end * task
            self._host_table[:, 4] = end * (task | retention)
            self._host_table[:, 5] = task + 2 * retention.long()
            self._upload(self.table, self._host_table)
            self._stale_table = False
        if self._stale_groups:
            self._upload(self.group_table, _host_tensor(self.groups, dtype=torch.float64))
            self._stale_groups = False


@dataclass
class SurgeryBuffers:
    """The tensors of a step, all on the plan's device. Names of the small vectors' entries: `*_NAMES`.

    Attributes:
        grads_task: Task gradients, flat, by dtype, `[plan.grad_numel[dtype]]`. Gaps, padding and segments
            that the loss did not reach must be zero: the reduction reads them.
        grads_ret: Retention gradients, the same; read only with `has_ret=True`.
        m: First moments, fp32 `[plan.moment_numel]`.
        v: Second moments, fp32 `[plan.moment_numel]`.
        vmax: Their running maximum for AMSGrad, fp32 `[plan.moment_numel]`, or None.
        steps: Completed steps of each segment, fp32 `[plan.n_segments]`, as torch's `step`.
        step_in: fp64 `[5]`: retention_loss, grad_scale, found_inf, measured, ret_weight. `measured` 0 leaves λ alone;
            ret_weight multiplies the retention part of the merge, for a gradient of an earlier step.
        dual: fp64 `[5]`: lam, t, skipped_total, ema, xi.
        settings: fp64 `[11]`, from `pack_settings`.
        partials: fp64 `[MAX_GRID, 3]`: rows of tt, tr, rr.
        metrics: fp64 `[16]`.
    """

    grads_task: dict[torch.dtype, Tensor]
    grads_ret: dict[torch.dtype, Tensor]
    m: Tensor
    v: Tensor
    vmax: Tensor | None
    steps: Tensor
    step_in: Tensor
    dual: Tensor
    settings: Tensor
    partials: Tensor
    metrics: Tensor
    _checked: set[tuple[Any, ...]] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def allocate(
        cls, plan: SurgeryPlan, *, amsgrad: bool = False, task: bool = True, retention: bool = True
    ) -> "SurgeryBuffers":
        """Allocate zeroed buffers for `plan` (both scales 1, nothing measured yet), and gradients as asked for."""
        new = functools.partial(torch.zeros, device=plan.device)

        def grads() -> dict[torch.dtype, Tensor]:
            return {dtype: new(numel, dtype=dtype) for dtype, numel in plan.grad_numel.items()}

        # Never torch's default dtype: the kernels write fp32 through addresses, whatever set_default_dtype() says.
        def moments() -> Tensor:
            return new(plan.moment_numel, dtype=torch.float32)

        step_in = new(len(STEP_IN_NAMES), dtype=torch.float64)
        step_in[1] = step_in[4] = 1.0
        dual = new(len(DUAL_NAMES), dtype=torch.float64)
        dual[3:] = math.nan
        return cls(
            grads_task=grads() if task else {},
            grads_ret=grads() if retention else {},
            m=moments(),
            v=moments(),
            vmax=moments() if amsgrad else None,
            steps=new(plan.n_segments, dtype=torch.float32),
            step_in=step_in,
            dual=dual,
            settings=new(SETTINGS_SIZE, dtype=torch.float64),
            partials=new((MAX_GRID, 3), dtype=torch.float64),
            metrics=new(len(METRIC_NAMES), dtype=torch.float64),
        )

    def check(self, plan: SurgeryPlan, *, has_ret: bool, amsgrad: bool) -> None:
        """Refuse tensors that the kernel would read or write out of bounds or misaligned.

        Raises:
            ValueError: A tensor is missing or has the wrong dtype, shape, device, layout or alignment.
        """
        expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
            "m": (self.m, torch.float32, (plan.moment_numel,)),
            "v": (self.v, torch.float32, (plan.moment_numel,)),
            "steps": (self.steps, torch.float32, (plan.n_segments,)),
            "step_in": (self.step_in, torch.float64, (len(STEP_IN_NAMES),)),
            "dual": (self.dual, torch.float64, (len(DUAL_NAMES),)),
            "settings": (self.settings, torch.float64, (SETTINGS_SIZE,)),
            "partials": (self.partials, torch.float64, (MAX_GRID, 3)),
            "metrics": (self.metrics, torch.float64, (len(METRIC_NAMES),)),
        }
        if amsgrad:
            expected["vmax"] = (self.vmax, torch.float32, (plan.moment_numel,))
        for dtype, numel in plan.grad_numel.items():
            expected[f"grads_task[{dtype}]"] = (self.grads_task.get(dtype), dtype, (numel,))
            if has_ret:
                expected[f"grads_ret[{dtype}]"] = (self.grads_ret.get(dtype), dtype, (numel,))
        # Reading every attribute of every tensor costs more than the launch, so the same tensors pass once.
        key = (id(plan), *(0 if tensor is None else tensor.data_ptr() for tensor, _, _ in expected.values()))
        if key in self._checked:
            return
        for name, (tensor, dtype, shape) in expected.items():
            if tensor is None:
                raise ValueError(f"SurgeryBuffers.{name} is missing (has_ret={has_ret}, amsgrad={amsgrad})")
            found = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
            needed = (dtype, shape, plan.device if plan.device.index is not None else tensor.device, True)
            if found != needed or tensor.device.type != plan.device.type:
                raise ValueError(
                    f"SurgeryBuffers.{name}: found {found[0]} {found[1]} on {found[2]}, contiguous={found[3]}; "
                    f"needed {dtype} {shape} on {plan.device}, contiguous"
                )
            if tensor.data_ptr() % 16:
                raise ValueError(
                    f"SurgeryBuffers.{name} lies at address {tensor.data_ptr():#x}: needs a multiple of 16; "
                    "allocate it whole instead of slicing a larger tensor"
                )
        self._checked.add(key)
