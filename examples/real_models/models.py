"""Models that others wrote, small and with random weights, each with the loss function
of a plain training loop: nothing in here knows fpipe.

    gpt2()  ->  RealModel(name="GPT-2", library="transformers", loss_fn=…, params=…,
                          batch=(tokens, key), saved=…)

`saved(params, folder)` writes a checkpoint as the model's own library does, and reads
it back with that library: parameters that went through a pipeline must pass.
"""

# The libraries are not installed where the type checker runs.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

import dataclasses
import functools
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

ROWS = 8


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A model and its training.

    Attributes:
        loss_fn: `loss_fn(params, *batch)`, a mean over rows. With an argument `state`
            it returns `(loss, new state)`.
        batch: its other arguments.
        saved: writes parameters with the model's own library, and reads them.
    """

    name: str
    library: str
    loss_fn: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    saved: Callable[[Any, pathlib.Path], Any]


def _tokens(seed: int, length: int, vocabulary: int) -> jax.Array:
    shape = (ROWS, length)
    return jax.random.randint(jax.random.key(seed), shape, 2, vocabulary)


def _entropy(logits: Any, labels: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def _moved(params: Any) -> Any:
    """Parameters away from where they start: what feeds a zero has no gradient."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def _hugging_face(model: Any, params: Any, folder: pathlib.Path) -> Any:
    model.save_pretrained(folder, params=params)
    return type(model).from_pretrained(folder).params


def _pickled(params: Any, folder: pathlib.Path) -> Any:
    file = folder / "params.pickle"
    file.write_bytes(pickle.dumps(jax.device_get(params)))
    return pickle.loads(file.read_bytes())


def _flax_bytes(params: Any, folder: pathlib.Path) -> Any:
    from flax import serialization

    file = folder / "params.msgpack"
    file.write_bytes(serialization.to_bytes(params))
    return serialization.from_bytes(params, file.read_bytes())


# --- Hugging Face transformers ---


class _OlderNumpy:
    """`jax.numpy` with an argument of its earlier releases."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def clip(self, x: Any, a_max: Any) -> Any:
        """At most `a_max`."""
        return jnp.minimum(x, a_max)


def gpt2() -> RealModel:
    """A decoder with dropout, whose head is the table of its embedding."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(
        n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=16, n_inner=64
    )
    model = FlaxGPT2LMHeadModel(config, input_shape=(1, 8), seed=0)

    def loss_fn(params, tokens, key):
        out = model(tokens, params=params, dropout_rng=key, train=True)
        return _entropy(out.logits[:, :-1], tokens[:, 1:])

    batch = (_tokens(1, 8, 64), jax.random.key(2))
    saved = functools.partial(_hugging_face, model)
    return RealModel("GPT-2", "transformers", loss_fn, model.params, batch, saved)


def t5() -> RealModel:
    """An encoder and a decoder; each decoder block reads what the encoder made."""
    from transformers import FlaxT5ForConditionalGeneration, T5Config
    from transformers.models.t5 import modeling_flax_t5

    # It asks for `jnp.clip(x, a_max=…)`, which later releases of JAX call `max`.
    modeling_flax_t5.jnp = _OlderNumpy()
    config = T5Config(
        num_layers=2,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_heads=2,
        vocab_size=64,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = FlaxT5ForConditionalGeneration(config, input_shape=(1, 8), seed=0)

    def loss_fn(params, tokens, mask, answer):
        shifted = jnp.pad(answer[:, :-1], ((0, 0), (1, 0)))
        out = model(tokens, mask, decoder_input_ids=shifted, params=params)
        return _entropy(out.logits, answer)

    mask = jnp.ones((ROWS, 8), jnp.int32).at[:, 6:].set(0)
    batch = (_tokens(1, 8, 64), mask, _tokens(2, 6, 64))
    saved = functools.partial(_hugging_face, model)
    return RealModel("T5", "transformers", loss_fn, model.params, batch, saved)


def bert() -> RealModel:
    """An encoder that classifies, with a mask and dropout."""
    from transformers import BertConfig, FlaxBertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = FlaxBertForSequenceClassification(config, input_shape=(1, 8), seed=0)

    def loss_fn(params, tokens, mask, labels, key):
        out = model(tokens, mask, params=params, dropout_rng=key, train=True)
        return _entropy(out.logits, labels)

    mask = jnp.ones((ROWS, 8), jnp.int32).at[:, 5:].set(0)
    batch = (_tokens(1, 8, 64), mask, jnp.arange(ROWS) % 3, jax.random.key(2))
    saved = functools.partial(_hugging_face, model)
    return RealModel("BERT", "transformers", loss_fn, model.params, batch, saved)


# --- Flax ---


def scanned() -> RealModel:
    """Blocks that linen's `nn.scan` stacks, each rematerialised."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
            y = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
            return x + nn.Dense(32)(y), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(64, 32)(tokens)
            blocks = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=4,
            )
            x, _ = blocks(name="blocks")(x, None)
            return nn.Dense(64)(x)

    model, tokens = Model(), _tokens(1, 8, 64)
    params = jax.jit(model.init)(jax.random.key(0), tokens)

    def loss_fn(params, tokens):
        logits: Any = model.apply(params, tokens)
        return _entropy(logits[:, :-1], tokens[:, 1:])

    return RealModel("nn.scan, remat", "linen", loss_fn, params, (tokens,), _flax_bytes)


def nnx_convolutions() -> RealModel:
    """Convolutions with batch norm and dropout."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, channels, rngs):
            self.conv = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(channels, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x):
            return x + self.dropout(nnx.relu(self.norm(self.conv(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.blocks = nnx.List([Block(8, rngs) for _ in range(4)])
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((1, 2)))

    graph, params, statistics, rest = nnx.split(
        Model(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
    )

    def loss_fn(params, state, images, labels, key):
        model = nnx.merge(graph, params, state, rest, copy=True)
        nnx.reseed(model, default=key, dropout=key)
        loss = _entropy(model(images), labels)
        return loss, nnx.state(model, nnx.BatchStat)

    def saved(params, folder):
        pure = _flax_bytes(nnx.to_pure_dict(params), folder)
        model = nnx.merge(graph, params, statistics, rest)
        nnx.update(model, pure)
        return nnx.state(model, nnx.Param)

    images = jax.random.normal(jax.random.key(1), (ROWS, 8, 8, 3))
    batch = (statistics, images, jnp.arange(ROWS) % 5, jax.random.key(2))
    return RealModel("batch norm, dropout", "NNX", loss_fn, params, batch, saved)


# --- Equinox ---


def equinox_transformer() -> RealModel:
    """Equinox's own attention and layer norm, one sequence at a time."""
    import equinox as eqx

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __init__(self, width, key):
            one, two = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(2, width, key=one)
            self.norm = eqx.nn.LayerNorm(width)
            self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, key=two)

        def __call__(self, x):
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(self.mlp)(x)

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: list
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 6)
            self.embed = eqx.nn.Embedding(64, 32, key=keys[0])
            self.blocks = [Block(32, k) for k in keys[1:5]]
            self.head = eqx.nn.Linear(32, 64, key=keys[5])

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)

    def loss_fn(params, tokens):
        model = eqx.combine(params, static)
        return _entropy(jax.vmap(model)(tokens)[:, :-1], tokens[:, 1:])

    def saved(params, folder):
        file = folder / "model.eqx"
        eqx.tree_serialise_leaves(file, params)
        return eqx.tree_deserialise_leaves(file, params)

    batch = (_tokens(1, 8, 64),)
    return RealModel("transformer", "Equinox", loss_fn, params, batch, saved)


# --- Haiku ---


def haiku_resnet() -> RealModel:
    """Haiku's ResNet of bottleneck blocks, with the state of its batch norms."""
    import haiku as hk

    def forward(images):
        net = hk.nets.ResNet(
            (1, 1, 1, 1),
            5,
            channels_per_group=(16, 16, 32, 32),
            initial_conv_config={"kernel_shape": 3, "stride": 1},
        )
        return net(images, is_training=True)

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    images = jax.random.normal(jax.random.key(1), (ROWS, 16, 16, 3))
    params, state = jax.jit(model.init)(jax.random.key(0), images)
    params = _moved(params)  # the head and the last norm of each block start at zero

    def loss_fn(params, state, images, labels):
        logits, state = model.apply(params, state, images)
        return _entropy(logits, labels), state

    batch = (state, images, jnp.arange(ROWS) % 5)
    return RealModel("ResNet", "Haiku", loss_fn, params, batch, _pickled)


# --- Penzai ---


def penzai_llama() -> RealModel:
    """Penzai's Llama, whose parameters have named axes."""
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=32,
        projection_dim=16,
        mlp_hidden_dim=64,
        num_decoder_blocks=4,
        vocab_size=64,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        attention_type=llamalike_common.AttentionTypeGlobalCausal(),
        rms_norm_eps=1e-6,
        use_layer_stack=False,
    )
    model = llamalike_common.build_llamalike_transformer(
        config, init_base_rng=jax.random.key(0)
    )
    unbound, params = pz.unbind_params(model, freeze=True)

    def loss_fn(params, tokens):
        named = pz.nx.wrap(tokens, "batch", "seq")
        positions = pz.nx.arange("seq", tokens.shape[1])
        logits = pz.bind_variables(unbound, params)(
            named, token_positions=positions
        ).unwrap("batch", "seq", "vocabulary")
        return _entropy(logits[:, :-1], tokens[:, 1:])

    def saved(params, folder):
        return _pickled(params, folder)

    return RealModel("Llama", "Penzai", loss_fn, params, (_tokens(1, 8, 64),), saved)


# --- Gemma ---


def gemma() -> RealModel:
    """Google DeepMind's own linen transformer, with local and global attention."""
    from gemma import modules
    from gemma.transformer import Transformer, TransformerConfig

    kinds = modules.AttentionType
    config = TransformerConfig(
        num_layers=4,
        num_embed=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL) * 2,
        sliding_window_size=4,
    )
    model = Transformer(config)

    def logits_of(params, tokens):
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        seen = jnp.tril(jnp.ones((length, length), bool))
        mask = jnp.broadcast_to(seen, (tokens.shape[0], length, length))
        return model.apply(params, tokens, positions, None, mask)[0]

    def loss_fn(params, tokens):
        return _entropy(logits_of(params, tokens)[:, :-1], tokens[:, 1:])

    tokens = _tokens(1, 8, 64)
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)
    mask = jnp.ones((ROWS, 8, 8), bool)
    params = jax.jit(lambda key: model.init(key, tokens, positions, None, mask))(
        jax.random.key(0)
    )
    params = _moved(params)  # some tables and norms start at zero
    return RealModel("Gemma 2", "gemma", loss_fn, params, (tokens,), _flax_bytes)


MODELS = {
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "scanned": scanned,
    "nnx": nnx_convolutions,
    "equinox": equinox_transformer,
    "haiku": haiku_resnet,
    "penzai": penzai_llama,
    "gemma": gemma,
}
