"""One run in several processes, on accelerate: who this process is, the wrapped policy, what all must agree on.

``accelerate launch`` and ``torchrun`` start the processes and say in the environment what they are; accelerate sets up
the process group and wraps the policy (DDP, or FSDP2). Here are only the few calls that the training loop needs. In one
process every one of them does nothing, and accelerate is not asked.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from craft_opt import CraftOptimizer

T = TypeVar("T")

_INSIDE = "run_inside_forward"
# The others wait while the first process evaluates or pushes. NCCL's ten minutes end a run in its first evaluation; a
# process that dies is noticed by the launcher, not by this.
_PATIENCE = timedelta(hours=6)


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def refuse_other_engines() -> None:
    """Refuse what accelerate can do and CRaFT's step cannot, and settings of the launcher that nothing would read.

    Raises:
        ValueError: DeepSpeed, Megatron, tensor or context parallelism, FSDP's first version, fp16, fp8, accelerate's
            accumulation or its compilation is asked for.
    """
    chosen = {name: os.environ.get(name, "").lower() for name in _ENGINES}
    for name, words in _ENGINES.items():
        if chosen[name] in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{words} is not supported ({name}={os.environ[name]}): CRaFT trains replicas (DDP) or shards (FSDP2); "
                f"start it with accelerate launch --multi_gpu, or with --use_fsdp --fsdp_version 2"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            f"FSDP version {os.environ.get('FSDP_VERSION', '1')} is not supported: its flat shards hide what belongs "
            f"to which parameter; pass --fsdp_version 2 to accelerate launch"
        )
    for name, (allowed, remedy) in _SETTINGS.items():
        if os.environ.get(name, allowed[0]).lower() not in allowed:
            raise ValueError(f"{name}={os.environ[name]} is not supported in several processes: {remedy}")


_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config (tensor, context or pipeline parallelism)",
}
# Variable → values that mean something here, and what to do instead of others.
_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": (
        ("no", "bf16"),
        "gradients would be neither scaled nor unscaled; pass --mixed_precision bf16 to accelerate launch",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("1", ""),
        "accelerate does not run the steps; pass --gradient_accumulation_steps to train.py",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (
        ("no", ""),
        "the retention loss would be computed beside it; pass --policy.compile_model=true to train.py",
    ),
}


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and this one among them.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        accelerator: accelerate's, None in one process.
    """

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Meet the other processes, if there are any.

        Args:
            device: ``cpu``, or ``cuda`` for the GPU that the launcher gave this process.

        Raises:
            ValueError: The launcher asks for what CRaFT's step cannot do.
        """
        if world_size() == 1:
            return ALONE
        refuse_other_engines()
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        accelerator = Accelerator(
            step_scheduler_with_optimizer=False,
            fsdp_plugin=_fsdp_plugin(),
            # As LeRobot: not every parameter is reached by every batch (an absent camera's, a value head's).
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
            cpu=device == "cpu",
        )
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether every process holds a shard of the policy (FSDP2)."""
        return self.accelerator is not None and self.accelerator.is_fsdp2

    def wrap(self, policy: nn.Module) -> nn.Module:
        """The policy as the task's forward has to call it; the optimizer is built afterwards, on what trains then."""
        if self.accelerator is None:
            return policy
        if not self.sharded:
            wrapped: nn.Module = self.accelerator.prepare_model(policy)
            return wrapped
        # accelerate shards a model only together with an optimizer, whose parameters it exchanges. Ours would lay out
        # buffers for the whole model first; this one holds nothing.
        wrapped, _ = self.accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.0))
        self.accelerator._optimizers.clear()
        _open_forward(wrapped)
        return wrapped

    def unwrap(self, policy: nn.Module) -> nn.Module:
        """The policy itself. DDP's wrapper must not see the retention loss; FSDP2 wraps nothing."""
        if self.accelerator is None or self.sharded:
            return policy
        inner: Any = policy.module
        return inner

    def inside_forward(self, policy: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a scalar loss on parts of the policy with what its forward has: FSDP2's hooks, or autocast."""
        if self.accelerator is None:
            return compute()
        if self.sharded:
            gathered: Tensor = getattr(policy, _INSIDE)(compute)
            return gathered
        with self.accelerator.autocast():
            return compute()

    def shares(self, order: Iterable[int], batch_size: int) -> Shares:
        """This process' part of the batches that all of them take together."""
        return Shares(order, batch_size, self.rank, self.count)

    def quietly(self, policy: nn.Module, is_last: bool) -> Any:
        """A context in which backward passes do not average yet: for all micro-batches but the last."""
        return nullcontext() if self.accelerator is None or is_last else self.accelerator.no_sync(policy)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over processes."""
        if self.count > 1:
            value = value / self.count
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def together(self, make: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """Do something that can fail, in all processes: where one fails all do, and the first says why.

        Raises:
            Exception: What ``make`` raised here; a ValueError that names the process where it was another one.
        """
        if self.count == 1:
            return make()
        failed: Exception | None = None
        try:
            made = make()
        except errors as error:
            failed = error
        told: list[str | None] = [None] * self.count
        dist.all_gather_object(told, None if failed is None else f"{failed}")
        if failed is not None:
            raise failed
        for rank, text in enumerate(told):
            if text is not None:
                raise ValueError(f"process {rank} of {self.count}: {text}")
        return made

    def close(self) -> None:
        """Leave the process group."""
        if self.accelerator is not None:
            self.accelerator.end_training()


@dataclass(frozen=True)
class Shares:
    """Batches of one process: the ``rank``-th part of every ``count * batch_size`` samples in a row.

    A rest at the end of an epoch is filled up with its own samples, over and over. accelerate's ``BatchSamplerShard``
    fills up with the first samples that it saw, which after a resume are others than without.
    """

    order: Iterable[int]
    batch_size: int
    rank: int
    count: int

    def __iter__(self) -> Iterator[list[int]]:
        """One epoch."""
        size, first = self.count * self.batch_size, self.rank * self.batch_size
        for together in BatchSampler(self.order, size, drop_last=False):
            yield list(islice(cycle(together), first, first + self.batch_size))


ALONE = Ranks()


def _fsdp_plugin() -> Any:
    """Accelerate's settings of FSDP2 as the launcher gives them, None without FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin()
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "bf16":
        # accelerate would also average gradients and round losses in bf16: λ is held against the loss.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return plugin


def _open_forward(root: nn.Module) -> None:
    """Give a sharded policy a second way in: a call that computes on its parts, with the hooks of its forward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def run(self: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    setattr(root, _INSIDE, types.MethodType(run, root))
    register_fsdp_forward_method(root, _INSIDE)


def full_state(policy: nn.Module, optimizer: CraftOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state of a sharded policy, whole, on the CPU of the first process.

    All processes call it. The optimizer's state has the form of one process: numbered parameters.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(policy, optimizer, options=options)
    return weights, _numbered(state)


def _numbered(state: Any) -> dict[str, Any]:
    """An optimizer's state with numbers for the names of its parameters."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    numbered = {numbers[name]: entry for name, entry in state["state"].items()}
    return {"state": dict(sorted(numbered.items())), "param_groups": groups}
