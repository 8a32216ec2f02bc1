"""Without a GPU, the tests run Triton's kernels in its interpreter.

Triton reads TRITON_INTERPRET when it is imported, which PyTorch's compiler may do in any test. It
must therefore be set before the first test runs.
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
