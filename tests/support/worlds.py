"""Run functions in several processes of a gloo group and collect what each found."""

import importlib
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_world(world, module, cases, folder):
    """Run cases in ``world`` new processes.

    Args:
        world: Number of processes.
        module: The module that holds the functions; each is called as ``function(rank, world, folder, **kwargs)``.
        cases: Name → (function, kwargs), in the order in which they run.
        folder: Where the processes may leave files.

    Returns:
        What each process found: name → what the function gave, tensors and plain values.
    """
    torch.multiprocessing.spawn(_run, (world, module, cases, str(folder)), nprocs=world)
    found = [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    for rank, content in enumerate(found):
        for name, value in content.items():
            assert not isinstance(value, str), f"case {name}, process {rank}:\n{value}"
    return found


def _run(rank, world, module, cases, folder):
    torch.set_num_threads(1)
    # A file, not a port: a free port may be taken by the time that it is used.
    store = dist.FileStore(str(Path(folder) / f"store-of-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    functions = vars(importlib.import_module(module))
    found = {}
    for name, (function, kwargs) in cases.items():
        try:
            found[name] = functions[function](rank, world, folder, **kwargs)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the others may wait for this one
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
