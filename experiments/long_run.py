"""A long generation from the bi-branch cache: does anything grow, and is the window exact throughout?

    python experiments/long_run.py [--tokens 20000] [--device cuda] [--model PATH] [--kept 0.3] [--out FILE]

The model runs past the positions it was made for, which lorc.py refuses to do: this is about the cache,
not the text. All buffers are made, and written to once, before the first token. After every token the
sinks and the ring are compared, bit by bit, with the keys and values that Wk and Wv gave. The step's own
workspace (keys rebuilt, about cache.REBUILT_BYTES bytes at a time) is the only memory that may come and go.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from runtime.text import Tokenizer
import model
from cache import Buffers
from record import HERE, provenance, write


def resident(device="cpu"):
    """Bytes of this process that are in memory; on a GPU those that are allocated there."""
    if device != "cpu":
        return torch.cuda.memory_allocated()
    return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))


def buffers(store):
    """Every tensor that a cache or a store of latents holds."""
    for x in vars(store).values():
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, Buffers):
            yield from buffers(x)


def remembered(llama, seen, n):
    """Keep what Wk and Wv give, in seen[layer] (2, n, G, d): a hook each. n: a list with the count so far."""
    def hook(layer, which):
        def keep(module, inputs, x):
            seen[layer][which, n[0]:n[0] + x.shape[1]] = x[0].unflatten(-1, seen.shape[-2:])
        return keep
    return [W.register_forward_hook(hook(i, j)) for i, layer in enumerate(llama.layers)
            for j, W in enumerate((layer.attn.Wk, layer.attn.Wv))]


def exact(store, seen):
    """Do the sinks and the ring hold, bit by bit, the keys and values seen (2, n, G, d)?"""
    first, _, ring = store.positions()
    return all(torch.equal(at[0, :len(x)], x) for at, x in (
        (store.sink_k, seen[0, first]), (store.sink_v, seen[1, first]), (store.ring_k, seen[0, ring]), (store.ring_v, seen[1, ring])))


def long_run(llama, bases, prompt, tokens, every, **bibranch):
    """Generate; return how many steps had an exact window, and bytes held and resident every few tokens."""
    prompt = torch.tensor([prompt], device=llama.embed.weight.device)
    c, T = llama.config, prompt.shape[1] + tokens - 1
    llama.config = replace(c, context=max(c.context, T))     # the text may be longer than training
    caches = lorc.new_caches(llama, "bibranch", T, bases, **bibranch)
    seen, n = llama.embed.weight.new_empty(c.layers, 2, T, c.kv_heads, c.head_dim), [0]
    for x in [seen, *(x for store in caches for x in buffers(store))]:
        x.fill_(0)                                      # its pages are there now
    hooks, rows, good = remembered(llama, seen, n), [], 0
    start = time.perf_counter()
    for i, _ in enumerate(lorc.generate(llama, caches, prompt, tokens, temperature=1.0)):
        n[0] = caches[0].length
        good += all(exact(store, seen[layer, :, :n[0]]) for layer, store in enumerate(caches))
        if i % every == 0 or i == tokens - 1:
            rows.append({"tokens": n[0], "held": sum(s.nbytes for s in caches), "resident": resident(prompt.device.type),
                         "seconds": round(time.perf_counter() - start, 2)})
    for hook in hooks:
        hook.remove()
    return {"steps": i + 1, "steps_with_exact_window": good, "rows": rows}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE.parent / "tiny"))
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--tokens", type=int, default=20_000)
    p.add_argument("--kept", type=float, default=0.3)
    p.add_argument("--every", type=int, default=1000)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    with torch.inference_mode():
        llama = model.load(args.model, torch.float32, args.device)
        prompt = Tokenizer(args.model, llama.config).encode("Once upon a time")
        bases = lorc.compress(llama, kept=args.kept, schedule="uniform")[1]
        result = long_run(llama, bases, prompt, args.tokens, args.every, sinks=4, window=32, bits=4)
    rows = result["rows"]
    result |= {"resident_after_first": rows[0]["resident"], "growth_of_resident": max(r["resident"] for r in rows) - rows[0]["resident"],
               "growth_of_held": rows[-1]["held"] - rows[0]["held"]}
    write(args.out or HERE / "results" / "long_run.json", provenance(args.device, args.commit) | {"kept": args.kept} | result)


if __name__ == "__main__":
    main()
