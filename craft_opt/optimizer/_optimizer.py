"""CraftOptimizer: AdamW that takes a task and a retention gradient."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from craft_opt.config import CraftConfig
from craft_opt.dual import DualState
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.optimizer._backends import (
    Backend,
    NumbaBackend,
    Rule,
    TorchBackend,
    TritonBackend,
    numba_is_available,
)
from craft_opt.optimizer._layout import LAND_AT_ONCE, DeviceLayout, Slot, check_grad, group_by_device
from craft_opt.optimizer._metrics import StepMetrics
from craft_opt.optimizer._processes import Processes, RetentionAverage, world_size
from craft_opt.optimizer._shards import like, local_part, part_like

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "numba", "torch")
DUAL_KEY = "craft_dual"
REUSED_KEY, AGE_KEY = "craft_reused", "craft_reused_age"
SETTINGS = ("config", "max_grad_norm", "backend", "total_steps")
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class ParameterState(dict[str, Any]):
    """A parameter's entry in ``optimizer.state``; what is assigned to a moment goes into the flat buffer it lies in."""

    @torch.no_grad()
    def __setitem__(self, name: str, value: Any) -> None:
        held = self.get(name)
        if isinstance(held, Tensor) and held.shape == torch.as_tensor(value).shape:
            held.copy_(torch.as_tensor(value))
        else:
            super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Assign every item, as ``dict.update`` does."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


class CraftOptimizer(Optimizer):
    """AdamW on a task gradient merged with a retention gradient by gradient surgery, λ included.

    One step: Gram matrix of the two gradients; if their cosine is below ``conflict_threshold``,
    ``g_t' = g_t − (tr/rr) g_r``; merge, e.g. ``g = g_t' + λ g_r``; clip to ``max_grad_norm``; AdamW with fp32 moments;
    ``λ ← clip(λ + lambda_lr (L_ret − ε(t)), 0, lambda_max)``. Without a captured retention gradient a step is plain
    AdamW. A step whose gradients or captured loss are not finite changes nothing and counts as skipped. Nothing in
    ``step()`` waits for a CUDA device.

    Gradients of both kinds accumulate over micro-batches in any order until ``step()`` consumes the retention
    gradient; the loss of several captures in one step is their sum, as the gradient is. ``zero_grad()`` clears task
    gradients only.

    Args:
        params: Parameters or param groups, as for ``torch.optim.AdamW``; fp32, bf16 or fp16, on CPU or CUDA.
        lr: Learning rate, a number or a 1-element tensor; a tensor on a CUDA device is read in every step, which waits
            for it.
        betas: Decay of the first and second moment, in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled decay, at least 0.
        max_grad_norm: Bound of the merged gradient's norm; None means no clip.
        config: Surgery and dual settings; the anchor fields are not read here.
        backend: ``triton`` (one kernel launch; CUDA), ``numba`` (native loops; CPU, fp32 and bf16), ``torch`` (flat
            tensor operations) or ``auto``.
        total_steps: Length of the run in steps; stands in where ``config.epsilon_decay_steps`` is 0. Without either ε
            stays at ``epsilon_start``.
        amsgrad: As in ``torch.optim.AdamW``.
        maximize: As in ``torch.optim.AdamW``; both gradients are negated.
        foreach: Taken for AdamW's sake and kept in the param groups; ``backend`` chooses the implementation.
        capturable: The same; True also keeps ``step`` on the parameter's device in the state dict, as in AdamW.
        differentiable: Only False.
        fused: As ``capturable``.
        process_group: The torch.distributed group of the processes that train this model; None takes the default one.

    With several processes every one of them calls the same methods in the same order. Replicas: wrap the model in
    DistributedDataParallel, which averages the task gradients; the retention gradients and L_ret are averaged here, so
    the retention loss runs on the module inside (``ddp.module``). Shards: ``fully_shard`` (FSDP2) averages both
    gradients; λ's state and the moments go through ``torch.distributed.checkpoint``. Every process takes the same
    decisions, and a gradient or loss that is not finite in one of them skips the step in all.

    Raises:
        ValueError: A setting is out of its range, or a parameter has a dtype or device that is not supported.
        RuntimeError: Sparse gradients; ``foreach`` with ``fused``; parameters of FSDP1, of DeepSpeed, or distributed in
            different ways; replicas whose task gradients differ at the first step.

    Source: AdamW, Loshchilov and Hutter (arXiv 1711.05101), Algorithm 2, in torch's form; projection, Yu et al.
    (arXiv 2001.06782), Algorithm 1, and Chaudhry et al. (arXiv 1812.00420), equation 11. Deviations: see
    :mod:`craft_opt.surgery`; moments are fp32 for every parameter dtype (torch keeps bf16 moments for bf16).

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = CraftOptimizer(model.parameters(), lr=1e-3, backend="torch")
        >>> old, new = torch.randn(8, 4), torch.randn(8, 4)
        >>> retention_loss = model(old).square().mean()
        >>> with opt.retention(retention_loss):
        ...     retention_loss.backward()
        >>> (model(new) - 1).square().mean().backward()
        >>> opt.step(); opt.zero_grad()
        >>> opt.metrics().lam_before.item()
        1.0
    """

    # GradScaler hands over grad_scale and found_inf instead of unscaling .grad itself: it does not know of the
    # retention buffer, whose gradient is scaled just the same.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        config: CraftConfig | None = None,
        backend: str = "auto",
        *,
        total_steps: int | None = None,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if isinstance(max_grad_norm, bool):
            raise ValueError(
                f"max_grad_norm must be a number above 0, or None for no clip, got {max_grad_norm!r}; AdamW's sixth "
                f"argument is amsgrad, which has to be named here: amsgrad={max_grad_norm!r}"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None for no clip, got {max_grad_norm!r}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, or None, got {total_steps!r}")
        self.config = config if config is not None else CraftConfig()
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self.total_steps = total_steps
        self.process_group = process_group
        self._start_fresh()
        # torch.optim.AdamW's group keys, in its order, so that state dicts go both ways.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        self._check_settings(defaults)
        super().__init__(params, defaults)

    def _start_fresh(self) -> None:
        """Set everything that is neither a setting nor torch's own."""
        self._layouts: list[DeviceLayout] = []
        self._slots: dict[Tensor, Slot] = {}
        self._signature: list[Any] | None = None
        # What self.state was when every reached parameter had its entry.
        self._shown: tuple[int, int, list[list[bool]]] | None = None
        self._hooks: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove_hooks, self._hooks)
        self._backends: dict[str, Backend] = {}
        self._processes = Processes()
        self._average: RetentionAverage | None = None
        self._is_local = False  # a captured retention gradient that was not averaged yet
        self._are_alike = False  # the processes were found to hold the same model
        self._capturing = False
        self._task_backwards: set[int] = set()
        # What the first layout starts from; the layouts hold it afterwards.
        self._first_dual = DualState.create(self.config, "cpu").vector
        self._attempted = 0
        # Steps since the retention gradient in the buffers was measured; None where there is none.
        self._age: int | None = None
        self._stepped = False
        self._attached: tuple[Callable[[], Tensor], int] | None = None
        self._incoming: dict[str, Any] | None = None

    # -- parameters ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch's optimizers do; refuse what AdamW on flat buffers cannot hold."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._hook(self.param_groups[-1]["params"])

    @staticmethod
    def _check_settings(group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a 1-element tensor, got shape {tuple(lr.shape)}")
        for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and beta.numel() != 1:
                raise ValueError(f"betas[{i}] must be a number or a 1-element tensor, got shape {tuple(beta.shape)}")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta!r}")
        if group["differentiable"]:
            raise ValueError("differentiable=True is not supported: the step updates parameters in place")
        if group["foreach"] and group["fused"]:
            raise RuntimeError("foreach=True and fused=True exclude each other, as in AdamW; leave both out")

    @classmethod
    def _check_group(cls, group: dict[str, Any]) -> None:
        cls._check_settings(group)
        cls._check_dtypes(group["params"])

    @staticmethod
    def _check_dtypes(params: Iterable[Tensor]) -> None:
        """Frozen parameters may be anything, quantised weights for example."""
        for p in params:
            if p.requires_grad and p.dtype not in kernel.SUPPORTED_DTYPES:
                raise ValueError(
                    f"parameters must be fp32, bf16 or fp16 (moments are fp32), got {p.dtype} of shape "
                    f"{tuple(p.shape)}; use model.float()"
                )

    def _hook(self, params: list[Tensor]) -> None:
        opt_ref = weakref.ref(self)

        # Traced, the move of .grad into a flat buffer would be lost on autograd.
        @torch._disable_dynamo
        def landed(p: Tensor) -> None:
            opt = opt_ref()
            if opt is not None:
                opt._on_accumulated(p)

        for p in params:
            if p.requires_grad and id(p) not in self._hooks:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(landed)

    @torch.no_grad()
    def _on_accumulated(self, p: Tensor) -> None:
        """After autograd accumulated into ``p.grad``: note the backward, and land a large gradient at once."""
        if not self._capturing:
            self._note_backward(p)
        if p.numel() < LAND_AT_ONCE:
            return
        if p not in self._slots:
            self._ensure_layout()
        slot, grad = self._slots.get(p), p.grad
        if slot is None or grad is None or self._backends[p.device.type].in_place:
            return
        view = slot.ret_view if self._capturing else slot.task_view
        # A gradient with a graph of its own (create_graph=True) stays until the step: the caller may yet use it.
        if view is None or grad is view or grad.requires_grad or grad.layout is not torch.strided:
            return
        if grad.dtype != view.dtype:
            return  # refused in the step, with a sentence
        view.copy_(grad)
        p.grad = view
        if self._capturing:
            slot.ret_dirty = True
        else:
            slot.task_dirty = True

    def _note_backward(self, p: Tensor) -> None:
        """Count the backward passes whose gradients lie in ``.grad``."""
        task_id = torch._C._current_graph_task_id()
        if task_id in self._task_backwards:
            return
        # model.zero_grad() does not pass by here: a .grad that is None everywhere else tells that it was called.
        if self._task_backwards and all(q is p or q.grad is None for g in self.param_groups for q in g["params"]):
            self._task_backwards.clear()
        self._task_backwards.add(task_id)

    @torch._disable_dynamo
    def _ensure_layout(self) -> list[DeviceLayout]:
        """Return the layouts, built again where parameters were added, (un)frozen, moved or changed their form."""
        # Every step asks. Strides and dtype too: memory that was freed may be another tensor's in the same place.
        params = [p for group in self.param_groups for p in group["params"]]
        parts = [local_part(p) for p in params] if self._processes.sharded else params
        signature: list[Any] = [
            (q.data_ptr(), q.stride(), q.dtype) if p.requires_grad else None for p, q in zip(params, parts, strict=True)
        ]
        signature += [(len(group["params"]), group["amsgrad"]) for group in self.param_groups]
        signature.append(world_size(self.process_group))
        if signature == self._signature:
            return self._layouts
        trainable = self._trainable()
        self._find_processes(trainable)
        same = len(trainable) == len(self._slots) and all(
            p in self._slots and self._slots[p].group == i for p, i, _ in trainable
        )
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        same = same and all(layout.amsgrad or not amsgrad for layout in self._layouts)
        if not (same and all(layout.matches(slot) for layout in self._layouts for slot in layout.slots)):
            self._build(trainable)
        self._signature = signature
        return self._layouts

    def _find_processes(self, trainable: list[tuple[Tensor, int, int]]) -> None:
        processes = Processes.of([p for p, _, _ in trainable], self.process_group)
        if processes != self._processes:
            self._processes, self._are_alike = processes, False

    def _trainable(self) -> list[tuple[Tensor, int, int]]:
        """Parameters that can have a gradient, with the index of their group and their number in the state dict."""
        everything = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        # A parameter that is listed twice (torch warns of it) has one gradient, and takes one step.
        once: dict[Tensor, tuple[Tensor, int, int]] = {}
        for number, (p, i) in enumerate(everything):
            if p.requires_grad:
                once.setdefault(p, (p, i, number))
        return list(once.values())

    def _build(self, trainable: list[tuple[Tensor, int, int]]) -> None:
        """Lay the parameters out afresh, keeping moments, step counts, dual state and pending gradients."""
        self._finish_average()
        for device in {p.device for p, _, _ in trainable}:
            if device.type not in ("cpu", "cuda"):
                raise ValueError(f"CraftOptimizer runs on CPU and CUDA devices, got parameters on {device}")
        self._check_dtypes(p for p, _, _ in trainable)
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        held = {
            p: (slot.ret_view, slot.ret_kept) for p, slot in self._slots.items() if slot.ret_present or slot.ret_kept
        }
        dual = self._dual.clone()
        old = self._layouts[0].buffers if self._layouts else None

        members = group_by_device(trainable)
        self._backends = {d.type: self._choose(d, {p.dtype for p, _, _ in m}) for d, m in members.items()}
        self._layouts = [
            DeviceLayout(d, m, amsgrad, in_place=self._backends[d.type].in_place) for d, m in members.items()
        ]
        self._slots = {slot.param: slot for layout in self._layouts for slot in layout.slots}
        self._shown = None
        self._hook([p for p, _, _ in trainable])
        for p, slot in self._slots.items():
            if self.state.get(p):
                self._fill(slot, self.state[p])
        for layout in self._layouts:
            layout.buffers.dual.copy_(dual)
            if old is None:
                layout.buffers.step_in[1] = 1.0  # grad_scale
                layout.buffers.step_in[4] = 1.0  # ret_weight
            else:
                layout.buffers.step_in.copy_(old.step_in)
                layout.buffers.metrics.copy_(old.metrics)
        for p, (grad, kept) in held.items():
            if p in self._slots and grad is not None:
                self._hold_retention(self._slots[p], grad, kept=kept)

    def _hold_retention(self, slot: Slot, grad: Tensor, *, kept: bool) -> None:
        """Put a retention gradient where the backend looks for it: pending, or kept for reuse."""
        layout = next(layout for layout in self._layouts if layout.device == slot.param.device)
        layout.ensure_retention()
        if slot.ret_view is None:
            slot.ret_view = torch.empty_strided(slot.size, slot.stride, dtype=slot.dtype, device=layout.device)
        slot.ret_view.copy_(grad)
        slot.ret_present, slot.ret_kept, slot.ret_dirty = not kept, kept, not layout.in_place

    @property
    def _dual(self) -> Tensor:
        return self._layouts[0].buffers.dual if self._layouts else self._first_dual

    def _choose(self, device: torch.device, dtypes: set[torch.dtype]) -> Backend:
        native = device.type == "cpu" and numba_is_available() and torch.float16 not in dtypes
        known = self._backends.get(device.type)
        if known is not None and (native or not known.in_place):
            return known
        name = self.backend
        if name == "auto":
            fast = "triton" if device.type == "cuda" and kernel.is_available(device) else "numba" if native else "torch"
            logger.info("CraftOptimizer: backend %s for %s", fast, device.type)
            name = fast
        elif name == "triton" and not kernel.is_available(device):
            raise ValueError(
                f"backend='triton' needs Triton and a CUDA device, got parameters on {device}; "
                f"use backend='torch' or 'auto'"
            )
        elif name == "numba" and not native:
            raise ValueError(
                f"backend='numba' needs Numba and fp32 or bf16 parameters on the CPU, got "
                f"{', '.join(sorted(map(str, dtypes)))} on {device}"
                f"{'' if numba_is_available() else ' and no Numba (pip install numba)'}; use backend='torch' or 'auto'"
            )
        chosen: dict[str, type[Backend]] = {"triton": TritonBackend, "numba": NumbaBackend, "torch": TorchBackend}
        return chosen[name]()

    # -- retention -----------------------------------------------------------------------------------------------

    @contextmanager
    def retention(self, loss: Tensor | float, *, sync: bool = True) -> Iterator[None]:
        """Direct the gradients of the backward passes inside into the retention buffer.

        ``with opt.retention(loss): loss.backward()``. Task gradients that already lie in ``.grad`` stay as they are.

        Args:
            loss: L_ret of these backward passes, one number, not scaled by a GradScaler; λ is held against it. Several
                captures before one step add up, as their gradients do, so divide by the number of micro-batches.
            sync: Whether replicas start averaging when the block ends, beside the task's forward; say False where
                another capture follows before the step, which then averages once.

        Raises:
            ValueError: ``loss`` is not one number.
            RuntimeError: Nested use, or no gradient reached any parameter.
        """
        if self._capturing:
            raise RuntimeError("retention() blocks do not nest: leave the first before the second")
        value = _as_scalar(loss)
        layouts = self._ensure_layout()
        self._finish_average()
        task = {}
        for layout in layouts:
            layout.ensure_retention()
            for slot in layout.slots:
                task[slot.param] = slot.param.grad
                slot.grad = slot.ret_view if slot.ret_present else None
        self._capturing = True
        try:
            yield
            self._finish_capture(value, sync=sync)
        except BaseException:
            # Half a gradient is no gradient: the step that follows must not merge it.
            self._drop_retention()
            raise
        finally:
            self._capturing = False
            for p, grad in task.items():
                p.grad = grad

    @torch._disable_dynamo
    def _finish_capture(self, value: Tensor, *, sync: bool) -> None:
        """Land what lies in ``.grad`` in the retention buffer and add its loss."""
        if not any(slot.param.grad is not None for layout in self._layouts for slot in layout.slots):
            raise RuntimeError(
                "no retention gradient reached any parameter: call retention_loss.backward() inside the block, on a "
                "loss that depends on parameters of this optimizer"
            )
        for layout in self._layouts:
            layout.land(retention=True)
            captured = layout.buffers.step_in
            captured[0] += value.to(captured.device, torch.float64, non_blocking=True)
            captured[3] = 1.0
        self._age = 0
        if self._processes.count > 1 and not self._processes.sharded:
            self._is_local = True
            if sync:
                self._start_average()

    def _start_average(self) -> None:
        """Average what was captured over the replicas, without waiting."""
        if not self._are_alike:
            self._processes.check_parameters(self._layouts)
        self._average, self._is_local = RetentionAverage(self._processes, self._layouts), False

    def _finish_average(self) -> None:
        """Wait, in stream order, until the average that was started is there."""
        if self._average is not None:
            self._average.finish()
            self._average = None

    @torch._disable_dynamo
    def capture_retention(self, loss: Tensor | float, *, backward_passes: int | None = 1, sync: bool = True) -> None:
        """Move the gradients that lie in ``.grad`` into the retention buffer: for loops that call backward elsewhere.

        ``retention_loss.backward(); opt.capture_retention(retention_loss)``.

        Args:
            loss: L_ret, as for :meth:`retention`.
            backward_passes: Backward passes whose gradients may lie in ``.grad``; None means any number. More than this
                since the last ``zero_grad()`` or capture means that task gradients are among them.
            sync: As for :meth:`retention`.

        Raises:
            ValueError: ``loss`` is not one number.
            RuntimeError: Task gradients already lie in ``.grad``, or there is no gradient at all.
        """
        value = _as_scalar(loss)
        if backward_passes is not None and len(self._task_backwards) > backward_passes:
            raise RuntimeError(
                f"capture_retention found gradients of {len(self._task_backwards)} backward passes in .grad where "
                f"{backward_passes} was expected: task gradients already lie there. Capture right after the retention "
                f"backward and before the task's, use `with opt.retention(loss):`, or say backward_passes="
                f"{len(self._task_backwards)} if all of them were retention losses"
            )
        layouts = self._ensure_layout()
        self._finish_average()
        for layout in layouts:
            layout.ensure_retention()
            for slot in layout.slots:
                grad = slot.grad
                if grad is None or not slot.ret_present:
                    continue
                check_grad(grad, slot.dtype)
                assert slot.ret_view is not None
                slot.ret_view.add_(grad.detach())
                slot.grad = slot.ret_view
        self._finish_capture(value, sync=sync)
        for slot in self._slots.values():
            slot.param.grad = None
        self._task_backwards.clear()

    def attach_retention(self, fn: Callable[[], Tensor] | None, every: int | None = None) -> None:
        """Let ``step()`` itself compute the retention gradient: for loops that cannot be changed.

        Every ``every`` steps ``step()`` calls ``fn()``, runs its backward into the retention buffer and goes on as if
        the loop had done so. The loop must not clip gradients itself, since it would clip the task gradient alone;
        ``max_grad_norm`` of this optimizer clips the merged one. LeRobot: ``--optimizer.grad_clip_norm=0``;
        transformers: ``TrainingArguments(max_grad_norm=0)``; a loop of your own: leave ``clip_grad_norm_`` out.

        Args:
            fn: Returns the retention loss, a scalar tensor with a graph; None detaches.
            every: K in steps, at least 1; None takes ``config.retention_freq``.

        Raises:
            ValueError: ``every`` is below 1.
        """
        period = self.config.retention_freq if every is None else every
        if period < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        self._attached = None if fn is None else (fn, period)

    def _run_attached(self, fn: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            loss = fn()
            with self.retention(loss):
                scale = getattr(self, "grad_scale", None)
                (loss if scale is None else loss * scale.to(loss.device)).backward()

    @torch._disable_dynamo
    def _drop_retention(self, *, keep: bool = False) -> None:
        self._finish_average()
        self._is_local = False
        for layout in self._layouts:
            layout.drop_retention(keep=keep)
            layout.buffers.step_in[0] = 0.0
            layout.buffers.step_in[3] = 0.0
            if self._age:  # only a reused gradient has lowered it: no launch for anybody else
                layout.buffers.step_in[4] = 1.0
        if not keep:
            self._age = None

    def _recall_retention(self) -> None:
        """Take the last retention gradient up again, a step older, where the settings say so."""
        if self._age is None or self.config.off_steps != "reuse":
            return
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "off_steps='reuse' does not work with a GradScaler: the retention gradient of an earlier step was "
                "multiplied by the scale of that step; use off_steps='skip', or bf16, which needs no scaler"
            )
        self._age += 1
        for layout in self._layouts:
            layout.recall_retention()
            layout.buffers.step_in[4] = self.config.reuse_decay**self._age

    # -- the step ------------------------------------------------------------------------------------------------

    @property
    def attempted_steps(self) -> int:
        """Steps taken or skipped so far, counted on the host: no synchronisation."""
        return self._attempted

    @property
    def retention_due(self) -> bool:
        """Whether the coming step is one of 0, K, 2K, ... with K = ``config.retention_freq``.

        Attempted steps count here, so that nothing has to be read from the device; ε's clock counts completed ones.
        """
        return self._attempted % self.config.retention_freq == 0

    # A break in the graph of a compiled training step, as torch.optim's own bookkeeping is.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do the whole update: surgery, merge, clip, AdamW, λ.

        Args:
            closure: Computes the task loss again and returns it, as for every torch optimizer.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A task gradient was unscaled outside while a scaled retention gradient is pending.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layouts = self._ensure_layout()
        if self._attached is not None and self._attempted % self._attached[1] == 0:
            self._run_attached(self._attached[0])

        if self._is_local:
            self._start_average()
        for layout in layouts:
            layout.land(retention=False)
        self._finish_average()
        is_measured = any(slot.ret_present for slot in self._slots.values())
        if not is_measured and any(any(layout.task_present) for layout in layouts):
            self._recall_retention()
        pending = [layout.settle_retention() for layout in layouts]
        has_ret = any(pending)
        if not has_ret and not any(any(layout.task_present) for layout in layouts):
            return loss
        self._take_amp_scale(has_ret)

        groups, rule = self.param_groups, self._rule()
        for layout in layouts:
            if has_ret:
                layout.ensure_retention()
            layout.stage_in()
        reached = [slot for lay in layouts for slot, there in zip(lay.slots, lay.reached, strict=True) if there]
        self._show_state(layouts, reached)
        processes = self._processes
        if processes.count > 1 and not processes.sharded and not self._are_alike:
            grams = [self._backends[lay.device.type].reduce(lay, groups, rule, False) for lay in layouts]
            processes.check_gradients(torch.stack([gram[0].to(layouts[0].device) for gram in grams]).sum())
            self._are_alike = True
        if len(layouts) == 1 and not processes.sharded:
            self._backends[layouts[0].device.type].step(layouts[0], groups, rule, has_ret)
        else:
            grams = [self._backends[lay.device.type].reduce(lay, groups, rule, has_ret) for lay in layouts]
            total = torch.stack([gram.to(layouts[0].device, non_blocking=True) for gram in grams]).sum(dim=0)
            if processes.sharded:
                total = processes.agree_on_step(total, layouts)
            for lay in layouts:
                here = total.to(lay.device, non_blocking=True)
                self._backends[lay.device.type].apply(lay, groups, rule, has_ret, here)
        for layout in layouts:
            layout.stage_out()
        # Memory written through raw pointers: autograd must see that saved tensors are stale.
        torch.autograd.graph.increment_version([slot.part if slot.sharded else slot.param for slot in reached])
        self._drop_retention(keep=has_ret and self.config.off_steps == "reuse")
        if not _is_capturing(layouts):
            self._attempted += 1
        self._stepped = True
        return loss

    def _show_state(self, layouts: list[DeviceLayout], reached: list[Slot]) -> None:
        """Let ``self.state`` show every parameter that this step reaches; one that it lacks starts afresh.

        Emptying ``state``, or one parameter's entry, is how training loops reset torch's optimizers.
        """
        shown = (id(self.state), len(self.state), [layout.reached for layout in layouts])
        # A default dict: whoever looked before the first step left an empty entry behind.
        if shown == self._shown and all(self.state.values()) and {*map(type, self.state.values())} == {ParameterState}:
            return
        for slot in reached:
            state = self.state.get(slot.param)
            if not state:
                if not _is_capturing(layouts):  # a graph would forget at every replay
                    slot.forget()
                self.state[slot.param] = self._state_views(slot)
            elif type(state) is not ParameterState:
                self._fill(slot, state)
        self._shown = (id(self.state), len(self.state), shown[2])

    def _take_amp_scale(self, has_ret: bool) -> None:
        """Hand GradScaler's scale to the backends; both gradients are divided by it."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and scale is None and has_ret:
            raise RuntimeError(
                "GradScaler.unscale_(optimizer) was called: it unscales the task gradient and cannot see the retention "
                "gradient. Leave unscale_ out; CraftOptimizer unscales both and clips with max_grad_norm"
            )
        for layout in self._layouts:
            vector = layout.buffers.step_in
            for i, value, neutral in ((1, scale, 1.0), (2, found_inf, 0.0)):
                if value is None:
                    vector[i] = neutral
                else:
                    vector[i] = value.to(vector.device, torch.float64, non_blocking=True)

    def prepare_replay(self) -> None:
        """Call this before every replay of a CUDA graph that holds a captured ``step()``.

        A graph repeats what was captured, and nothing that the host does: this brings changed hyperparameters (a
        scheduler's learning rate) to the device, in stream order and without waiting, and counts the step for
        :attr:`retention_due`. Capture a step with retention and one without, each after a step of its kind has run;
        gradients must keep their addresses, so backward belongs into the graph or ``zero_grad(set_to_none=False)``.

        Raises:
            RuntimeError: The parameters are not on one CUDA device with the Triton backend, no step ran before, or
                there are several processes.
        """
        backend = self._backends.get("cuda")
        if self._processes.count > 1:
            raise RuntimeError(
                f"a captured step cannot be replayed in {self._processes.count} processes: the host takes part in "
                f"averaging; call step() itself"
            )
        if not self._stepped or len(self._layouts) != 1 or not isinstance(backend, TritonBackend):
            raise RuntimeError(
                "prepare_replay() needs a captured step of the Triton backend on one CUDA device; take one step of "
                "each kind, capture it with torch.cuda.graph(), then call this before every replay()"
            )
        backend.prepare(self._layouts[0], self.param_groups, self._rule())
        self._layouts[0].plan.flush()
        self._attempted += 1

    def _rule(self) -> Rule:
        return Rule(self.config, self.max_grad_norm, self.config.epsilon_decay_steps or self.total_steps or 0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the task gradients; a captured retention gradient waits for the step that consumes it."""
        super().zero_grad(set_to_none)
        self._task_backwards.clear()

    def metrics(self) -> StepMetrics:
        """Return the metrics of the last step, as a copy on the device (no synchronisation).

        Raises:
            RuntimeError: There was no step yet.
        """
        if not self._stepped:
            raise RuntimeError("metrics() has nothing to tell before the first step()")
        return StepMetrics.from_vector(self._layouts[0].buffers.metrics)

    # -- state ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _state_views(slot: Slot) -> dict[str, Tensor]:
        moments = {name: getattr(slot, name) for name in ADAMW_MOMENTS}
        return ParameterState(
            {"step": slot.step}
            | {name: like(slot.param, moment) for name, moment in moments.items() if moment is not None}
        )

    @torch.no_grad()
    def _fill(self, slot: Slot, state: dict[str, Any]) -> None:
        """Copy a parameter's saved state into its flat buffers and let ``self.state`` show those."""
        slot.step.copy_(torch.as_tensor(state["step"]))
        for name in ADAMW_MOMENTS:
            target, source = getattr(slot, name), state.get(name)
            if target is not None and source is not None:
                part = part_like(slot.param, source)
                if part.shape != target.shape:
                    raise RuntimeError(
                        f"a parameter changed its shape: {name} in optimizer.state has {tuple(part.shape)}, the "
                        f"parameter {tuple(target.shape)}; give it moments of that shape, or `del optimizer.state[p]`"
                    )
                target.copy_(part)
        self.state[slot.param] = self._state_views(slot)

    def state_dict(self) -> dict[str, Any]:
        """Return torch.optim.AdamW's state dict, with λ and t as ``craft_dual`` under the first parameter's state.

        ``craft_dual`` holds ``lam`` (fp64), ``t`` and ``skipped`` (int64), each of shape (). Moments are fp32. As in
        AdamW, ``step`` is fp32 on the CPU unless the group is ``capturable`` or ``fused``. This waits for the device.
        """
        self._ensure_layout()
        # Registered first, so that the user's own hooks see the whole state dict.
        handle = self.register_state_dict_post_hook(lambda _, saved: self._complete(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _complete(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Add to torch's state dict what only this class has: λ and t, a reused gradient; ``step`` on the CPU."""
        on_host = {layout.device: layout.buffers.steps.to("cpu", copy=True) for layout in self._layouts}
        index = 0
        first: tuple[int, Slot] | None = None
        for group in self.param_groups:
            for p in group["params"]:
                slot = self._slots.get(p)
                if slot is not None and first is None:
                    first = index, slot
                if saved["state"].get(index):  # empty where somebody looked before the first step
                    entry = dict(saved["state"][index])
                    if slot is not None and not (group["capturable"] or group["fused"]):
                        entry["step"] = on_host[p.device][slot.segment].clone()
                    saved["state"][index] = entry
                index += 1
        if first is not None:
            index, slot = first
            if not saved["state"].get(index):
                # Zero steps and zero moments: what AdamW itself would start from.
                slot.forget()
                step = torch.zeros((), dtype=torch.float32, device="cpu")
                saved["state"][index] = {**self._state_views(slot), "step": step}
                # In order; what hooks put beside the parameters comes last.
                saved["state"] = dict(sorted(saved["state"].items(), key=_number))
            saved["state"][index][DUAL_KEY] = DualState(self._dual).state_dict()
        if self.config.off_steps == "reuse":
            self._add_reused(saved)
        return saved

    def _add_reused(self, saved: dict[str, Any]) -> None:
        """Add the gradient that a resumed run goes on reusing, and its age in steps, -1 where there is none.

        Every parameter has an entry: torch.distributed.checkpoint loads what the loading optimizer has too, no more.
        """
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for p, slot in self._slots.items():
            if numbers[p] not in saved["state"]:
                continue
            kept = slot.ret_view if slot.ret_kept else None
            reused = torch.zeros_like(slot.exp_avg, dtype=slot.dtype) if kept is None else kept
            age = -1 if kept is None or self._age is None else self._age
            saved["state"][numbers[p]] |= {REUSED_KEY: like(p, reused), AGE_KEY: torch.tensor(age)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW; moments are taken over in fp32.

        A state dict without ``craft_dual`` (AdamW's) leaves λ and the clock as they are. A pending retention gradient
        is dropped.

        Raises:
            ValueError: Groups, shapes or the dual state do not fit this optimizer; nothing was changed.
        """

        def keep(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            # torch casts moments to the parameter's dtype while loading, so they are set aside before.
            self._check_incoming(incoming)
            self._incoming = incoming
            ids = {i for group in incoming["param_groups"] for i in group["params"]}
            bare = {k: {} if k in ids else value for k, value in incoming["state"].items()}
            return {**incoming, "state": bare}

        # Registered last, so that it sees what the user's own hooks made of the state dict.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming = None

    def _check_incoming(self, incoming: dict[str, Any]) -> None:
        for i, group in enumerate(incoming["param_groups"]):
            missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
            if missing:
                raise ValueError(
                    f"param group {i} of the state dict has no {' and no '.join(map(repr, missing))} (found: "
                    f"{', '.join(map(str, group))}); only state dicts of AdamW and CraftOptimizer can be loaded"
                )
            try:
                self._check_settings({**self.defaults, **group})
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"param group {i} of the state dict: {error}") from error
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in incoming["param_groups"] for i in group["params"]]
        for key, p in zip(ids, params, strict=False):
            state = incoming["state"].get(key)
            if not state:
                continue
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if name not in state:
                    raise ValueError(
                        f"state of parameter {key} has no {name!r} (found: {', '.join(sorted(state))}); "
                        f"only states of AdamW and CraftOptimizer can be loaded"
                    )
            if isinstance(state["step"], Tensor) and state["step"].numel() != 1:
                raise ValueError(f"state of parameter {key}: step has shape {tuple(state['step'].shape)}, not ()")
            for name in (*ADAMW_MOMENTS, REUSED_KEY):
                if name in state and not (isinstance(state[name], Tensor) and state[name].is_floating_point()):
                    raise ValueError(f"state of parameter {key}: {name} is no tensor of real numbers")
                if name in state and state[name].shape != p.shape:
                    raise ValueError(
                        f"state of parameter {key}: {name} has shape {tuple(state[name].shape)}, "
                        f"the parameter {tuple(p.shape)}"
                    )
            if int(state.get(AGE_KEY, -1)) >= 0 and REUSED_KEY not in state:
                raise ValueError(f"state of parameter {key} has {AGE_KEY!r} and no {REUSED_KEY!r}, which it belongs to")
            if DUAL_KEY in state:
                DualState.create(self.config, "cpu").load_state_dict(state[DUAL_KEY], self.config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over param groups and state: of a pickle or copy, or in the middle of ``load_state_dict``."""
        craft = state.pop("craft", None)
        if craft is not None:
            for name in SETTINGS:
                setattr(self, name, craft[name])
            self.process_group = None  # a group belongs to the program that made it; the default one is taken again
            self._start_fresh()
            self._first_dual = craft["dual"]
            self._attempted = craft["attempted"]
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            # A state dict of Adam says False, of decay as part of the gradient; AdamW sets this too.
            group["decoupled_weight_decay"] = True
        if craft is not None:
            for group in self.param_groups:
                self._hook(group["params"])
            return
        if self._incoming is not None:
            self._adopt(self._incoming)

    def _adopt(self, incoming: dict[str, Any]) -> None:
        """Copy the loaded state, set aside by load_state_dict, into the flat buffers."""
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in incoming["param_groups"] for i in group["params"]]
        for p in params:
            self.state.pop(p, None)
        self._signature = None
        self._find_processes(self._trainable())
        self._build(self._trainable())
        self._drop_retention()
        for key, p in zip(ids, params, strict=True):
            state, slot = incoming["state"].get(key), self._slots.get(p)
            if not state:
                continue
            if slot is None:
                # A frozen parameter: kept as it came, for the day it is thawed or saved.
                self.state[p] = {k: v for k, v in state.items() if k not in (DUAL_KEY, REUSED_KEY, AGE_KEY)}
            else:
                self._fill(slot, state)
                age = int(state.get(AGE_KEY, -1))
                if age >= 0:
                    self._age = age
                    self._hold_retention(slot, part_like(p, state[REUSED_KEY]), kept=True)
            if DUAL_KEY in state:
                dual = DualState.create(self.config, "cpu")
                dual.load_state_dict(state[DUAL_KEY], self.config)
                for layout in self._layouts:
                    layout.buffers.dual.copy_(dual.vector)
                self._attempted = int(dual.vector[1] + dual.vector[2])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; pending retention gradients and an attached function stay behind."""
        craft = {name: getattr(self, name) for name in SETTINGS}
        craft.update(dual=self._dual.to("cpu", copy=True), attempted=self._attempted)
        return {**super().__getstate__(), "craft": craft}


def _number(entry: tuple[Any, Any]) -> float:
    return entry[0] if isinstance(entry[0], int) else math.inf


def _is_capturing(layouts: list[DeviceLayout]) -> bool:
    """Whether this call is recorded in a CUDA graph instead of being done."""
    return any(layout.device.type == "cuda" for layout in layouts) and torch.cuda.is_current_stream_capturing()


def _as_scalar(loss: Tensor | float) -> Tensor:
    value = torch.as_tensor(loss).detach()
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"the retention loss must be one real number, got a tensor of shape {tuple(value.shape)} and dtype "
            f"{value.dtype}; reduce it first, e.g. with .mean()"
        )
    return value.reshape(())


def _remove_hooks(hooks: dict[int, RemovableHandle]) -> None:
    for handle in hooks.values():
        handle.remove()
