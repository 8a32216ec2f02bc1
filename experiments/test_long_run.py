"""experiments/long_run.py in small: a long generation grows nothing, and its window is exact."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import lorc
from long_run import long_run
from runtime.testing import small_model


def test_a_long_generation_grows_nothing_and_its_window_is_exact():
    """150 tokens over a ring of 8 and 4-bit groups of 32, checked after each of them."""
    llama = small_model()
    bases = lorc.compress(llama, d_min=4, schedule="uniform")[1]
    got = long_run(llama, bases, [1, 2, 3], 150, 50, sinks=2, window=8, bits=4)
    assert got["steps"] == got["steps_with_exact_window"] == 150
    assert len({row["held"] for row in got["rows"]}) == 1
