"""The worker of `peers.py` for torch: it starts a process for each stage."""

# pyright: reportMissingImports=false

import json
import queue
import sys
from typing import Any

import peers
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from peers import CHUNKS, STAGES, Size

# --- user code ---
from torch import multiprocessing, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from two_processes import free_port


class Stage(nn.Module):
    def __init__(self, arrays, width):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(width) for _ in range(arrays))

    def forward(self, x):
        return torch.tanh(x * sum(self.weights))


def pipeline(rank, arrays, width):
    module = Stage(arrays, width)
    stage = PipelineStage(module, rank, STAGES, torch.device("cpu"))
    return module, Schedule1F1B(stage, n_microbatches=CHUNKS, loss_fn=F.mse_loss)


def run_step(rank, module, schedule, x, t):
    module.zero_grad(set_to_none=True)
    losses = []
    if rank == 0:
        schedule.step(x, return_outputs=False)
    elif rank == STAGES - 1:
        schedule.step(target=t, losses=losses, return_outputs=False)
    else:
        schedule.step(return_outputs=False)
    return sum(losses) / CHUNKS


# --- end of user code ---


def made(rank: int, size: Size):
    torch.manual_seed(rank)
    x, t = torch.ones(size.rows, size.width), torch.zeros(size.rows, size.width)
    module, schedule = pipeline(rank, size.arrays, size.width)
    return lambda: run_step(rank, module, schedule, x, t), (module, x, t)


def compare(rank: int, size: Size) -> None:
    step, (module, x, t) = made(rank, size)
    loss = step()
    loss = torch.as_tensor(loss).detach()
    own = [float(loss), sum(float(p.grad.square().sum()) for p in module.parameters())]
    values = torch.tensor(own)
    dist.all_reduce(values)
    if rank:
        return
    modules = []
    for s in range(STAGES):
        torch.manual_seed(s)
        modules.append(Stage(size.arrays, size.width))
    plain = nn.Sequential(*modules)
    want = F.mse_loss(plain(x), t)
    want.backward()
    squares = sum(float(p.grad.square().sum()) for p in plain.parameters())
    own_loss, own_squares = values.tolist()
    peers.check(own_loss, own_squares, (float(want.detach()), squares))


def work(rank: int, port: int, options: dict[str, Any], results: Any) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=STAGES)
    dist.barrier()
    times = {}
    for arrays in options["arrays"]:
        step, _ = made(rank, Size(arrays, 4, 4 * CHUNKS))
        times[arrays] = peers.timed(step, options["repeats"], dist.barrier)
    compare(rank, Size(2, 4, 4 * CHUNKS))
    step, _ = made(rank, Size(5, options["width"], options["rows"]))
    results.put((times, peers.peak_bytes(step)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    options = json.loads(sys.argv[1])
    results = multiprocessing.get_context("spawn").Queue()
    running = multiprocessing.start_processes(
        work, (free_port(), options, results), STAGES, join=False
    )
    assert running is not None
    found = []
    while len(found) < STAGES:
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            running.join(timeout=0)  # raises what a process has raised
    times = {
        arrays: peers.together([own[arrays] for own, _ in found])
        for arrays in options["arrays"]
    }
    answer = {
        "name": f"torch {torch.__version__}",
        "times": times,
        "lines": peers.user_lines(__file__),
        "peak": sum(peak for _, peak in found) / 2**20,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
