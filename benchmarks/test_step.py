"""The optimizer step by itself: every contender on the same gradients, checked against fp64 before it is timed."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import harness
from benchmarks.contenders import CONTENDERS, checked
from benchmarks.harness import STEP_BYTES, clones, place


def test_copy(benchmark, problem, record, request):
    """The copy bandwidth: as many bytes as the step must move, half read and half written."""
    total = problem.case.bytes_of(STEP_BYTES["surgery"], problem.precision)
    source = torch.ones(total // 2, dtype=torch.uint8, device=problem.device)
    target = torch.empty_like(source)

    def run():
        target.copy_(source)
        harness.synchronize(problem.device)

    run()
    start = time.perf_counter()
    run()
    rounds = harness.rounds_for(time.perf_counter() - start, request.config.getoption("--budget"))
    benchmark.group = f"{problem.case.name} {problem.precision} {problem.device.type}"
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    assert torch.equal(source, target)
    if benchmark.stats is not None:
        record(
            test="update",
            **_where(problem),
            contender="copy",
            title="copy of as many bytes",
            kind="bound",
            floor_bytes=total,
            moved_bytes=total,
            seconds=benchmark.stats.stats.data,
        )


def test_update(benchmark, problem, contender, record, request):
    """From two gradients in ``.grad``, one after the other, to updated parameters."""
    made, error = checked(problem, contender)
    kind = CONTENDERS[contender]
    given = {}

    def setup():
        given["ret"], given["task"] = clones(problem.ret), clones(problem.task)
        harness.synchronize(problem.device)

    def run():
        made.run(lambda: place(made.params, given["ret"]), lambda: place(made.params, given["task"]))
        harness.synchronize(problem.device)

    rounds = _rounds(setup, run, request)
    benchmark.group = f"{problem.case.name} {problem.precision} {problem.device.type}"
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return
    extra = {}
    if problem.device.type == "cuda":
        setup()
        extra["launches"] = harness.count_launches(run)
        setup()
        # Without the final synchronisation, which is ours and not the contender's.
        extra["syncs"] = harness.count_syncs(
            lambda: made.run(lambda: place(made.params, given["ret"]), lambda: place(made.params, given["task"]))
        )
    given.clear()
    record(
        test="update",
        **_where(problem),
        contender=contender,
        title=kind.title,
        kind=kind.kind,
        error=error,
        floor_bytes=problem.case.bytes_of(STEP_BYTES[kind.floor], problem.precision),
        moved_bytes=kind.moved_bytes(problem.case, problem.precision, problem.device.type),
        extra_peak_bytes=_extra_peak(problem, made),
        seconds=benchmark.stats.stats.data,
        **extra,
    )


@pytest.mark.parametrize("rival", ["eager", "torchjd_sum", "adamw_fused", "craft_plain"])
def test_side_by_side(benchmark, problem, rival, record, request):
    """Ours and another taking turns, so that a busy machine slows both alike: the ratios to trust."""
    pair = {name: checked(problem, name)[0] for name in ("craft", rival)}
    seconds = {name: [] for name in pair}

    def run():
        for name, one in pair.items():
            given = {"ret": clones(problem.ret), "task": clones(problem.task)}
            harness.synchronize(problem.device)
            start = time.perf_counter()
            one.run(lambda: place(one.params, given["ret"]), lambda: place(one.params, given["task"]))  # noqa: B023
            harness.synchronize(problem.device)
            seconds[name].append(time.perf_counter() - start)

    run()
    start = time.perf_counter()
    run()
    rounds = max(5, harness.rounds_for(time.perf_counter() - start, 2 * request.config.getoption("--budget")))
    for taken in seconds.values():
        taken.clear()
    benchmark.group = f"{problem.case.name} {problem.precision} {problem.device.type} side by side"
    benchmark.pedantic(run, rounds=rounds)
    if benchmark.stats is None:
        return
    record(
        test="side_by_side",
        **_where(problem),
        contender=rival,
        title=CONTENDERS[rival].title,
        kind=CONTENDERS[rival].kind,
        ours_s=harness.quantile(seconds["craft"], 0.5),
        seconds=seconds[rival],
    )


@pytest.mark.parametrize("plain", [False, True], ids=["surgery", "plain"])
def test_landed_step(benchmark, problem, plain, record, request):
    """``CraftOptimizer.step()`` alone, once the backward's hooks have landed the gradients: the kernel's own cost."""
    kind = CONTENDERS["craft_plain" if plain else "craft"]
    made, error = checked(problem, kind.name)
    deliver = _deliver(made.params, problem)

    def setup():
        made.optimizer.zero_grad()
        if not plain:
            with made.optimizer.retention(made.loss):
                deliver["ret"]()
        deliver["task"]()
        harness.synchronize(problem.device)

    def run():
        made.optimizer.step()
        harness.synchronize(problem.device)

    rounds = _rounds(setup, run, request)
    benchmark.group = f"{problem.case.name} {problem.precision} {problem.device.type}"
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return
    extra = {}
    if problem.device.type == "cuda":
        setup()
        extra["launches"] = harness.count_launches(run)
        setup()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.optimizer.step()  # raises at the first wait for the device
        finally:
            torch.cuda.set_sync_debug_mode("default")
        extra["syncs"] = 0
    total = problem.case.bytes_of(STEP_BYTES[kind.floor], problem.precision)
    record(
        test="landed",
        **_where(problem),
        contender=kind.name,
        title=f"{kind.title}, step() alone",
        kind=kind.kind,
        error=error,
        floor_bytes=total,
        moved_bytes=total,
        seconds=benchmark.stats.stats.data,
        **extra,
    )


def _rounds(setup, run, request):
    setup()
    start = time.perf_counter()
    run()
    return harness.rounds_for(time.perf_counter() - start, request.config.getoption("--budget"))


def _deliver(params, problem):
    """Gradients through autograd's own accumulation, hooks included."""
    return {
        "ret": lambda: torch.autograd.backward(params, problem.ret),
        "task": lambda: torch.autograd.backward(params, problem.task),
    }


def _extra_peak(problem, made):
    """Peak memory above parameters and moments, the gradients coming through autograd one after the other."""
    deliver = _deliver(made.params, problem)
    cuda = problem.device.type == "cuda"
    before = torch.cuda.memory_allocated(problem.device) if cuda else harness.live_bytes()
    peak = harness.peak_bytes(lambda: made.run(deliver["ret"], deliver["task"]), problem.device)
    given = sum(t.nbytes for t in (*problem.task, *problem.ret))
    # torch.optim.AdamW keeps moments in the parameters' dtype, everybody else in fp32.
    inner = getattr(made, "optimizer", None)
    like_param = isinstance(getattr(inner, "optimizer", inner), torch.optim.AdamW)
    moments = sum(2 * (p.element_size() if like_param else 4) * p.numel() for p in made.params)
    return before + peak - given - moments - sum(p.nbytes for p in made.params)


def _where(problem):
    return {
        "device": problem.device.type,
        "case": problem.case.name,
        "precision": problem.precision,
        "numel": problem.case.numel,
        "tensors": len(problem.case.tensors),
    }
