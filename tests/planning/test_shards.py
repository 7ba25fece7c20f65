"""The picture of which device holds which part of each array."""

import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
from tests.helpers import raises

DEVICES = np.array(jax.devices())
MESH = Mesh(DEVICES.reshape(2, 2), ("data", "model"))


def drawn(svg):
    """For each frame that is filled its device, its array, the part that the picture
    names, and the part of the frame that is filled.
    """
    found = []
    for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        titles = [child.text or "" for child in element]
        for title in titles:
            match = re.fullmatch(r"(\S+): (.*) \S+, \[(.*)\]", title)
            assert match
            device, name, block = match.groups()
            found.append((device, name, block, element.attrib))
    return found


def test_each_device_has_the_parts_that_jax_gives_it():
    arrays = {
        "both": jax.device_put(
            jnp.ones((8, 6)), NamedSharding(MESH, P("data", "model"))
        ),
        "last": jax.device_put(
            jnp.ones((3, 2, 4)), NamedSharding(MESH, P(None, None, "model"))
        ),
        "one": jax.device_put(jnp.ones(5), DEVICES[3]),
        "number": jax.device_put(jnp.float32(1), NamedSharding(MESH, P())),
    }
    want = {
        (str(shard.device), name): ", ".join(
            "{}:{}".format(*part.indices(length)[:2])
            for part, length in zip(shard.index, array.shape, strict=True)
        )
        for name, array in arrays.items()
        for shard in array.addressable_shards
    }
    svg = fpipe.shards_svg(arrays)
    shapes = {}
    for device, name, block, attributes in drawn(svg):
        assert want.pop((device, name)) == block
        size = float(attributes["width"]) / 52, float(attributes["height"]) / 26
        shapes.setdefault(name, set()).add(size)
    assert not want
    # What is filled of a frame: a quarter, a half on the right, and all of it.
    assert shapes == {
        "both": {(0.5, 0.5)},
        "last": {(0.5, 1.0)},
        "one": {(1.0, 1.0)},
        "number": {(1.0, 1.0)},
    }
    # 12 + 12 numbers and one more, and five more on the last device.
    words = re.findall(r">([^<]*)</text>", svg)
    assert words[-4:] == ["100 B", "100 B", "100 B", "120 B"]


def test_what_no_device_holds_is_refused():
    with raises(
        TypeError,
        "`fpipe.shards_svg(tree)`: a/0 is 3, which no device holds; give arrays of "
        "JAX, such as `pipe.place` returns",
    ):
        fpipe.shards_svg({"a": [3]})
    with raises(ValueError, "`fpipe.shards_svg(tree)`: there is no array in the tree"):
        fpipe.shards_svg({"a": None})
