"""A long generation from a bi-branch cache: does anything grow, and is the window always exact?

    python experiments/long_run.py [--tokens 5000] [--device cuda] [--model PATH] [--out FILE]

The model runs past the positions that it was trained for, so that the text is of no interest. All
buffers are allocated, and written once, before the first token. After every token the sinks and the
ring are compared, bit by bit, with the keys and values that Wk and Wv computed. The only memory
that may come and go is the workspace of a step, in which keys are rebuilt block by block (about
cache.REBUILT_BYTES bytes at a time).
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc                                                        # noqa: E402
from runtime.scoring import observe_projections                 # noqa: E402
from runtime.text import Tokenizer                                 # noqa: E402
import model                                                       # noqa: E402
from cache import Buffers                                          # noqa: E402
from record import HERE, provenance, write                         # noqa: E402


def resident(device="cpu"):
    """Bytes of this process that are in memory; on a GPU those that are allocated there."""
    if device != "cpu":
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def buffers(store):
    """Every tensor that a cache or a store of latents holds."""
    for x in vars(store).values():
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, Buffers):
            yield from buffers(x)


def is_exact(cache, seen):
    """Whether sinks and ring equal the keys and values seen (2, n, G, d), bit by bit."""
    sinks, _, ring = cache.positions()
    return all(torch.equal(held[0, :len(x)], x) for held, x in (
        (cache.sink_k, seen[0, sinks]), (cache.sink_v, seen[1, sinks]),
        (cache.ring_k, seen[0, ring]), (cache.ring_v, seen[1, ring])))


def long_run(llama, bases, prompt, tokens, every, **bibranch):
    """Generate `tokens` tokens after the token ids `prompt`.

    Returns {steps, steps_with_exact_window, rows}. rows: bytes held by the caches and bytes in
    memory, after every `every` tokens.
    """
    prompt = torch.tensor([prompt], device=llama.embed.weight.device)
    c, T = llama.config, prompt.shape[1] + tokens - 1
    llama.config = replace(c, context=max(c.context, T))     # the text may be longer than training
    caches = lorc.new_caches(llama, "bibranch", T, bases, **bibranch)
    seen = llama.embed.weight.new_empty(c.layers, 2, T, c.kv_heads, c.head_dim)
    for x in [seen, *(x for cache in caches for x in buffers(cache))]:
        x.fill_(0)                                      # so that its pages are in memory

    def remember(layer, name, x, y):
        y = y[0].unflatten(-1, seen.shape[-2:])                                    # (T, G, d)
        first = caches[layer].length
        seen[layer, "kv".index(name), first:first + len(y)] = y
    rows, exact, start = [], 0, time.perf_counter()
    with observe_projections(llama, remember):
        for i, _ in enumerate(lorc.generate(llama, caches, prompt, tokens, temperature=1.0)):
            n = caches[0].length
            exact += all(is_exact(cache, known[:, :n]) for cache, known in zip(caches, seen))
            if i % every == 0 or i == tokens - 1:
                rows.append({"tokens": n, "held": sum(cache.nbytes for cache in caches),
                             "resident": resident(prompt.device.type),
                             "seconds": round(time.perf_counter() - start, 2)})
    llama.config = c
    return {"steps": i + 1, "steps_with_exact_window": exact, "rows": rows}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE.parent / "tiny"))
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--tokens", type=int, default=5000)
    p.add_argument("--kept", type=float, default=0.3)
    p.add_argument("--every", type=int, default=500)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    with torch.inference_mode():
        llama = model.load(args.model, torch.float32, args.device)
        prompt = Tokenizer(args.model, llama.config).encode("Once upon a time")
        bases = lorc.compress(llama, kept=args.kept, schedule="uniform")[1]
        result = long_run(llama, bases, prompt, args.tokens, args.every, bits=4)
    rows = result["rows"]
    result |= {"resident_after_first": rows[0]["resident"],
               "growth_of_resident": max(r["resident"] for r in rows) - rows[0]["resident"],
               "growth_of_held": rows[-1]["held"] - rows[0]["held"]}
    write(args.out or HERE / "results" / "long_run.json",
          provenance(args.device, args.commit) | {"kept": args.kept} | result)


if __name__ == "__main__":
    main()
