"""Caches: what was used last is kept, up to a number.

    plans = Recent(size=8)
    plan = plans.get(Key((shapes, options)), lambda: make_plan(shapes, options))

With `size=2` and the keys a, b, a, c, the cache holds a and c: b was used longest ago.
Caches have a limit because an entry may hold compiled programs: a user who calls with
many different shapes would otherwise fill the memory of the host.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Key:
    """A key that is hashed once, when it is made: long tuples are expensive to hash.

    Raises:
        TypeError: something in it is not hashable.
    """

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Hashable) -> None:
        self._value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    # Values are compared only where the hashes agree: most keys differ, and comparing
    # two long tuples costs as much as hashing one.
    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Key)
            and self._hash == other._hash
            and self._value == other._value
        )


class Recent:
    """A map that makes what it lacks and forgets what has not been used for longest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        # In the order of their last use: a dict keeps the order of insertion.
        self._entries: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The entry of `key`, made if it is not there. Two threads may both make one;
        the first stays.
        """
        with self._lock:
            if key in self._entries:
                entry = self._entries.pop(key)
                self._entries[key] = entry
                return entry
        # Outside the lock: making may take long, and may ask this cache.
        made = make()
        with self._lock:
            # Another thread may have made it meanwhile. All threads then use that one,
            # so that there is one compiled program and not two.
            entry = self._entries.setdefault(key, made)
            # Every use moves a key to the end, so the first key is the one to forget.
            while len(self._entries) > self._size:
                del self._entries[next(iter(self._entries))]
            return entry

    def values(self) -> list[Any]:
        """All entries, from the one used longest ago to the one used last."""
        with self._lock:
            return list(self._entries.values())
