"""Host time per action of a placed training step, beside a hand-written loop that does
the same.

Tiny stages, so that nothing but dispatch takes time: S=4, m=8, 1F1B, 5 and 50 parameter
arrays per stage. The loop is what one would write by hand for this model alone: `jit`
calls on flat lists, `device_put`s, donated accumulators, the order of the actions
worked out beforehand. Both run alternately in one process; the ratio is that of the
medians. The rows `zb_h1` are the same for ZB-H1 with `checkpoint="never"`, whose loop
has the backward split by hand into a function for the input gradient and one for the
weight gradient.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import fpipe
from fpipe import schedules

STAGES, CHUNKS, WIDTH = 4, 8, 4


def layer(arrays: int) -> fpipe.Layer:
    """One layer with that many parameter arrays."""

    def init(key, x):
        del x
        return [
            jax.random.normal(jax.random.fold_in(key, k), (WIDTH,))
            for k in range(arrays)
        ]

    return fpipe.Layer(apply, init)


def apply(params, x):
    return jnp.tanh(x * sum(params))


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2)


class Loop:
    """The hand-written loop, with remat: a backward starts from the stage's input."""

    def __init__(self, devices):
        self.devices = devices
        order = schedules.simulate(schedules.one_f_one_b(STAGES, CHUNKS)).events
        self.order = [e.action for e in order]

        def last(params, x, t):
            return loss_fn(apply(params, x), t)

        def backward(params, x, g, total):
            _, pull = jax.vjp(apply, params, x)
            grads, gx = pull(g)
            return [a + b for a, b in zip(total, grads, strict=True)], gx

        def backward_last(params, x, t, total):
            grads, gx = jax.grad(lambda p, x: last(p, x, t) / CHUNKS, argnums=(0, 1))(
                params, x
            )
            return [a + b for a, b in zip(total, grads, strict=True)], gx

        def backward_first(params, x, g, total):
            return backward(params, x, g, total)[0]

        self.forward = [jax.jit(lambda p, x: apply(p, x)) for _ in range(STAGES - 1)]
        self.last = jax.jit(last)
        self.first_back = jax.jit(backward_first, donate_argnums=3)
        self.back = [
            jax.jit(lambda *a: backward(*a), donate_argnums=3) for _ in range(STAGES)
        ]
        self.last_back = jax.jit(backward_last, donate_argnums=3)
        self.zeros = [
            jax.jit(lambda p: [jnp.zeros_like(a) for a in p]) for _ in range(STAGES)
        ]
        self.split = jax.jit(lambda x: jnp.split(x, CHUNKS))
        self.mean = jax.jit(lambda *losses: sum(losses) / CHUNKS)

    def __call__(self, params, x, t):
        """One training step: the loss and the gradients of every stage."""
        put, devices = jax.device_put, self.devices
        xs, ts = self.split(x), self.split(t)
        totals = [self.zeros[s](params[s]) for s in range(STAGES)]
        inputs = {(0, i): a for i, a in enumerate(xs)}
        losses, cotangents = [], {}
        for kind, s, i in self.order:
            if kind == "F":
                if s == STAGES - 1:
                    losses.append(self.last(params[s], inputs[s, i], ts[i]))
                else:
                    inputs[s + 1, i] = put(
                        self.forward[s](params[s], inputs[s, i]), devices[s + 1]
                    )
            elif s == STAGES - 1:
                totals[s], g = self.last_back(
                    params[s], inputs.pop((s, i)), ts[i], totals[s]
                )
                cotangents[s - 1, i] = put(g, devices[s - 1])
            elif s:
                totals[s], g = self.back[s](
                    params[s], inputs.pop((s, i)), cotangents.pop((s, i)), totals[s]
                )
                cotangents[s - 1, i] = put(g, devices[s - 1])
            else:
                totals[s] = self.first_back(
                    params[s], inputs.pop((s, i)), cotangents.pop((s, i)), totals[s]
                )
        return self.mean(*losses), totals


class SplitLoop:
    """The hand-written loop for ZB-H1: forwards keep their output, and a backward is
    `I` and `W`.
    """

    def __init__(self, devices):
        self.devices = devices
        # The first stage has no input gradient to compute.
        order = [
            e.action for e in schedules.simulate(schedules.zb_h1(STAGES, CHUNKS)).events
        ]
        self.order = [a for a in order if a.kind != "I" or a.stage]

        def last(params, x, t):
            y = apply(params, x)
            return loss_fn(y, t), y

        def inner(y, g):
            return g * (1 - y * y)

        def input_gradient(params, y, g):
            h = inner(y, g)
            return h * sum(params), h

        def input_gradient_last(params, y, t):
            return input_gradient(params, y, 2 * (y - t) / (y.size * CHUNKS))

        def weight_gradient(x, h, total):
            grad = (x * h).sum(0)
            return [a + grad for a in total]

        def weight_gradient_first(x, y, g, total):
            return weight_gradient(x, inner(y, g), total)

        self.forward = [jax.jit(lambda p, x: apply(p, x)) for _ in range(STAGES - 1)]
        self.last = jax.jit(last)
        self.input = [jax.jit(lambda *a: input_gradient(*a)) for _ in range(STAGES - 1)]
        self.input.append(jax.jit(input_gradient_last))
        self.first_weight = jax.jit(weight_gradient_first, donate_argnums=3)
        self.weight = [
            jax.jit(lambda *a: weight_gradient(*a), donate_argnums=2)
            for _ in range(STAGES)
        ]
        self.zeros = [
            jax.jit(lambda p: [jnp.zeros_like(a) for a in p]) for _ in range(STAGES)
        ]
        self.split = jax.jit(lambda x: jnp.split(x, CHUNKS))
        self.mean = jax.jit(lambda *losses: sum(losses) / CHUNKS)

    def __call__(self, params, x, t):
        """One training step: the loss and the gradients of every stage."""
        put, devices, final = jax.device_put, self.devices, STAGES - 1
        xs, ts = self.split(x), self.split(t)
        totals = [self.zeros[s](params[s]) for s in range(STAGES)]
        inputs = {(0, i): a for i, a in enumerate(xs)}
        losses, outputs, cotangents, inners = [], {}, {}, {}
        for kind, s, i in self.order:
            if kind == "F" and s == final:
                loss, outputs[s, i] = self.last(params[s], inputs[s, i], ts[i])
                losses.append(loss)
            elif kind == "F":
                outputs[s, i] = y = self.forward[s](params[s], inputs[s, i])
                inputs[s + 1, i] = put(y, devices[s + 1])
            elif kind == "I":
                given = ts[i] if s == final else cotangents.pop((s, i))
                g, inners[s, i] = self.input[s](params[s], outputs.pop((s, i)), given)
                cotangents[s - 1, i] = put(g, devices[s - 1])
            elif s:
                totals[s] = self.weight[s](
                    inputs.pop((s, i)), inners.pop((s, i)), totals[s]
                )
            else:
                x, y, g = (
                    inputs.pop((s, i)),
                    outputs.pop((s, i)),
                    cotangents.pop((s, i)),
                )
                totals[s] = self.first_weight(x, y, g, totals[s])
        return self.mean(*losses), totals


def measure(arrays: int, repeats: int, schedule: str) -> tuple[float, float]:
    """Microseconds per action of the pipe and of the loop: medians over alternating
    repeats.
    """
    devices = jax.devices()[:STAGES]
    loop = SplitLoop(devices) if schedule == "zb_h1" else Loop(devices)
    checkpoint = "never" if schedule == "zb_h1" else "always"
    layers = [layer(arrays)] * STAGES
    pipe = fpipe.Pipe(
        layers, devices=devices, chunks=CHUNKS, checkpoint=checkpoint, schedule=schedule
    )
    x = jax.device_put(jnp.ones((4 * CHUNKS, WIDTH)), devices[0])
    t = jax.device_put(jnp.zeros((4 * CHUNKS, WIDTH)), devices[-1])
    params = pipe.init(jax.random.key(0), x)
    runs = {"pipe": pipe.value_and_grad(loss_fn), "loop": loop}
    got, want = (jax.block_until_ready(run(params, x, t)) for run in runs.values())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-6)
    del got, want
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            out = run(params, x, t)
            times[name].append(time.perf_counter() - start)
            jax.block_until_ready(out)
    actions = len(loop.order)
    return tuple(
        statistics.median(times[name]) / actions * 1e6 for name in ("pipe", "loop")
    )  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=300,
        help="steps of each, alternating (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="times the whole is done (default: %(default)s)",
    )
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", STAGES)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, S={STAGES}, "
        f"m={CHUNKS}, 1F1B, checkpoint='always'"
    )
    print("arrays per stage   pipe us/action   loop us/action   ratio")
    for _ in range(args.rounds):
        for schedule in ("1f1b", "zb_h1"):
            for arrays in (5, 50):
                pipe, loop = measure(arrays, args.repeats, schedule)
                label = f"zb_h1 {arrays}" if schedule == "zb_h1" else str(arrays)
                print(
                    f"{label:>16s}   {pipe:14.1f}   {loop:14.1f}   {pipe / loop:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
