"""A whole iteration: two backward passes and the step, against two backward passes whose gradients are dropped."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks import harness
from benchmarks.contenders import Craft, Eager, FusedAdamW
from benchmarks.harness import Case, Problem

# Where the optimizer's share shows: square layers and a small batch, as an adapter or a policy's head has them.
WIDTH, LAYERS, BATCH = {"cpu": 1024, "cuda": 4096}, {"cpu": 20, "cuda": 18}, {"cpu": 8, "cuda": 64}
KINDS = {"dropped": None, "craft": Craft, "eager": Eager, "adamw_fused": FusedAdamW}
TITLES = {
    "dropped": "two backwards, gradients dropped",
    "craft": "two backwards + CraftOptimizer",
    "eager": "two backwards + eager sequence + AdamW(fused)",
    "adamw_fused": "two backwards, one dropped + AdamW(fused)",
}


class Network(Problem):
    """Problem whose gradients come from a network of the same shapes."""

    def __init__(self, device: torch.device, precision: str) -> None:
        width = WIDTH[device.type]
        shapes = tuple((None, (width, width)) for _ in range(LAYERS[device.type]))
        super().__init__(Case("network", f"{len(shapes)} layers of {width}", shapes), precision, device)
        dtype = harness.DTYPES[precision]
        gen = torch.Generator(device).manual_seed(0)
        self.inputs = [torch.randn(BATCH[device.type], width, generator=gen, device=device).to(dtype) for _ in range(2)]

    def loss(self, params: list[nn.Parameter], which: int) -> torch.Tensor:
        x = self.inputs[which]
        for p in params:
            x = x + torch.tanh(nn.functional.linear(x, p))
        return (x - 1.0 + which).square().mean()


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def networks():
    kept = {}

    def get(device, precision):
        if (device, precision) not in kept:
            kept.clear()
            kept[device, precision] = Network(torch.device(device), precision)
        return kept[device, precision]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_iteration(benchmark, networks, device, precision, kind, record, request):
    """The difference to ``dropped`` is what a step costs, landing in the backward's hooks included."""
    network = networks(device, precision)
    made = None if KINDS[kind] is None else KINDS[kind](network)
    params = network.parameters() if made is None else made.params

    def backward(which):
        network.loss(params, which).backward()

    def drop():
        for p in params:
            p.grad = None

    def give_ret():
        backward(0)

    def give_task():
        backward(1)

    def run():
        if made is None or kind == "adamw_fused":
            give_ret()
            drop()
        if made is None:
            give_task()
            drop()
        else:
            made.run(give_ret, give_task)
        harness.synchronize(network.device)

    run()
    assert all(p.grad is None for p in params)
    assert all(p.isfinite().all() for p in params)
    start = time.perf_counter()
    run()
    rounds = harness.rounds_for(time.perf_counter() - start, 2 * request.config.getoption("--budget"))
    benchmark.group = f"iteration {precision} {device}"
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return
    record(
        test="iteration",
        device=device,
        case="network",
        precision=precision,
        numel=network.case.numel,
        tensors=len(params),
        contender=kind,
        title=TITLES[kind],
        kind="ours" if kind == "craft" else "baseline",
        extra_peak_bytes=harness.peak_bytes(run, network.device),
        seconds=benchmark.stats.stats.data,
    )
