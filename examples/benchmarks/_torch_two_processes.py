"""The torch worker of `two_processes.py`, which starts two of these, in an environment
with torch.
"""

# pyright: reportMissingImports=false

import collections
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed import pipelining
from two_processes import ALONE, INTERLEAVED, replies, serve

BLOCKS, HEADS = 8, 8


class Block(nn.Module):
    """The same transformer block as in the JAX worker."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # A little faster on a CPU than the two products with a softmax between them.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Maker:
    """Makes the steps, with their arguments."""

    def __init__(self, rank: int, width: int, batch: int, tokens: int) -> None:
        self.rank = rank
        torch.manual_seed(0)  # the same in both processes
        self.blocks = [Block(width) for _ in range(BLOCKS)]
        self.x, self.t = torch.randn(2, batch, tokens, width)

    def __call__(self, schedule: str, checkpoint: str, m: int):
        """A step, and the loss and the sum of the squared gradients that it
        computes.
        """
        assert checkpoint == "never"
        if schedule == "unpipelined":
            run, modules = self.unpipelined(m)
        elif schedule.startswith(ALONE):
            run, modules = self.alone(m)
        else:
            run, modules = self.pipelined(schedule, m)

        def step() -> float | torch.Tensor:
            for module in modules:
                module.zero_grad(set_to_none=True)
            return run()

        loss = float(step())
        grads = [p.grad for module in modules for p in module.parameters()]
        assert all(g is not None for g in grads)
        values = torch.tensor(
            [loss, sum(float(g.double().square().sum()) for g in grads)],
            dtype=torch.float64,
        )
        dist.all_reduce(values)
        return step, *values.tolist()

    def unpipelined(self, m: int):
        """The step on one core: one microbatch after the other, gradients summed in
        place.
        """
        if self.rank:
            return lambda: 0.0, []
        model = nn.Sequential(*self.blocks)
        pieces = list(zip(self.x.chunk(m), self.t.chunk(m), strict=True))

        def run() -> torch.Tensor:
            total = torch.zeros(())
            for x, t in pieces:
                loss = F.mse_loss(model(x), t) / m
                loss.backward()
                total += loss.detach()
            return total

        return run, [model]

    def alone(self, m: int):
        """What a stage of two computes, in the order of 1F1B; nothing is sent."""
        half = BLOCKS // 2
        model = nn.Sequential(*self.blocks[self.rank * half :][:half])
        pieces = list(zip(self.x.chunk(m), self.t.chunk(m), strict=True))
        behind = 1 - self.rank  # forwards of the first stage that run ahead

        def run() -> torch.Tensor:
            outputs: collections.deque[torch.Tensor] = collections.deque()
            for n in range(m + behind):
                if n < m:
                    x = pieces[n][0].detach().requires_grad_(bool(self.rank))
                    outputs.append(model(x))
                if n >= behind:
                    y, t = outputs.popleft(), pieces[n - behind][1]
                    if self.rank:
                        (F.mse_loss(y, t) / m).backward()
                    else:
                        y.backward(t)
            return torch.zeros(())

        return run, [model]

    def pipelined(self, name: str, m: int):
        each = 2 if name in INTERLEAVED else 1
        stages, size = 2 * each, BLOCKS // (2 * each)
        mine = range(self.rank, stages, 2)
        modules = [nn.Sequential(*self.blocks[s * size : (s + 1) * size]) for s in mine]
        parts = [
            pipelining.PipelineStage(module, s, stages, torch.device("cpu"))
            for module, s in zip(modules, mine, strict=True)
        ]
        # The mean over microbatches is taken in the loss: cheaper than scaling every
        # gradient at the end.
        schedule = getattr(pipelining, name)(
            parts if each > 1 else parts[0],
            n_microbatches=m,
            loss_fn=lambda y, t: F.mse_loss(y, t) / m,
            scale_grads=False,
        )

        def run() -> float | torch.Tensor:
            if self.rank == 0:
                schedule.step(self.x, return_outputs=False)
                return 0.0
            losses: list[torch.Tensor] = []
            schedule.step(target=self.t, losses=losses, return_outputs=False)
            return torch.stack(losses).sum()

        return run, modules


def main() -> None:
    options = json.loads(sys.argv[1])
    reply = replies()
    torch.set_num_threads(1)
    rank, port = options.pop("rank"), options.pop("port")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    dist.barrier()
    reply("torch", torch.__version__)
    serve(reply, Maker(rank, **options), dist.barrier)


if __name__ == "__main__":
    main()
