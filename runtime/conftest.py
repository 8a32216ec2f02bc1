"""What must happen before the first test: Triton's interpreter, and a slow compilation.

Without a GPU, the tests run Triton's kernels in its interpreter. Triton reads TRITON_INTERPRET when
it is imported, which PyTorch's compiler may do in any test.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
IN_CPP = """
import json
from runtime import test_compiled, testing
print(json.dumps(test_compiled.forty_tokens(testing.small_model(), "bibranch", True)))
"""


@pytest.fixture(scope="session")
def compiled_in_cpp():
    """A process that prints the tokens of a step in C++."""
    with subprocess.Popen([sys.executable, "-c", IN_CPP], cwd=Path(__file__).parents[1], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def start_to_compile(request):
    """Start that process before the first test, since compiling takes up to half a minute."""
    items = request.session.items
    if any("compiled_in_cpp" in getattr(item, "fixturenames", ()) for item in items):
        request.getfixturevalue("compiled_in_cpp")
