"""Decoding speed: milliseconds per step, memory, and the fraction of the memory bandwidth in use.

    python experiments/bench.py --model PATH --device cpu --dtype float32
    python experiments/bench.py --model PATH --context 512
    python experiments/bench.py --shape llama-3-8b --batch 64 --context 2048 --transformers none \\
        --caches full:compiled compressed@0.5:compiled compressed@0.5:fused bibranch-4bit@0.25:fused

All contenders run in one process, in turn, for several rounds; each number is the median over all
steps. A step ends when its token has reached the host. A contender is a cache and the way its step
is computed: uncompiled (eager), compiled by PyTorch alone (compiled), or compiled with the kernels
of runtime/fused.py (fused), where these serve the cache. NAME@KEPT:HOW sets the fraction and the way for
one cache.
transformers is timed with its default cache and with its static cache, which it compiles on CUDA.

`share` is (weights + cache bytes) / (time * bandwidth). The bandwidth is measured in the same run,
of a copy on CUDA, of a large matrix times a vector on the CPU. With --shape, weights and bases are
random and the caches are filled with random numbers up to their last tokens.
"""
import argparse
import functools
import gc
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from runtime import compiled
import model
from cache import Basis
from runtime.commuting import CommutingBasis
from runtime.scoring import finite
from record import HERE, provenance, write

SHAPES = {
    "smollm2-135m": dict(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536),
    "llama-3-8b": dict(vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336),
    "llama-2-13b": dict(vocab=32000, width=5120, layers=40, heads=40, kv_heads=40, head_dim=128, mlp=13824),
}
CACHES = {"full": ("full", 16, False), "compressed": ("compressed", 16, False),
          "commuting": ("compressed", 16, True), "bibranch": ("bibranch", 16, False),
          "bibranch-4bit": ("bibranch", 4, False), "bibranch-commuting": ("bibranch", 16, True),
          "bibranch-commuting-4bit": ("bibranch", 4, True)}
HOW = ["eager", "compiled", "fused"]
WARM = 4              # steps left out at the start of every run: compiling, recording


def shape(name):
    return model.Config(**SHAPES[name], context=2**17, eps=1e-5, tied=False,
                        rope={"type": "default", "theta": 500000.0})


def random_model(config, dtype, device):
    """A Llama of this shape with Gaussian weights."""
    with torch.device("meta"):
        llama = model.Llama(config)
    llama = llama.to(dtype).to_empty(device=device).requires_grad_(False)
    for p in llama.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, p.shape[1] ** -0.5)
    return llama


def random_bases(llama, kept, commuting, split=0.0):
    """Random bases, one pair per layer, with the ranks of lorc.py's uniform schedule."""
    c, like = llama.config, llama.norm.weight
    d_c = kept * c.kv_width
    [(d_k, d_v)] = lorc.round_ranks([d_c], [False], c.kv_width, split, pairs=True)

    def one(d_c, components=None):
        U = like.new_empty(c.kv_width, d_c).normal_(0, c.kv_width ** -0.5)
        return Basis(U.T, U) if components is None else CommutingBasis(U.T, U, components)
    j = torch.randint(c.head_dim // 2, (d_k // 2,), device=like.device)
    return [(one(d_k, torch.cat((j, j + c.head_dim // 2)) if commuting else None), one(d_v))
            for _ in range(c.layers)]


def filled(llama, name, kept, B, context, steps, split=0.0):
    """Caches for `context` tokens, filled with random numbers except for the last `steps`."""
    kind, bits, commuting = CACHES[name]
    bases = None if kind == "full" else random_bases(llama, kept, commuting, split)
    options = {"bits": bits} if kind == "bibranch" else {}
    caches = lorc.new_caches(llama, kind, context, bases, B, **options)
    fill(caches, context - steps)
    return caches


def fill(caches, n):
    """Random numbers in every buffer, as if n tokens had come."""
    for cache in caches:
        cache.length = n
        for store in (cache, *(x for x in vars(cache).values() if hasattr(x, "append"))):
            if store is not cache:
                store.length = max(0, n - getattr(cache, "sinks", 0) - getattr(cache, "window", 0))
            for x in vars(store).values():
                if isinstance(x, torch.Tensor):
                    x.random_(0, 256) if x.dtype == torch.uint8 else x.normal_()


def intervals(step, tokens, steps):
    """Seconds of each of `steps` steps: the token is drawn and has reached the host."""
    marks = [time.perf_counter()]
    for _ in range(steps):
        tokens = lorc.sample(finite(step(tokens)), 0, 1, None)[:, None]
        tokens.cpu()
        marks.append(time.perf_counter())
    return [b - a for a, b in zip(marks, marks[1:])][WARM:]


class Clock:
    """A streamer: notes when each token reaches the host."""

    def __init__(self):
        self.marks = []

    def put(self, value):
        self.marks.append(time.perf_counter())

    def end(self):
        pass


def theirs(hf, prompt, steps, static):
    """Seconds of each of transformers' steps after the prompt."""
    clock = Clock()
    hf.generate(prompt, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False, pad_token_id=0,
                streamer=clock, **({"cache_implementation": "static"} if static else {}))
    marks = clock.marks[1:]                                    # the first is the prompt itself
    return [b - a for a, b in zip(marks, marks[1:])][WARM:]


def ours(llama, contender, how, args):
    """Seconds of each of args.steps steps, and the row with the bytes of cache and step."""
    name, _, kept = contender.partition("@")
    caches = filled(llama, name, float(kept or args.kept), args.batch, args.context, args.steps,
                    args.split)
    tokens = torch.zeros(args.batch, 1, dtype=torch.long, device=args.device)
    held = torch.cuda.memory_allocated() if args.device == "cuda" else 0

    def eager(tokens):
        return llama.head(llama.hidden(tokens, caches)[:, -1])
    step = eager if how == "eager" else compiled.compile_step(llama, caches, args.batch,
                                                              fused=how == "fused")
    seconds = intervals(step, tokens, args.steps)
    row = {"cache_bytes": sum(c.nbytes for c in caches)}
    if args.device == "cuda":
        row["step_bytes"] = torch.cuda.max_memory_allocated() - held
        room = torch.cuda.get_device_properties(0).total_memory - held + row["cache_bytes"]
        row["largest_batch"] = int(room / (row["cache_bytes"] + row["step_bytes"]) * args.batch)
    return seconds, row


def contenders(args):
    """(cache, how) of every row; the kernels do not serve every cache."""
    pairs = [(name, how) for cache in args.caches for name, _, own in [cache.partition(":")]
             for how in ([own] if own else args.how)]
    return [(name, how) for name, how in pairs
            if how != "fused" or not ("commuting" in name or name == "full")]


def bandwidth(device):
    """Bytes a second: of a copy, read and written, on CUDA; of a matrix read by a product on the CPU."""
    if device == "cpu":
        W, x = torch.randn(2**16, 1024), torch.randn(1024)      # 256 MiB, long rows
        f, size = (lambda: W @ x), W.nbytes
    else:
        a = torch.empty(2**31, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        f, size = (lambda: (b.copy_(a), torch.cuda.synchronize())), 2 * a.nbytes
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return size / median(seconds[20:])


def transformers_model(args, llama):
    from transformers import AutoModelForCausalLM, LlamaConfig, logging
    logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    c = llama.config
    raw = LlamaConfig(vocab_size=c.vocab, hidden_size=c.width, num_hidden_layers=c.layers, tie_word_embeddings=False,
                      num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
                      intermediate_size=c.mlp, max_position_embeddings=c.context)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(raw, dtype=dtype)
    hf = hf.to_empty(device=args.device)
    for p in hf.parameters():
        p.data.fill_(1.0) if p.dim() == 1 else p.data.normal_(0, p.shape[1] ** -0.5)
    hf.model.rotary_emb.__init__(raw, args.device)             # its frequencies are not parameters
    return hf


def measure(args, llama):
    """All rows of one setting: name -> ms a step, tokens/s, bytes, share, peak memory of a step."""
    hf = transformers_model(args, llama) if args.transformers else None
    prompt = torch.randint(9, llama.config.vocab, (args.batch, args.context - args.steps - 1), device=args.device)
    full = lorc.full_cache_bytes(llama, args.context, args.batch)
    runs = {f"transformers {which}": lambda which=which: (
        theirs(hf, prompt, args.steps, which == "static"), {"cache_bytes": full}) for which in args.transformers}
    for name, how in contenders(args):
        runs[f"{name} {how}"] = functools.partial(ours, llama, name, how, args)
    weights = sum(p.nbytes for n, p in llama.named_parameters() if n != "embed.weight")
    weights += llama.config.tied * llama.embed.weight.nbytes
    speed, seconds, rows = bandwidth(args.device), {name: [] for name in runs}, {}
    for i in range(args.rounds):
        for name, run in runs.items():
            if args.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            took, rows[name] = run()
            seconds[name] += took if i or args.rounds == 1 else []          # the first round warms up
            print(f"{name:34s} {1e3 * median(took):8.3f} ms", file=sys.stderr, flush=True)
    for name, row in rows.items():
        s = median(seconds[name])
        row |= {"ms": 1e3 * s, "tokens_per_s": args.batch / s,
                "share": (weights + row["cache_bytes"]) / s / speed}
    return {"batch": args.batch, "context": args.context, "kept": args.kept, "split": args.split, "dtype": args.dtype,
            "bandwidth": speed, "weights_bytes": weights, "rows": rows}


def contender(text):
    """NAME[@KEPT][:HOW], checked."""
    cache, _, how = text.partition(":")
    name, _, kept = cache.partition("@")
    if name not in CACHES or not 0 < float(kept or 1) <= 1 or how not in ("", *HOW):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME[@KEPT][:HOW], such as full or compressed@0.25:fused; "
            f"names: {', '.join(CACHES)}; ways: {', '.join(HOW)}")
    return text


def command_line():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="A folder; or")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape.")
    p.add_argument("--batch", type=int, nargs="+", default=[1], help="One, or one per context.")
    p.add_argument("--context", type=int, nargs="+", default=[512], help="One table for each.")
    p.add_argument("--steps", type=int, default=48)
    p.add_argument("--rounds", type=int, default=3, help="The first is left out.")
    p.add_argument("--kept", type=float, default=0.5)
    p.add_argument("--split", type=float, default=0.0, help="As lorc.py's: from keys to values.")
    p.add_argument("--caches", nargs="+", type=contender, metavar="NAME[@KEPT][:HOW]",
                   default=["full", "compressed", "bibranch", "bibranch-4bit"],
                   help=", ".join(CACHES))
    p.add_argument("--how", nargs="+", choices=HOW,
                   default=["eager", "compiled"])
    p.add_argument("--transformers", nargs="+", choices=["dynamic", "static", "none"], default=["dynamic", "static"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, help="On the CPU.")
    p.add_argument("--out", help="Default: results/bench-MODEL-DEVICE.json.")
    p.add_argument("--commit")
    return p


def main():
    args = command_line().parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch._dynamo.config.recompile_limit = 64                  # one process compiles for many caches
    args.transformers = [t for t in args.transformers if t != "none"]
    name, dtype = args.shape or Path(args.model).name, getattr(torch, args.dtype)
    with torch.inference_mode():
        llama = (model.load(args.model, dtype, args.device) if args.model
                 else random_model(shape(args.shape), dtype, args.device))
        result = provenance(args.device, args.commit) | {"tables": []}
        if args.transformers:
            import transformers
            result["transformers"] = transformers.__version__
        batches = args.batch * len(args.context) if len(args.batch) == 1 else args.batch
        for batch, context in zip(batches, args.context, strict=True):
            torch._dynamo.reset()
            one = argparse.Namespace(**vars(args) | {"batch": batch, "context": context})
            result["tables"].append(measure(one, llama))
            write(args.out or HERE / "results" / f"bench-{name}-{args.device}.json", result)


if __name__ == "__main__":
    main()
