"""Where functions are cut, what crosses, and what is refused. Nothing is compiled."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._split import layers
from fpipe._split.pieces import cut_trace
from tests.split.models import EXAMPLES, gpt, residual_mlp, two_inputs, u_net

X = jnp.ones((2, 3))


def owned(split):
    """The paths of the parameters of each piece, and which rows of them."""
    paths = split.cut.function.paths
    return [
        sorted(rows.label(paths[rows.leaf]) for rows in own)
        for own in split.cut.wiring.owned
    ]


def test_a_mark_is_the_identity():
    h = {"a": jnp.ones(2), "n": 3}
    assert fpipe.cut(h)["n"] == 3
    np.testing.assert_array_equal(fpipe.cut(h)["a"], h["a"])
    grads = jax.grad(lambda x: jnp.sum(fpipe.cut(x) ** 2))(jnp.ones(2))
    np.testing.assert_array_equal(grads, jnp.full(2, 2.0))
    with pytest.raises(TypeError, match="no array to mark"):
        fpipe.cut({"n": 3})
    number: Any = 3
    with pytest.raises(TypeError, match="a name must be a string"):
        fpipe.cut(X, number)


@pytest.mark.quick
@pytest.mark.parametrize("name", EXAMPLES)
def test_marks_paths_and_itself(name):
    example = EXAMPLES[name]()
    assert len(example.split()) == example.marks + 1
    assert len(example.split(cuts=example.paths)) == len(example.paths) + 1
    # All parameters have one owner, whoever uses them.
    split = example.split(cuts=example.paths)
    found = {path.split("[")[0] for path in itertools.chain(*owned(split))}
    assert found == set(split.cut.function.paths)


def test_pieces_begin_with_the_parameters_that_are_named():
    split = gpt().split(cuts=["h/1", "h/0"])
    assert owned(split) == [["embed"], ["h/0/out", "h/0/qkv"], ["h/1/out", "h/1/qkv"]]
    assert [layer.borrow for layer in split.layers] == [(), (), ("embed",)]
    # The first piece begins where the function does: it may be named or not.
    assert len(gpt().split(cuts=["embed", "h/0", "h/1"])) == 3


def test_a_tree_that_is_an_array_has_an_owner_with_a_name():
    def twice(w, x):
        return fpipe.cut(jnp.tanh(x @ w)) @ w

    split = fpipe.split(twice, jnp.eye(3), X)
    assert [layer.name for layer in split] == ["piece #0", "piece"]
    assert [layer.borrow for layer in split] == [(), ("piece #0",)]
    assert fpipe.sequential(split)(split.params(jnp.eye(3)), X).shape == (2, 3)
    with pytest.raises(ValueError, match=r"`split.params\(params\)` makes it of the"):
        fpipe.sequential(split)(jnp.eye(3), X)


def test_a_prefix_goes_by_whole_parts():
    def stack(params, x):
        for w in reversed(params["h"]):
            x = jnp.tanh(x @ w)
        return x

    params = {"h": [jnp.eye(3)] * 11}
    split = fpipe.split(stack, params, X, cuts=["h/1"])
    # Not before `h/10`, which is used first.
    assert owned(split) == [sorted(f"h/{n}" for n in range(2, 11)), ["h/0", "h/1"]]


def test_a_key_that_a_later_piece_draws_from_comes_from_the_first():
    def noisy(params, x, *, key):
        h = fpipe.cut(x @ params["w"])
        return h + jax.random.uniform(key, h.shape)

    split = fpipe.split(noisy, {"w": jnp.eye(3)}, X, key=jax.random.key(0))
    first, second = split.layers
    assert (first.needs, second.needs) == (("carry", "key"), ("carry",))
    assert first.stash == second.pop == ("piece 0",)
    cut = split.cut.through_first.trace(split.cut.first)
    assert [str(cut.traced.graph.avals[v]) for v in cut.stashes[0]] == ["key<fry>[]"]
    # A pipe gives it to the piece that draws.
    first, second = split.layers_in(None)
    assert (first.needs, second.needs) == (("key",), ("key",))
    assert split.cut.trace(split.cut.first).stashes == ((), ())


def test_a_trace_is_cut_once_to_find_what_goes_straight(monkeypatch):
    """The cut that shows that nothing more goes through the first piece is kept: each
    piece is as if it were cut with the inputs that go straight at last.
    """
    cuts = []

    def counted(*args):
        cuts.append(args)
        return cut_trace(*args)

    monkeypatch.setattr(layers, "cut_trace", counted)
    split = gpt().split()
    found = split.cut.trace(split.cut.first)
    # With and without a key, trained and evaluated.
    assert len(cuts) == 4
    assert found.straight == {0}  # the mask
    traced, places = split.cut.placed(split.cut.first)
    again = cut_trace(traced, places, split.cut.state_owners, found.straight)
    for piece, other in zip(found.pieces, again.pieces, strict=True):
        assert vars(piece) == vars(other)


def test_equal_pieces_are_equal():
    """The pieces of a transformer have equal names, parameters, inputs and outputs,
    although a mask and a key go to each.
    """
    split = gpt().split()
    embed, first, second, head = split.layers
    assert first.name == second.name == "block *"
    assert (embed.name, head.name) == ("embed", "piece")
    assert first.peek == second.pop == ("piece 0",)
    trace = split.cut.trace(split.cut.first)
    params = [[x.shape for x in own] for own in split.params(split.param_shapes)]
    assert params[1] == params[2]
    names = [[node.name for node in piece.nodes] for piece in trace.pieces]
    assert names[1] == names[2]
    assert len(trace.boundaries[0]) == len(trace.boundaries[1]) == 1


def test_a_mask_is_made_where_it_is_used_and_skips_go_straight():
    trace = gpt().split()
    cut = trace.cut.trace(trace.cut.first)
    shapes = [[str(cut.traced.graph.avals[v]) for v in cut.skips(k)] for k in range(4)]
    # What is added to each pair of tokens is made of the mask, which the call gives.
    assert shapes[1] == ["uint32[2]"]
    assert shapes[3] == []
    tokens, mask = cut.traced.x[1], cut.traced.x[0]
    assert [(tokens in own.given, mask in own.given) for own in cut.pieces] == [
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]
    levels = u_net().split()
    stashed = [layer.stash for layer in levels.layers]
    assert stashed == [("piece 0",), (), (), ()]
    # Half of the lowest level, which piece 0 makes, is made again beside the whole.
    assert [layer.pop for layer in levels.layers] == [(), (), ("piece 0",), ()]


def test_a_penalty_is_made_where_the_parameters_are():
    split = two_inputs().split()
    assert [layer.borrow for layer in split.layers] == [(), ()]
    cut = split.cut.trace(split.cut.first)
    # The sum of squares; the input `b` and the side inputs come by themselves.
    shapes = [str(cut.traced.graph.avals[v]) for v in cut.pieces[1].takes]
    assert sorted(shapes) == ["float32[2,12]", "float32[]"]
    assert all("side" in (layer.needs or ()) for layer in split.layers)


# --- by itself ---


def dense_stack(widths):
    """A function of layers of these widths."""

    def run(params, x):
        for p in params:
            x = jnp.tanh(x @ p["w"] + p["b"])
        return x

    shapes = [
        {"w": jax.ShapeDtypeStruct((a, b), "float32"), "b": jnp.ones(b)}
        for a, b in itertools.pairwise(widths)
    ]
    return run, shapes


def test_by_itself_it_is_cut_between_modules():
    run, params = dense_stack([3, 4, 4, 4, 2])
    split = fpipe.split(run, params, X)
    assert all(
        {path.split("/")[0] for path in own} == {str(k)}
        for k, own in enumerate(owned(split))
    )


def test_by_itself_it_is_cut_where_the_residual_stream_alone_goes_over():
    """Before and after the two halves of each block, and not inside of them."""

    def run(params, x):
        for p in params["h"]:
            q, k = x @ p["attend"]["q"]["w"], x @ p["attend"]["k"]["w"]
            x = x + jnp.sin(q * k) @ p["attend"]["out"]["w"] + p["attend"]["out"]["b"]
            x = x + jnp.tanh(x @ p["mlp"]["up"]["w"]) @ p["mlp"]["down"]["w"]
        return x

    def block():
        halves = {"attend": ("q", "k", "out"), "mlp": ("up", "down")}
        made = {
            half: {name: {"w": jnp.eye(3)} for name in names}
            for half, names in halves.items()
        }
        made["attend"]["out"]["b"] = jnp.ones(3)
        return made

    split = fpipe.split(run, {"h": [block() for _ in range(4)]}, X)
    halves = [f"h/{n}/{half}" for n in range(4) for half in ("attend", "mlp")]
    found = [{path.rsplit("/", 2)[0] for path in own} for own in owned(split)]
    assert found == [{half} for half in halves]
    assert [len(layer.stash) for layer in split.layers] == [0] * 8


def test_by_itself_a_u_net_is_cut_at_all_its_levels():
    """Although most goes over the places in its middle."""

    def run(params, x):
        h, skips = x, []
        for p in params["encode"]:
            h = jnp.tanh(h @ p["a"]) @ p["b"]
            skips.append(h)
            h = h.reshape(len(x), -1, 2, 4).mean(2)
        for p, skip in zip(params["decode"], reversed(skips), strict=True):
            h = jnp.concatenate([jnp.repeat(h, 2, 1), skip], 2)
            h = jnp.tanh(h @ p["a"]) @ p["b"]
        return h

    def levels(width):
        return [{"a": jnp.ones((width, 4)), "b": jnp.ones((4, 4))} for _ in range(3)]

    split = fpipe.split(
        run, {"encode": levels(4), "decode": levels(8)}, jnp.ones((2, 16, 4))
    )
    names = [f"{half}/{n}" for half in ("encode", "decode") for n in range(3)]
    assert owned(split) == [[f"{name}/a", f"{name}/b"] for name in names]


@pytest.mark.parametrize("seed", range(20))
def test_the_most_expensive_piece_is_as_cheap_as_can_be(seed):
    """Against all cuts between layers."""
    rng = np.random.default_rng(seed)
    run, params = dense_stack([3, *rng.integers(1, 9, 6)])
    stages = int(rng.integers(2, 4))
    names = [str(n) for n in range(len(params))]
    whole = fpipe.split(run, params, X, cuts=names)
    trace = whole.cut.trace(whole.cut.first)
    work = trace.costs
    best = min(
        max(sum(work[a:b]) for a, b in itertools.pairwise((0, *ends, len(work))))
        for ends in itertools.combinations(range(1, len(work)), stages - 1)
    )
    found = fpipe.split(run, params, X, stages=stages)
    mine = found.cut.trace(found.cut.first)
    assert len(mine.pieces) == stages
    # Narrow places may lie inside of these layers: then it is better still.
    assert max(mine.costs) <= best * 1.05


def test_a_balance_of_pieces():
    split = residual_mlp().split()
    assert split.balance(1) == (2,)
    with pytest.raises(ValueError, match="cut into 2 pieces"):
        split.balance(3)


# --- refused ---


def under(transform):
    """A function with a mark inside of something."""

    def run(params, x):
        return transform(lambda h: fpipe.cut(jnp.tanh(h @ params["w"])), x)

    return run


@jax.custom_vjp
def _own_derivative(h):
    return fpipe.cut(h * 2.0)


_own_derivative.defvjp(lambda h: (h * 2.0, None), lambda _, g: (g * 2.0,))

INSIDE = {
    "while": lambda f, x: jax.lax.while_loop(lambda h: jnp.sum(h) < 0, f, x),
    "cond": lambda f, x: jax.lax.cond(jnp.sum(x) > 0, f, lambda h: h, x),
    "custom_vjp_call": lambda f, x: _own_derivative(f(x)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_mark_inside_of_an_operation_is_refused(name):
    params, line = {"w": jnp.eye(3)}, r"at tests/split/test_cuts\.py:\d+ \(.*\)"
    with pytest.raises(ValueError, match=line + f" stands inside a `{name}`"):
        fpipe.split(under(INSIDE[name]), params, X)


def test_wrong_arguments():
    example = residual_mlp()
    fn, params, x = example.fn, example.params, example.x
    with pytest.raises(
        ValueError, match=r"cuts=\['block'\].*there is none.*'blocks/0/b'"
    ):
        fpipe.split(fn, params, x, cuts=["block"])
    with pytest.raises(
        ValueError, match=r"'unused'.*no parameter with that path is used"
    ):
        two_inputs().split(cuts=["unused"])
    wrong: Any
    for wrong in ("blocks/1", 3, [1], {"blocks/1": 2}):
        with pytest.raises(TypeError, match="a list of paths"):
            fpipe.split(fn, params, x, cuts=wrong)
    for wrong in ([fn, fn], None, example.split()):
        with pytest.raises(TypeError, match="fn is a function"):
            fpipe.split(wrong, params, x)
    with pytest.raises(TypeError, match="is a Flax module") as caught:
        fpipe.split(nn.Dense(3), {}, X)
    assert "`module.apply` of a linen module" in "".join(caught.value.__notes__)
    for wrong in (None, 3.0, {}):
        with pytest.raises(TypeError, match="x is an example of a microbatch"):
            fpipe.split(fn, params, wrong)
    with pytest.raises(ValueError, match="'_residual_mlp' does not ask for it"):
        fpipe.split(fn, params, x, side=x)
    with pytest.raises(TypeError, match="one of them says"):
        fpipe.split(fn, params, x, cuts=["blocks/1"], stages=2)
    with pytest.raises(ValueError, match="the function has 1 place to cut at"):
        fpipe.split(lambda p, x: (x @ p[0]) @ p[1], [X.T, X], X, stages=9)

    def outer(a):
        fpipe.split(lambda p, x: x * a, {}, X)

    split = example.split()
    for wrong in (params, split.params(params)[:1], [(), ()]):
        with pytest.raises(ValueError, match="a tuple with one entry per layer, as"):
            split.tree(wrong)
    with pytest.raises(ValueError, match="closes over a value of a trace"):
        jax.jit(outer)(X)


def test_marks_that_change_with_the_mode_are_refused():
    def fn(params, x, *, train=False):
        h = x @ params["w"]
        return fpipe.cut(h) if x.shape[0] == 2 else h

    params = {"w": jnp.eye(3)}
    split = fpipe.split(fn, params, X)
    with pytest.raises(ValueError, match="1 marks when it is split, but 0"):
        fpipe.sequential(split.layers)(split.params(params), jnp.ones((4, 3)))
