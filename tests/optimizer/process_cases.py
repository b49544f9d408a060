"""What the processes of tests/optimizer/test_processes.py run: every case gives back what its process saw."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, make_model, ret_loss, task_loss

CONFIG = {"initial_lambda": 0.5, "lambda_lr": 0.1, "epsilon_start": 0.3, "epsilon_end": 0.1, "conflict_threshold": -0.4}


def config(**changes):
    return CraftConfig(**(CONFIG | {"retention_freq": 1} | changes))


def optimizer(model, backend="numba", *, settings=None, **kwargs):
    kwargs.setdefault("lr", 1e-2)
    return CraftOptimizer(model.parameters(), backend=backend, total_steps=10, config=settings or config(), **kwargs)


def shares(batch, rank, world):
    """This process' part of a global batch."""
    return tuple(part.chunk(world)[rank] for part in batch)


def record(opt):
    m = opt.metrics()
    names = ("dot", "cos", "conflict", "grad_norm", "lam_before", "lam_after", "epsilon", "retention_loss", "skipped")
    return [getattr(m, name).item() for name in names]


def whole(model):
    """All parameters as one vector, gathered where they are sharded."""
    parts = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return torch.cat([part.reshape(-1).float() for part in parts])


def loop(model, opt, data, *, module=None, rank=0, world=1, every=1, micro=1, sync_each=True):
    """The explicit loop; ``module`` is what the retention loss runs on."""
    module = module or model
    seen = []
    for i, batch in enumerate(data):
        parts = [shares(part, rank, world) for part in zip(*(x.chunk(micro) for x in batch), strict=True)]
        if i % every == 0:
            for k, part in enumerate(parts):
                loss = ret_loss(module, part) / micro
                with opt.retention(loss, sync=sync_each or k == micro - 1):
                    loss.backward()
        for k, part in enumerate(parts):
            quiet = k < micro - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if quiet else contextlib.nullcontext():
                (task_loss(model, part) / micro).backward()
        opt.step()
        opt.zero_grad()
        seen.append(record(opt))
    return seen


def replicas(rank, world, folder, *, backend="numba", dtype=torch.float32, steps=6, settings=None, **kwargs):
    """DDP on this process' share of every batch."""
    model = make_model(dtype=dtype)
    ddp = DistributedDataParallel(model)
    opt = optimizer(model, backend, settings=settings)
    seen = loop(ddp, opt, batches(steps, dtype=dtype), module=model, rank=rank, world=world, **kwargs)
    return {"seen": seen, "params": whole(model), "state": opt.state_dict()}


def sharded(model, world, *, policy=None, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (world,))
    keywords = {"mesh": mesh} | ({} if policy is None else {"mp_policy": policy})
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **keywords)
    return fully_shard(model, **keywords)


def shards(rank, world, folder, *, backend="numba", policy=None, steps=6, settings=None, mesh=None, every=1):
    """FSDP2 on this process' share of every batch."""
    model = sharded(make_model(), world, policy=policy, mesh=mesh)
    opt = optimizer(model, backend, settings=settings)
    seen = loop(model, opt, batches(steps), rank=rank, world=world, every=every)
    return {"seen": seen, "params": whole(model)}


def hybrid_shards(rank, world, folder):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return shards(rank, world, folder, mesh=mesh)


def shards_in_bf16(rank, world, folder):
    return shards(rank, world, folder, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def exact_losses(rank, world, folder, *, shard=False):
    """L_ret in numbers whose means are exact, so that λ has nothing to be rounded differently by."""
    model = make_model()
    ddp = model if world == 1 else sharded(model, world) if shard else DistributedDataParallel(model)
    opt = optimizer(model)
    seen = []
    for i, batch in enumerate(batches(6)):
        part = shares(batch, rank, world)
        told = torch.arange(8.0).add(i).div(16.0).chunk(world)[rank].mean()
        loss = ret_loss(ddp if shard else model, part)
        with opt.retention(told):
            loss.backward()
        task_loss(ddp, part).backward()
        opt.step()
        opt.zero_grad()
        seen.append([opt.metrics().lam_after.item(), opt.metrics().epsilon.item(), opt.metrics().conflict.item()])
    return {"seen": seen}


def many_steps(rank, world, folder):
    return replicas(rank, world, folder, steps=200, every=3, settings=config(off_steps="reuse", retention_freq=3))


def reached_by_one(rank, world, folder, *, backend="numba"):
    """Only the first process' retention loss depends on the last layer; nobody's depends on the second."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)])
    before = [p.detach().clone() for p in model[1].parameters()]
    opt = optimizer(model, backend)
    x = torch.ones(2, 6) * (rank + 1)
    for _ in range(2):
        loss = model[0](x).square().mean() + (model[2](x).square().mean() if rank == 0 else 0.0)
        with opt.retention(loss):
            loss.backward()
        opt.step()
        opt.zero_grad()
    untouched = all(torch.equal(a, b) for a, b in zip(before, model[1].parameters(), strict=True))
    return {"params": whole(model), "untouched": untouched, "state": sorted(opt.state_dict()["state"])}


def spoiled(rank, world, folder, *, where, backend="numba", shard=False):
    """Something is not finite in the last process alone, at the second step."""
    model = make_model()
    ddp = sharded(model, world) if shard else DistributedDataParallel(model)
    opt = optimizer(model, backend)
    kept, skipped = [], []
    for i, batch in enumerate(batches(3)):
        task, ret = (part.clone() for part in shares(batch, rank, world))
        bad = i == 1 and rank == world - 1
        if bad and where == "task":
            task[0, 0] = float("nan")
        if bad and where == "retention":
            ret[0, 0] = float("inf")
        loss = ret_loss(ddp if shard else model, (task, ret))
        with opt.retention(loss * float("nan") if bad and where == "loss" else loss):
            loss.backward()
        task_loss(ddp, (task, ret)).backward()
        opt.step()
        opt.zero_grad()
        kept.append(whole(model))
        skipped.append(opt.metrics().skipped.item())
    return {"params": kept, "skipped": skipped, "lam": opt.metrics().lam_after.item()}


def scaled(rank, world, folder, *, shard=False):
    """A GradScaler, and an overflow of the task gradient in the last process at the second step."""
    model = make_model()
    ddp = sharded(model, world) if shard else DistributedDataParallel(model)
    opt = optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped = []
    for i, batch in enumerate(batches(3)):
        part = shares(batch, rank, world)
        loss = ret_loss(ddp if shard else model, part)
        with opt.retention(loss):
            scaler.scale(loss).backward()
        loss = task_loss(ddp, part)
        scaler.scale(loss * float("inf") if i == 1 and rank == world - 1 else loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        skipped.append(opt.metrics().skipped.item())
    return {"params": whole(model), "skipped": skipped, "scale": scaler.get_scale()}


def refusals(rank, world, folder):
    """What is refused, and with which words."""
    said = {}

    def attempt(name, do):
        try:
            do()
            said[name] = None
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
        dist.barrier()

    def no_ddp():
        model = make_model()
        opt = optimizer(model)
        task_loss(model, shares(batches(1)[0], rank, world)).backward()
        opt.step()

    def no_ddp_alone():
        model = make_model()
        groups = [dist.new_group([r]) for r in range(world)]
        opt = optimizer(model, process_group=groups[rank])
        loss = ret_loss(model, shares(batches(1)[0], rank, world))
        with opt.retention(loss):
            loss.backward()
        task_loss(model, shares(batches(1)[0], rank, world)).backward()
        opt.step()

    def other_parameters():
        model = make_model(width=24 + rank)
        opt = optimizer(model)
        loss = ret_loss(model, batches(1)[0])
        with opt.retention(loss):
            loss.backward()

    def some_plain():
        model = sharded(make_model(), world)
        both = [*model.parameters(), nn.Parameter(torch.ones(3))]
        opt = CraftOptimizer(both)
        both[0].grad = torch.zeros_like(both[0])
        opt.step()

    def tensor_parallel():
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        model = parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
        opt = CraftOptimizer(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        opt.step()

    def fsdp1():
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=True)
        opt = CraftOptimizer(model.parameters())
        task_loss(model, batches(1)[0]).backward()
        opt.step()

    for case in (no_ddp, no_ddp_alone, other_parameters, some_plain, tensor_parallel, fsdp1):
        attempt(case.__name__, case)
    return said


def save_shards(rank, world, folder, *, amsgrad=False):
    """Three steps, saved through torch.distributed.checkpoint, and three more."""
    model = sharded(make_model(), world)
    opt = optimizer(model, settings=config(off_steps="reuse", retention_freq=2), amsgrad=amsgrad)
    loop(model, opt, batches(3), rank=rank, world=world, every=2)
    weights, moments = dcp_state.get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=Path(folder) / "dcp")
    full = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = dcp_state.get_state_dict(model, opt, options=full)
    if rank == 0:
        torch.save(gathered, Path(folder) / "full.pt")
    dist.barrier()
    return {"params": whole(model)} | go_on(model, opt, rank, world)


def load_shards(rank, world, folder, *, amsgrad=False, full=False):
    """Load what save_shards() wrote, in as many processes as there are now, and go on."""
    model = make_model(seed=1)
    if world > 1:
        model = sharded(model, world)
    opt = optimizer(model, settings=config(off_steps="reuse", retention_freq=2), amsgrad=amsgrad)
    if full:
        weights, moments = torch.load(Path(folder) / "full.pt", weights_only=True)
        options = dcp_state.StateDictOptions(full_state_dict=True)
    else:
        weights, moments = dcp_state.get_state_dict(model, opt)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=Path(folder) / "dcp")
        options = dcp_state.StateDictOptions()
    dcp_state.set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=moments, options=options)
    return {"params": whole(model)} | go_on(model, opt, rank, world)


def go_on(model, opt, rank, world):
    """Three more steps; the third is one with retention again."""
    for batch in batches(3, seed=5):
        part = shares(batch, rank, world)
        if opt.retention_due:
            loss = ret_loss(model, part)
            with opt.retention(loss):
                loss.backward()
        task_loss(model, part).backward()
        opt.step()
        opt.zero_grad()
    return {"after": whole(model), "last": record(opt), "attempted": opt.attempted_steps}
