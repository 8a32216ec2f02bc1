"""Memory above the weights: LLaMA-3-8B's shape at batch 64 and length 2,048 (LoRC, Table 2).

The weights are random. The caches are filled with random numbers up to their last token; then one
decoding step runs, and the peak of allocated memory over it is read. The bases count as part of the
cache's cost. Then the largest batch that fits on the card is found for each cache. CUDA only.

    python experiments/memory.py [--kept 0.6] [--out FILE] [--commit HASH]
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from bench import fill, filled, random_model, shape
from record import HERE, provenance, write


def peak_of_a_step(llama, kind, bases, B, length):
    """Bytes of the caches, and the peak of allocated bytes above what was allocated before them,
    over one decoding step."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    caches = lorc.new_caches(llama, kind, length, bases, B)
    fill(caches, length - 1)
    tokens = torch.zeros(B, 1, dtype=torch.long, device="cuda")
    llama(tokens, caches).argmax(-1).cpu()
    return sum(c.nbytes for c in caches), torch.cuda.max_memory_allocated() - before


def largest_batch(llama, name, length, kept):
    """The largest batch, to within 4, whose caches and one eager decoding step fit on the card."""
    def fits(B):
        torch.cuda.empty_cache()
        try:
            caches = filled(llama, name, kept, B, length, 1)
            llama(torch.zeros(B, 1, dtype=torch.long, device="cuda"), caches).argmax(-1).cpu()
        except torch.OutOfMemoryError:
            return False
        return True
    low, high = 4, 4096
    while high - low > 4:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kept", type=float, default=0.6)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    with torch.inference_mode():
        llama = random_model(shape("llama-3-8b"), torch.bfloat16, "cuda")
        result = provenance("cuda", args.commit) | {
            "batch": args.batch, "length": args.length, "kept": args.kept}
        result["full_bytes"], result["full_peak"] = peak_of_a_step(llama, "full", None, args.batch,
                                                                   args.length)
        for schedule in ("progressive", "uniform"):
            start = torch.cuda.memory_allocated()
            bases = lorc.compress(llama, kept=args.kept, schedule=schedule)[1]
            held = torch.cuda.memory_allocated() - start
            cache, peak = peak_of_a_step(llama, "compressed", bases, args.batch, args.length)
            result[schedule] = {"cache_bytes": cache, "bases_bytes": held, "peak": held + peak,
                                "of_full_peak": (held + peak) / result["full_peak"]}
            del bases
        result["largest_batch_at_kept_0.5"] = {
            name: largest_batch(llama, name, args.length, 0.5)
            for name in ("full", "compressed", "commuting", "bibranch-4bit")}
    write(args.out or HERE / "results" / "memory_h200.json", result)


if __name__ == "__main__":
    main()
