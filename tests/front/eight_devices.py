"""The rows of the covering array whose meshes have eight devices.

The tests run in processes of four, and this one beside them: `test_equal.py`.
"""

import sys
import traceback
import warnings

import jax

from tests.front.test_equal import ROWS, check_row, needs_eight_devices


def main() -> int:
    """How many rows are wrong."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    wrong = 0
    for row in filter(needs_eight_devices, ROWS):
        try:
            check_row(**row)
        except Exception:
            wrong += 1
            print(row)
            traceback.print_exc(file=sys.stdout)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
