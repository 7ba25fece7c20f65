"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929), in Flax.

It stands for a model that somebody else wrote: it knows nothing of pipelines, layers or
stages. `train_any.py` trains it as it is.

    model = VisionTransformer(classes=10, patch=2, width=48, blocks=4, heads=4)
    variables = model.init(key, images)  # (B, height, width, channels)
    logits = model.apply(variables, images)  # (B, classes)
"""

import jax.numpy as jnp
from flax import linen as nn


class Perceptron(nn.Module):
    """Two dense layers."""

    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x, *, train):
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = drop(nn.gelu(nn.Dense(self.hidden)(x)))
        return drop(nn.Dense(x.shape[-1])(y))


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each beside a residual."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, *, train):
        attend = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=self.dropout, deterministic=not train
        )
        x = x + attend(nn.LayerNorm()(x))
        perceptron = Perceptron(4 * x.shape[-1], self.dropout)
        return x + perceptron(nn.LayerNorm()(x), train=train)


class Encoder(nn.Module):
    """Places are added, then blocks follow each other."""

    blocks: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, *, train):
        shape = (1, *x.shape[1:])
        places = self.param("places", nn.initializers.normal(0.02), shape)
        x = nn.Dropout(self.dropout, deterministic=not train)(x + places)
        for n in range(self.blocks):
            block = EncoderBlock(self.heads, self.dropout, name=f"block_{n}")
            x = block(x, train=train)
        return nn.LayerNorm(name="norm")(x)


class VisionTransformer(nn.Module):
    """Patches of an image and a token of its class, through an encoder.

    Attributes:
        classes: of the images.
        patch: side of a patch in pixels.
        width: of the vectors that patches become.
        blocks, heads: of the encoder.
        dropout: rate, used where `train=True`.
    """

    classes: int
    patch: int
    width: int
    blocks: int
    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, *, train=False):
        sides = (self.patch, self.patch)
        x = nn.Conv(self.width, sides, sides, "VALID", name="embed")(images)
        x = x.reshape(len(x), -1, self.width)
        first = self.param("class", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
        x = Encoder(self.blocks, self.heads, self.dropout, name="encoder")(
            x, train=train
        )
        return nn.Dense(self.classes, name="head")(x[:, 0])
