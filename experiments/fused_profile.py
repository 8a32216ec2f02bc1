"""Where the time of a decode step with the kernels of runtime/fused.py goes, for one layer.

    python experiments/fused_profile.py --batch 64 --context 2048 --kept 0.5 0.4 0.25

LLaMA-3-8B's shape by default, random numbers in bfloat16, a CUDA GPU. Each number is the median
time of one call in microseconds, measured by replaying a CUDA graph of 20 calls. The parts:

    linear layers       the seven products of a layer with its weights
    full attention      attention over a full cache, as in bench.py's "full"
    product             latents times U^T by cuBLAS, which writes the keys to memory
    scores              score_kernel, which contains this product
    values, combine     value_kernel and combine_kernel; with 4 bits, the first two unpack codes
    expand              the sums of value latents times U_v
"""
import argparse
import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc                                                        # noqa: E402
from bench import SHAPES, bandwidth                                # noqa: E402
from cache import Basis, attention, quantize                       # noqa: E402
from record import HERE, provenance, write                         # noqa: E402
from runtime import fused                                          # noqa: E402


def microseconds(work, calls=20, repeats=7):
    """Median time of work() in microseconds."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return median(times)


def normal(*size):
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def linear_layers(shape, B):
    D, d = shape["width"], shape["head_dim"]
    sizes = [(shape["heads"] * d, D), (shape["kv_heads"] * d, D), (shape["kv_heads"] * d, D),
             (D, shape["heads"] * d), (shape["mlp"], D), (shape["mlp"], D), (D, shape["mlp"])]
    weights = [normal(*size) for size in sizes]
    inputs = [normal(B, size[1]) for size in sizes]
    return microseconds(lambda: [x @ W.T for x, W in zip(inputs, weights)])


def full_attention(shape, B, S):
    G, d = shape["kv_heads"], shape["head_dim"]
    q, k, v = normal(B, 1, shape["heads"], d), normal(B, S, G, d), normal(B, S, G, d)
    seen = torch.ones(1, S, dtype=torch.bool, device="cuda")
    return microseconds(lambda: attention(q, k, v, seen))


def product(shape, B, S, rank):
    c, up = normal(B * S, rank), normal(shape["kv_heads"] * shape["head_dim"], rank)
    return microseconds(lambda: c @ up.T)


def kernels(shape, B, S, rank, bits):
    """Times of the parts for keys and values of one rank, stored in 16 or 4 bits."""
    H, G, d = shape["heads"], shape["kv_heads"], shape["head_dim"]
    q, up, c = normal(B, H, d), normal(G * d, rank), normal(B, S, rank)
    cos, sin, position = normal(S, 1, d), normal(S, 1, d), torch.tensor([S - 1], device="cuda")
    store = [c] if bits == 16 else [*quantize(c), normal(B, fused.GROUP, rank)]
    tiles = fused.tile_options(q, B * S)

    def score():
        return fused.latent_scores(q, store, up, cos, sin, position, 0, 0, tiles[0])
    scores = score()

    def sums():
        return fused.sum_latents(q, scores, store, position, 0, tiles[1])
    parts, V = sums(), Basis(up.T, up)
    latents = fused.combine(q, *parts, G, cos, sin, position, [], 0, 0)[0]
    return {"scores": microseconds(score), "values": microseconds(sums),
            "combine": microseconds(
                lambda: fused.combine(q, *parts, G, cos, sin, position, [], 0, 0)),
            "expand": microseconds(lambda: V.reconstruct_heads(latents[:, None], d))}


def command_line():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--context", type=int, default=2048)
    p.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.4, 0.25])
    p.add_argument("--out", help="Default: results/fused-profile-SHAPE.json.")
    p.add_argument("--commit")
    return p


def main():
    args = command_line().parse_args()
    shape, B, S = SHAPES[args.shape], args.batch, args.context
    width = shape["kv_heads"] * shape["head_dim"]
    result = provenance("cuda", args.commit) | {
        "batch": B, "context": S, "bandwidth": bandwidth("cuda"), "rows": [],
        "linear_layers": linear_layers(shape, B), "full_attention": full_attention(shape, B, S)}
    for kept in args.kept:
        [(rank, _)] = lorc.round_ranks([kept * width], [False], width)
        rebuilt = product(shape, B, S, rank)
        rate = 2e6 * B * S * rank * width / rebuilt
        for bits in (16, 4):
            row = {"kept": kept, "rank": rank, "bits": bits, "product": rebuilt}
            row |= kernels(shape, B, S, rank, bits)
            result["rows"].append(row | {"operations_per_s": rate})
    write(args.out or HERE / "results" / f"fused-profile-{args.shape}.json", result)


if __name__ == "__main__":
    main()
