"""App. D: the SVD of all of LLaMA-3-70B's key and value weights "takes only 40 seconds" with NumPy.

160 matrices of 1024 x 8192, random with a decaying spectrum. `lorc.spectrum` (Gram matrix and
eigenvectors in float64) is timed beside numpy.linalg.svd in float64 and in float32 in the same run;
NumPy runs on a sample and on the CPU, and its times are extrapolated to 160 matrices.

    python experiments/svd_speed.py [--device cuda] [--sample 4] [--out FILE] [--commit HASH]
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from record import HERE, provenance, write

MATRICES, ROWS, COLUMNS = 160, 1024, 8192


def matrix(seed, device):
    """Gaussian rows whose norms fall from 1 to 1/100, and with them the singular values."""
    g = torch.Generator(device).manual_seed(seed)
    scale = torch.logspace(0, -2, ROWS, device=device)[:, None]
    return torch.randn(ROWS, COLUMNS, generator=g, device=device) * scale


def timed(f, device):
    """The result of f() and its seconds; the device's queue is empty before and after."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    result = f()
    sync()
    return result, time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--sample", type=int, default=4,
                   help="Matrices that are timed on the CPU. Default: 4.")
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    lorc.spectrum(matrix(0, args.device))                                  # warms up
    count = MATRICES if args.device == "cuda" else args.sample
    result = provenance(args.device, args.commit) | {"matrices_timed": count,
                                                     "numpy_sample": args.sample}
    ours = [timed(lambda W=matrix(i, args.device): lorc.spectrum(W), args.device)
            for i in range(count)]
    result["ours_s_for_160"] = sum(s for _, s in ours) * MATRICES / count
    for dtype in (np.float64, np.float32):
        theirs = [timed(lambda W=matrix(i, args.device).cpu().numpy().astype(dtype):
                        np.linalg.svd(W, full_matrices=False), "cpu") for i in range(args.sample)]
        name = f"numpy_{np.dtype(dtype).name}"
        result[f"{name}_s_for_160"] = sum(s for _, s in theirs) * MATRICES / args.sample
        result[f"{name}_over_ours"] = result[f"{name}_s_for_160"] / result["ours_s_for_160"]
        if dtype is np.float64:
            result["largest_relative_difference_of_sigma"] = max(
                float(np.max(np.abs(lam.sqrt().cpu().numpy() / s - 1)))
                for ((lam, _), _), ((_, s, _), _) in zip(ours, theirs))
    write(args.out or HERE / "results" / f"svd_speed_{args.device}.json", result)


if __name__ == "__main__":
    main()
