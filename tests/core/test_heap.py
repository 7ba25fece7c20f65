"""The memory of freed arrays: what the system has to fill with zeros once more."""

import pytest

from tests.scripts import run

SCRIPT = """
import os, resource
from fpipe._core import heap

for name in [name for name in os.environ if name.startswith(heap._OWN)]:
    del os.environ[name]
{setting}
kept = heap.keep_freed()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = bytearray(b"x") * 2**26
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del array
pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
print(kept, [count >= pages // 2 for count in faults])
"""


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("", "True [True, False, False, False]"),
        ("os.environ['MALLOC_ARENA_MAX'] = '4'", "False [True, True, True, True]"),
        ("os.environ['GLIBC_TUNABLES'] = 'a=b'", "False [True, True, True, True]"),
        ("heap.ctypes.CDLL = lambda name: None", "False [True, True, True, True]"),
    ],
    ids=["kept", "the user's setting", "the user's tunables", "another libc"],
)
def test_freed_memory_is_kept_unless_the_user_says_otherwise(tmp_path, setting, shown):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(setting=setting))
    done = run([str(script)])
    assert done.stdout.strip() == shown, done.stderr
