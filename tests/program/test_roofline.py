"""What equations cost by the roofline model, beside sums by hand. Nothing is
compiled.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fpipe._program.graph import inline, trace
from fpipe._program.roofline import Machine, costs

# So few FLOPs per byte that all but large products wait for memory.
MACHINE = Machine(flops_per_byte=8.0, patches=2.0)

# Bytes are free: all that counts are FLOPs.
FAST_MEMORY = Machine(flops_per_byte=1e-9, patches=2.0)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def costs_of(f, *shapes, trained=(0,), machine=MACHINE):
    """The name and the cost of each equation.

    Arguments:
        trained: the arguments that have gradients.
    """
    graph = inline(trace(lambda *arrays: jax.tree.leaves(f(*arrays)), *shapes))
    wanted = [graph.inputs[n] for n in trained]
    found = costs(graph, graph.nodes, wanted, machine)
    return [(node.name, found[node]) for node in graph.nodes]


def total(f, *shapes, **options: Any):
    return sum(cost for _, cost in costs_of(f, *shapes, **options))


@pytest.mark.quick
def test_a_dense_layer():
    def dense(w, b, x):
        return jnp.tanh(x @ w + b)

    found = costs_of(dense, shape(512, 512), shape(1, 512), shape(256, 512))
    product, size = 2 * 256 * 512 * 512, 4 * 256 * 512
    names = [name for name, _ in found]
    assert names == ["dot_general", "add", "tanh"]
    # Two products: `x` has no gradient. The loop reads `y` and its bias, reads `y`
    # again and writes its gradient; it writes its result and reads the gradient of it.
    by_name = dict(found)
    assert by_name["dot_general"] == 2 * product
    assert by_name["add"] == 8 * (3 * size + 4 * 512)
    assert by_name["tanh"] == 8 * 2 * size


def test_bytes_and_flops_are_not_added_up():
    def thin(w, x):
        return x @ w

    # A product with a vector waits for the matrix: it reads each number once.
    size = 4 * (512 * 512 + 2 * 512)
    assert total(thin, shape(512, 512), shape(1, 512)) == 2 * 8 * size
    fast = total(thin, shape(512, 512), shape(1, 512), machine=FAST_MEMORY)
    assert fast == 2 * 2 * 512 * 512


def test_a_chain_of_any_length_moves_what_it_reads_and_writes():
    def chain(length):
        def run(x):
            for _ in range(length):
                x = jnp.sin(x) * x
            return x

        return total(run, shape(1024))

    assert chain(1) == chain(5) == 8 * 5 * 4096
    # Until its arithmetic takes longer.
    assert chain(80) == 3 * 2 * 80 * 1024


def test_what_a_reduction_makes_is_read_by_another_loop():
    def centred(x):
        return x - x.sum(0, keepdims=True)

    # Both loops read `x`; the second one writes.
    size, row = 4 * 512 * 64, 4 * 64
    assert total(centred, shape(512, 64)) == 8 * (
        (3 * size + 2 * row) + (3 * size + 3 * row + 2 * size)
    )


def test_a_residual_goes_through_memory():
    """Its sum waits for the product, and is read when that is done."""

    def block(w, x):
        h = jnp.sin(x)
        return h + h @ w

    by_name = dict(costs_of(block, shape(64, 64), shape(512, 64), trained=(0, 1)))
    size = 4 * 512 * 64
    assert by_name["sin"] == 8 * (3 + 2) * size
    assert by_name["add"] == 8 * (3 + 3 + 2) * size


def conv(kernel, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


def conv_cost(channels, machine=MACHINE, **options: Any):
    kernel, x = shape(3, 3, channels, channels), shape(4, 32, 32, channels)
    return total(conv, kernel, x, machine=machine, **options)


def test_a_convolution_with_few_channels_waits_for_its_patches():
    positions = 4 * 32 * 32

    def work(channels):
        return 3 * 2 * 9 * channels**2 * positions

    both: Any = {"trained": (0, 1)}
    for channels in (64, 256):
        assert conv_cost(channels, **both) == work(channels)
    # 9 channels of each position are written and read, for 2 * 9 * 8 FLOPs each.
    moved = 2 * 9 * 8 * positions + 8 * positions + 9 * 8 * 8
    assert conv_cost(8, **both) == 8 * 4 * 3 * moved
    assert conv_cost(8, **both) > 3 * work(8)
    assert conv_cost(8, FAST_MEMORY, **both) == work(8)
    # A kernel of one position has no patches.
    small = total(conv, shape(1, 1, 16, 16), shape(4, 32, 32, 16), trained=(0, 1))
    assert small == 3 * 8 * 4 * (2 * 16 * positions + 16 * 16)


def test_a_lookup_has_the_gradient_of_its_table():
    def lookup(table, words):
        return table[words]

    words = shape(32, dtype=jnp.int32)
    small, large = (total(lookup, shape(n, 64), words) for n in (1000, 2000))
    assert large - small == 8 * 4 * 64 * 1000
    # Without a gradient it does not matter how large the table is.
    small, large = (
        total(lookup, shape(n, 64), words, trained=()) for n in (1000, 2000)
    )
    assert small == large


def test_without_a_gradient_there_is_no_backward():
    def products(w, x):
        return jax.lax.stop_gradient(x @ w) @ w

    product = 2 * 512**3
    both = costs_of(products, shape(512, 512), shape(512, 512))
    assert [cost for name, cost in both if name == "dot_general"] == [
        2 * product,
        2 * product,
    ]
    none = costs_of(products, shape(512, 512), shape(512, 512), trained=())
    assert sum(cost for name, cost in none if name == "dot_general") == 2 * product


def test_loops_branches_and_checkpoints():
    w, x = shape(512, 512), shape(512, 512)
    product = 2 * 512**3

    def body(h, w):
        return h @ w

    def repeated(w, x):
        return jax.lax.scan(lambda h, _: (body(h, w), None), x, length=5)[0]

    def chosen(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: body(body(x, w), w), lambda: x)

    both: Any = {"trained": (0, 1)}
    assert total(repeated, w, x, **both) == 5 * 3 * product
    assert dict(costs_of(chosen, w, x, **both))["cond"] == 6 * product
    remade = total(jax.checkpoint(lambda w, x: body(x, w)), w, x, **both)
    assert remade == pytest.approx(4 * product)
