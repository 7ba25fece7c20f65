"""Modules that are no plain sequence: their arguments, their output, and their place in
the variables of the whole model. All against the whole model, applied by Flax.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import fpipe
import fpipe.flax
from tests.helpers import assert_same, noise, raises

WIDTH = 4
CHUNKS = 2
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (8, 3), 0, 7)
MASK = jnp.tile(jnp.array([1.0, 1.0, 0.0]), (8, 1)) + jnp.eye(8, 3)
TARGET = noise(jax.random.key(2), (8, 3, 2))
HIDDEN = jax.ShapeDtypeStruct((8, 3, WIDTH), jnp.float32)

untyped: Any = lambda value: value  # noqa: E731


def squares(y, target):
    return jnp.mean((y - target) ** 2)


class Block(nn.Module):
    """As Hugging Face writes them: keywords with defaults, and a tuple comes out."""

    @nn.compact
    def __call__(
        self, hidden_states, attention_mask=None, position=None, deterministic=True
    ):
        del position
        y = nn.BatchNorm(use_running_average=deterministic)(hidden_states)
        y = jnp.tanh(nn.Dense(WIDTH)(y))
        if attention_mask is not None:
            y = y * attention_mask[..., None]
        return hidden_states + y, None


class Embed(nn.Module):
    """Two tables, which the whole model has in two places."""

    def setup(self):
        self.tokens = nn.Embed(7, WIDTH)
        self.places = nn.Embed(3, WIDTH)

    def __call__(self, tokens):
        return self.tokens(tokens) + self.places(jnp.arange(3))


class Blocks(nn.Module):
    def setup(self):
        self.blocks = [Block(name=str(n)) for n in range(2)]

    def __call__(self, x, mask, deterministic):
        for block in self.blocks:
            x, _ = block(x, mask, deterministic=deterministic)
        return x


class Body(nn.Module):
    def setup(self):
        self.wte, self.wpe = nn.Embed(7, WIDTH), nn.Embed(3, WIDTH)
        self.h = Blocks()
        self.ln_f = nn.LayerNorm()

    def __call__(self, tokens, mask, deterministic):
        x = self.wte(tokens) + self.wpe(jnp.arange(3))
        return self.ln_f(self.h(x, mask, deterministic))


class Model(nn.Module):
    def setup(self):
        self.transformer = Body()
        self.head = nn.Dense(2)

    def __call__(self, tokens, mask, deterministic=True):
        return self.head(self.transformer(tokens, mask, deterministic))


def layers_of_model(sample=None):
    block = functools.partial(
        fpipe.flax.layer,
        Block(),
        sample,
        inputs="hidden_states",
        side={"attention_mask": "text/mask"},
        side_sample={"text": {"mask": MASK}},
        output=0,
    )
    state = ["batch_stats"] if sample is None else None
    return [
        fpipe.flax.layer(
            Embed(), path={"tokens": "transformer/wte", "places": "transformer/wpe"}
        ),
        block(path="transformer/h/0", state=state),
        block(path="transformer/h/1", state=state),
        fpipe.flax.layer(nn.LayerNorm(), path="transformer/ln_f"),
        fpipe.flax.layer(nn.Dense(2), path="head", name="head"),
    ]


@functools.cache
def whole_model():
    """The model, its variables, and a step of it microbatch by microbatch."""
    model = Model()
    variables = jax.jit(model.init)(KEY, TOKENS, MASK)
    variables["params"] = jax.tree.map(
        lambda a: a + noise(KEY, a.shape), variables["params"]
    )

    def loss(params):
        total, stats = 0.0, variables["batch_stats"]
        rows = zip(*(jnp.split(a, CHUNKS) for a in (TOKENS, MASK, TARGET)), strict=True)
        for tokens, mask, target in rows:
            y, new = model.apply(
                {"params": params, "batch_stats": jax.lax.stop_gradient(stats)},
                tokens,
                mask,
                deterministic=False,
                mutable=["batch_stats"],
            )
            stats = new["batch_stats"]
            total += squares(y, target) / CHUNKS
        return total, stats

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return model, variables, step(variables["params"])


@pytest.mark.quick(cases=1)
@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_nested_linen_model_is_what_flax_computes(executor):
    model, variables, ((loss, stats), grads) = whole_model()
    layers = layers_of_model(HIDDEN)
    assert [layer.needs for layer in layers][1:3] == [("state", "train", "side")] * 2
    params, state = fpipe.flax.split_variables(layers, variables)
    pipe = fpipe.Pipe(layers, [2, 3], chunks=CHUNKS, executor=executor)
    placed = pipe.place(params)
    side = {"text": {"mask": MASK}}
    (got, new), got_grads = pipe.value_and_grad(squares)(
        placed, TOKENS, TARGET, side=side, state=state, train=True
    )
    assert_same(got, loss)
    merged = fpipe.flax.merge_variables(layers, pipe.gather(got_grads), new)
    wanted = {"params": grads, "batch_stats": stats}
    assert_same(jax.device_get(merged), jax.device_get(wanted))
    y, _ = pipe(placed, TOKENS, side=side, state=state)
    assert_same(y, model.apply(variables, TOKENS, MASK))


def test_paths_go_both_ways_exactly():
    _, variables, _ = whole_model()
    for layers in (layers_of_model(), layers_of_model(HIDDEN)):
        params, state = fpipe.flax.split_variables(layers, variables)
        kernel = params[2]["Dense_0"]["kernel"]
        own = variables["params"]["transformer"]["h"]["1"]["Dense_0"]["kernel"]
        assert kernel is own
        assert_same(
            fpipe.flax.merge_variables(layers, params, state), dict(variables), 0.0
        )
        moments = {"params": variables["params"]}
        assert_same(
            fpipe.flax.split_variables(layers, moments, state=False)[0], params, 0.0
        )


def test_modules_with_a_sample_share_a_path_and_take_what_they_have():
    variables = {
        "params": {
            "body": {
                "Dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
                "head": {"scale": jnp.zeros(2), "bias": jnp.ones(2)},
            }
        }
    }

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    x = jnp.ones((2, 4))
    layers = [
        fpipe.flax.layer(Inner(), x, path="body"),
        fpipe.flax.layer(nn.LayerNorm(), path="body/head"),
    ]
    params, _ = fpipe.flax.split_variables(layers, variables)
    assert jax.tree.map(jnp.shape, params) == (
        {"Dense_0": {"kernel": (4, 2), "bias": (2,)}},
        {"scale": (2,), "bias": (2,)},
    )
    assert_same(fpipe.flax.merge_variables(layers, params), variables, 0.0)
    blind = [fpipe.flax.layer(Inner(), path="body", name="inner"), layers[1]]
    with pytest.raises(ValueError, match="layer 0 'inner' and layer 1 'LayerNorm' sha"):
        fpipe.flax.split_variables(blind, variables)


class Stack(nn.Module):
    """Blocks that `nn.scan` stacks, with their statistics."""

    @nn.compact
    def __call__(self, x, mask, deterministic=True):
        x = nn.Dense(WIDTH, name="embed")(x)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=untyped(nn.broadcast),
            length=3,
        )
        x, _ = blocks(name="blocks")(x, mask, None, deterministic)
        return nn.Dense(2, name="head")(x)


def test_each_layer_has_its_row_of_what_is_stacked():
    model, x = Stack(), noise(KEY, (8, 3, 2))
    variables = jax.jit(model.init)(KEY, x, MASK)
    block = functools.partial(
        fpipe.flax.layer,
        Block(),
        HIDDEN,
        inputs="hidden_states",
        side={"attention_mask": "mask"},
        side_sample={"mask": MASK},
        output=0,
        stacked="blocks",
    )
    layers = [
        fpipe.flax.layer(nn.Dense(WIDTH), path="embed"),
        *(block() for _ in range(3)),
        fpipe.flax.layer(nn.Dense(2), path="head"),
    ]
    assert layers[1] == layers[2]
    params, state = fpipe.flax.split_variables(layers, variables)
    stacked = variables["params"]["blocks"]["Dense_0"]["kernel"]
    assert_same(params[3]["Dense_0"]["kernel"], stacked[2], 0.0)
    assert_same(fpipe.flax.merge_variables(layers, params, state), variables, 0.0)

    pipe = fpipe.Pipe(layers, [2, 3], chunks=CHUNKS, deferred_batch_norm=True)
    deferred = fpipe.flax.split_variables(layers, variables, deferred_batch_norm=True)
    (loss, new), grads = pipe.value_and_grad(squares)(
        pipe.place(params), x, TARGET, side={"mask": MASK}, state=deferred[1]
    )

    def plain(params):
        return squares(model.apply({**variables, "params": params}, x, MASK), TARGET)

    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(variables["params"])
    assert_same(loss, wanted)
    # The rows of placed gradients and states lie on the devices of their stages.
    merged = fpipe.flax.merge_variables(layers, grads, new)
    assert_same(
        jax.device_get(merged),
        jax.device_get(
            {"params": wanted_grads, "batch_stats": variables["batch_stats"]}
        ),
    )
    shapes = jax.eval_shape(model.init, KEY, x, MASK)
    split = fpipe.flax.split_variables(layers, shapes)
    assert fpipe.flax.merge_variables(layers, *split) == shapes


def test_parts_of_a_nested_stack_are_layers_of_their_own():
    """Two layers for each row, and a stack deep in the model in each collection."""
    rows = {"kernel": noise(KEY, (2, 3, 3)), "bias": noise(KEY, (2, 3))}
    stats = {"mean": noise(KEY, (2, 3)), "var": jnp.ones((2, 3))}
    norm = {"scale": noise(KEY, (2, 3)), "bias": noise(KEY, (2, 3))}
    variables = {
        "params": {"body": {"blocks": {"up": rows, "norm": norm}}},
        "batch_stats": {"body": {"blocks": {"norm": stats}}},
    }
    layers = [
        fpipe.flax.layer(nn.Dense(3), stacked="body/blocks/up"),
        fpipe.flax.layer(nn.BatchNorm(), stacked="body/blocks/norm"),
    ] * 2
    params, state = fpipe.flax.split_variables(layers, variables)
    row = functools.partial(jax.tree.map, lambda a: a[1])
    assert_same(params[2:], (row(rows), row(norm)), 0.0)
    assert_same(state[2:], (None, {"batch_stats": row(stats)}), 0.0)
    assert_same(fpipe.flax.merge_variables(layers, params, state), variables, 0.0)


class NBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x, mask):
        return x + self.dropout(self.dense(self.norm(x))) * mask[..., None], mask


class NBody(nnx.Module):
    def __init__(self, rngs):
        self.h = nnx.List([NBlock(rngs), NBlock(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)


class NModel(nnx.Module):
    def __init__(self, rngs):
        self.body = NBody(rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x, mask):
        for block in self.body.h:
            x, _ = block(x, mask)
        return self.head(self.body.norm(x))


def test_a_nested_nnx_model_is_what_flax_computes():
    model = NModel(nnx.Rngs(0))
    x = noise(KEY, (8, 3, WIDTH))
    layers = [
        fpipe.flax.layer(
            block,
            inputs="x",
            side={"mask": "mask"},
            output=lambda y: y[0],
            path=f"body/h/{n}",
        )
        for n, block in enumerate(model.body.h)
    ]
    layers += [
        fpipe.flax.layer(model.body.norm, path="body/norm"),
        fpipe.flax.layer(model.head, path="head"),
    ]
    variables = nnx.state(model)
    params, state = fpipe.flax.split_variables(layers, variables)
    assert_same(
        fpipe.flax.merge_variables(layers, params, state),
        nnx.to_pure_dict(
            nnx.filter_state(variables, nnx.Any(nnx.Param, nnx.BatchStat))
        ),
        0.0,
    )
    pipe = fpipe.Pipe(layers, [1, 3], chunks=CHUNKS)
    (loss, new), grads = pipe.value_and_grad(squares)(
        pipe.place(params), x, TARGET, side={"mask": MASK}, state=state, train=True
    )

    graph, plain_params, rest = nnx.split(model, nnx.Param, ...)

    def plain(params):
        total, now = 0.0, rest
        rows = zip(*(jnp.split(a, CHUNKS) for a in (x, MASK, TARGET)), strict=True)
        for piece, mask, target in rows:
            module = nnx.merge(graph, params, jax.lax.stop_gradient(now))
            total += squares(module(piece, mask), target) / CHUNKS
            now = nnx.state(module, nnx.Not(nnx.Param))
        return total, now

    (wanted, kept), wanted_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(
        plain_params
    )
    assert_same(loss, wanted)
    got = fpipe.flax.merge_variables(layers, grads, (None,) * len(layers))
    assert_same(jax.device_get(got), nnx.to_pure_dict(wanted_grads))
    nnx.update(model, fpipe.flax.merge_variables(layers, params, new))
    assert_same(
        jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))),
        nnx.to_pure_dict(nnx.filter_state(kept, nnx.BatchStat)),
    )


def test_a_list_of_nnx_has_its_modules_by_number():
    model = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(n)) for n in range(2)])
    layers = [fpipe.flax.layer(module, path=str(n)) for n, module in enumerate(model)]
    variables: Any = nnx.to_pure_dict(nnx.state(model))
    params, _ = fpipe.flax.split_variables(layers, variables)
    assert_same(params, (variables[0], variables[1]), 0.0)
    assert_same(fpipe.flax.merge_variables(layers, params), variables, 0.0)


class Pair(nn.Module):
    """Two inputs, one of them with a default, and a result by name."""

    @nn.compact
    def __call__(self, a, b=None, *, scale=2.0):
        b = jnp.zeros_like(a) if b is None else b
        return {"sum": a + scale * b, "both": (a, b)}


@pytest.mark.parametrize(
    ("options", "x", "wanted"),
    [
        ({"inputs": ("a", "b"), "output": "sum"}, (2.0, 3.0), 8.0),
        ({"inputs": ("b", "a"), "output": "sum"}, (2.0, 3.0), 7.0),
        ({"inputs": ("a", "b"), "output": "sum"}, {"b": 3.0, "a": 2.0}, 8.0),
        ({"inputs": "a", "output": "both"}, 2.0, (2.0, 0.0)),
        ({"inputs": ("a",), "output": "sum"}, (2.0,), 2.0),
        (
            {"inputs": "a", "side": {"b": "m", "scale": "s"}, "output": "sum"},
            2.0,
            14.0,
        ),
        ({"inputs": "b", "side": {"a": "m"}, "output": lambda y: y["sum"]}, 2.0, 8.0),
    ],
)
def test_arguments_and_output(options, x, wanted):
    as_arrays = functools.partial(jax.tree.map, jnp.float32)
    layer = fpipe.flax.layer(Pair(), **options)
    side = as_arrays({"m": 4.0, "s": 3.0}) if layer.asks("side") else None
    got = layer.apply({}, as_arrays(x), side=side)
    assert_same(got, as_arrays(wanted), 0.0)


def test_init_gives_modules_their_side_inputs():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            seen = self.variable("batch_stats", "seen", lambda: jnp.zeros(mask.shape))
            del seen
            return nn.Dense(2)(x) * self.param("w", nn.initializers.ones, mask.shape)

    x, side = jnp.ones((4, 3)), {"m": jnp.ones((4, 2))}
    module = Wide()
    layers = [
        fpipe.flax.layer(
            module, x, inputs="x", side={"mask": "m"}, side_sample=side, state_rows=True
        )
    ]
    model = fpipe.sequential(layers)
    params = model.init(KEY, x, side=side)
    key = jax.random.fold_in(KEY, 0)
    wanted = module.init(key, x, side["m"])
    assert_same(params, (wanted["params"],), 0.0)
    state = model.init_state(x, side=side)
    assert_same(state, ({"batch_stats": wanted["batch_stats"]},), 0.0)
    with pytest.raises(ValueError, match="`side=` was given, but no layer asks for it"):
        fpipe.sequential([fpipe.flax.layer(nn.Dense(2))]).init(KEY, x, side=side)


# --- errors ---


def test_what_the_arguments_of_a_call_are_not():
    call = "`fpipe.flax.layer(module)` of layer 'Pair'"
    names = "['a', 'b', 'scale']"
    with raises(
        ValueError, f"{call}: inputs= names 'x', but the arguments are {names}"
    ):
        fpipe.flax.layer(Pair(), inputs="x")
    with raises(
        ValueError, f"{call}: side= names 'mask', but the arguments are {names}"
    ):
        fpipe.flax.layer(Pair(), side={"mask": "m"})
    with raises(ValueError, f"{call}: ['b'] are in inputs= and in side="):
        fpipe.flax.layer(Pair(), inputs=("a", "b"), side={"b": "m"})
    with raises(ValueError, f"{call}: inputs=() names no argument"):
        fpipe.flax.layer(Pair(), inputs=())
    with raises(
        TypeError,
        f"{call}: side= is a dict from names of the module's arguments to names of "
        "side inputs, got ['b']",
    ):
        fpipe.flax.layer(Pair(), side=untyped(["b"]))
    with raises(
        TypeError,
        f"{call}: output= is an index, a name, or a function of what the module "
        "returns, got [0]",
    ):
        fpipe.flax.layer(Pair(), output=untyped([0]))
    two = fpipe.flax.layer(Pair(), inputs=("a", "b"), output="sum")
    with raises(
        ValueError,
        "layer 'Pair': its inputs are ['a', 'b'], so it takes a tuple of 2 or a dict "
        "with these names, got float32[3]; for one input, whatever it is, write "
        "`inputs='a'`",
    ):
        two.apply({}, jnp.ones(3))
    sided = fpipe.flax.layer(Pair(), inputs="a", side={"b": "text/m"}, output="sum")
    with raises(
        ValueError,
        "layer 'Pair': the argument 'b' of its module is the side input 'text/m', but "
        "side is {'m': float32[3]}: pass `side={'text': ...}`",
    ):
        sided.apply({}, jnp.ones(3), side={"m": jnp.ones(3)})


def test_a_module_that_returns_a_tuple_is_told_so():
    text = (
        "layer 'Block': its module returned the tuple (float32[8,3,4], None); say "
        "which of it is the layer's output, `fpipe.flax.layer(module, output=0)`, or "
        "`output=lambda y: y` for all"
    )
    # With a sample where the layer is made, without one in the call.
    with raises(ValueError, text):
        fpipe.flax.layer(Block(), HIDDEN, path="h/0")
    layer = fpipe.flax.layer(Block(), path="h/0", state=["batch_stats"])
    variables = jax.jit(Block().init)(KEY, jnp.ones((8, 3, WIDTH)))
    with raises(ValueError, text):
        layer.apply(
            variables["params"],
            jnp.ones((8, 3, WIDTH)),
            state={"batch_stats": variables["batch_stats"]},
        )
    with raises(
        ValueError,
        "layer 'Block': output=2 is no entry of what its module returned, "
        "(float32[8,3,4], None)",
    ):
        fpipe.flax.layer(Block(), HIDDEN, output=2)
    # In a plain sequence a tuple may be meant for the next module: it is told there.
    layers = fpipe.flax.layers([Block(), nn.Dense(2)])
    with pytest.raises(Exception, match="tuple") as error:
        layers[1].apply({}, (jnp.ones(3), None))
    assert error.value.__notes__[-1:] == [
        "layer 'layers_1' takes one input and got the tuple (float32[3], None): where "
        "the module before returns more than its output, write "
        "`fpipe.flax.layer(module, output=0)` there"
    ]


def test_paths_that_are_none():
    call = "`fpipe.flax.layer(module)` of layer 'Dense'"
    dense = functools.partial(fpipe.flax.layer, nn.Dense(2))
    form = "is the path of the module's variables in the whole model, such as "
    with raises(
        TypeError,
        f"{call}: path= {form}'transformer/h/0', or a dict from names in it to paths, "
        "got ['h', 0]",
    ):
        dense(path=untyped(["h", 0]))
    with raises(TypeError, f"{call}: stacked= {form}'transformer/h/0', got 3"):
        dense(stacked=untyped(3))
    with raises(
        ValueError,
        f"{call}: path='h' and stacked='h'; a part of what is stacked is "
        "`stacked='blocks/attention'`",
    ):
        dense(path="h", stacked="h")
    twice = {"kernel": "a", "bias": "a/b"}
    with raises(ValueError, f"{call}: path={twice} names 'a/b' twice"):
        dense(path=twice)


def test_variables_that_are_at_no_path():
    split = fpipe.flax.split_variables
    dense = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    variables = {"params": {"h": {"0": dense, "1": dense}, "head": dense}}
    x = jax.ShapeDtypeStruct((1, 3), jnp.float32)

    def layers(*paths, **options):
        return [fpipe.flax.layer(nn.Dense(2), path=p, **options) for p in paths]

    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: layer 1 'Dense': nothing is at its path 'h/2'; "
        "at 'h' are ['0', '1']",
    ):
        split(layers("h/0", "h/2", "head"), variables)
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: no layer owns ['params/h/1', 'params/head']; "
        "the layers are ['Dense']",
    ):
        split(layers("h/0"), variables)
    lacking = {"params": {**variables["params"], "head": {"kernel": jnp.ones((3, 2))}}}
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: layer 2 'Dense' has ['bias'], which the "
        "variables lack at 'head'",
    ):
        split(layers("h/0", "h/1", "head", x=x), lacking)
    shared = (
        "layer 0 'Dense' and layer 1 'Dense' share 'h/0/kernel'. If a module is used "
        "twice, write `fpipe.flax.tied(module, owner)` in the second place. If a "
        "module has only a part of what is at its path, give a sample, "
        "`fpipe.flax.layer(module, x, path=...)`, or name its parts, `path={'wte': "
        "'transformer/wte'}`"
    )
    with raises(ValueError, f"`fpipe.flax.split_variables`: {shared}"):
        split(layers("h/0", "h/0"), variables)
    with raises(
        ValueError,
        "`fpipe.flax.merge_variables`: " + shared.replace("'h/0", "'params/h/0"),
    ):
        fpipe.flax.merge_variables(layers("h/0", "h/0"), (dense, dense))
    part = fpipe.flax.layer(nn.Dense(2), path={"kernel": "head/kernel"})
    with raises(
        ValueError,
        "`fpipe.flax.merge_variables`: layer 0 'Dense' has 'bias', for which its path= "
        "names no place",
    ):
        fpipe.flax.merge_variables([part], (dense,))


def test_rows_that_are_not_those_of_the_layers():
    layers = [fpipe.flax.layer(nn.Dense(2), stacked="h") for _ in range(3)]
    variables = {"params": {"h": {"bias": jnp.ones((4, 2))}}}
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: stacked='h' is in 3 layers, but "
        "'params/h/bias' is float32[4,2]: it needs a row for each",
    ):
        fpipe.flax.split_variables(layers, variables)
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: stacked='h' is in 1 layer, but 'params/h/bias' "
        "is float32[4,2]: it needs a row for each",
    ):
        fpipe.flax.split_variables(layers[:1], variables)
    row = {"bias": jnp.ones(2)}
    with raises(
        ValueError,
        "`fpipe.flax.merge_variables`: the layers [0, 1, 2] have stacked='h', but "
        "'params/h/bias' cannot be stacked: [1] lack it",
    ):
        fpipe.flax.merge_variables(layers, (row, {}, row))
    with raises(
        ValueError,
        "`fpipe.flax.merge_variables`: rows of one stack differ: ['float32[2]', "
        "'float32[3]', 'float32[2]']",
    ):
        fpipe.flax.merge_variables(layers, (row, {"bias": jnp.ones(3)}, row))


def test_deferred_statistics_need_to_know_their_norms():
    _, variables, _ = whole_model()
    layers = [dataclasses.replace(layer, defer=None) for layer in layers_of_model()]
    with raises(
        ValueError,
        "`fpipe.flax.split_variables(deferred_batch_norm=True)`: layer 1 'Block' has "
        "batch statistics, but does not show the norms that they belong to: give the "
        "layers of the pipe, made with a sample, `fpipe.flax.layer(module, x)`",
    ):
        fpipe.flax.split_variables(layers, variables, deferred_batch_norm=True)


def test_deferred_statistics_of_modules_are_those_of_their_layers():
    """Or modules that show no norms without a sample are refused."""
    x, norm = noise(KEY, (8, WIDTH)), nn.BatchNorm(use_running_average=False)
    variables = jax.jit(nn.Sequential([nn.Dense(WIDTH), norm]).init)(KEY, x)
    split = functools.partial(fpipe.flax.split_variables, deferred_batch_norm=True)
    layers = fpipe.flax.layers([nn.Dense(WIDTH), norm], x)
    params, state = split(layers, variables)
    assert_same(split([nn.Dense(WIDTH), norm], variables), (params, state), 0.0)
    pipe = fpipe.sequential(layers, chunks=2, deferred_batch_norm=True)
    assert_same(state, pipe.init_state(x), 0.0)
    _, whole, _ = whole_model()
    block = {
        kind: {"layers_0": values["transformer"]["h"]["0"]}
        for kind, values in whole.items()
    }
    with pytest.raises(ValueError, match="does not show the norms that they belong to"):
        split([Block()], block)
