"""A captured iteration, replayed through changing learning rates, against the eager loop. Needs a GPU."""

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, flat_params, make_model, ret_loss, task_loss
from tests.support.asserts import assert_norm_close
from tests.support.tolerances import ADAMW_NORM

pytestmark = pytest.mark.gpu


class Run:
    """A model with its optimizer and one place for the batch, so that a graph reads what is copied there."""

    def __init__(self, dtype, **config):
        self.model = make_model(dtype=dtype, width=64).cuda()
        self.opt = CraftOptimizer(
            self.model.parameters(), lr=1e-3, backend="triton", config=CraftConfig(lambda_controller="nupi", **config)
        )
        self.batch = tuple(torch.zeros(8, 10, dtype=dtype, device="cuda") for _ in range(2))

    def load(self, batch, lr):
        for place, values in zip(self.batch, batch, strict=True):
            place.copy_(values)
        for group in self.opt.param_groups:
            group["lr"] = lr

    def iteration(self, has_ret):
        if has_ret:
            loss = ret_loss(self.model, self.batch)
            with self.opt.retention(loss):
                loss.backward()
        task_loss(self.model, self.batch).backward()
        self.opt.step()
        self.opt.zero_grad()

    def warm_up(self, data):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for has_ret, batch in zip((True, False, True, False), data, strict=True):
                self.load(batch, 1e-3)
                self.iteration(has_ret)
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, has_ret):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.iteration(has_ret)
        return graph


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"bf16_rounding": "stochastic"})],
    ids=["float32", "bfloat16", "stochastic"],
)
def test_graphs_with_and_without_retention_follow_the_eager_loop(dtype, config):
    if not torch.cuda.is_available():
        pytest.fail("-m gpu was asked for and torch sees no CUDA device")
    data = batches(12, dtype=dtype)
    eager, replayed = Run(dtype, **config), Run(dtype, **config)
    for run in (eager, replayed):
        run.warm_up(data[:4])
    before = flat_params(replayed.model)
    graphs = {has_ret: replayed.capture(has_ret) for has_ret in (True, False)}
    assert torch.equal(flat_params(replayed.model), before), "a capture must not take the step"
    for number, batch in enumerate(data[4:]):
        has_ret, lr = number % 3 == 0, 1e-3 / (1 + number)
        eager.load(batch, lr)
        eager.iteration(has_ret)
        replayed.load(batch, lr)
        replayed.opt.prepare_replay()
        graphs[has_ret].replay()
    # The same kernels on the same numbers, but the libraries behind the model may choose others under a capture.
    tolerance = ADAMW_NORM if dtype == torch.float32 else 2.0**-8
    assert_norm_close(flat_params(replayed.model), flat_params(eager.model), tolerance, "after replays")
    ours, theirs = replayed.opt.metrics().as_floats(), eager.opt.metrics().as_floats()
    assert ours["lam_after"] == pytest.approx(theirs["lam_after"], rel=1e-3)
    assert replayed.opt.attempted_steps == eager.opt.attempted_steps == 12


def test_a_capture_before_the_first_step_of_its_kind_is_refused():
    run = Run(torch.float32)
    run.load(batches(1)[0], 1e-3)
    run.iteration(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture run one step"), torch.cuda.graph(graph):
        run.iteration(False)
