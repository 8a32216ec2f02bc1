"""Memory and time of `generate` in transformers with a LowRankCache, beside its own DynamicCache.

    python experiments/transformers_memory.py --shape llama-3-8b --batch 8 --prompt 3584 --new 512

The model has random weights and the bases are random too: only bytes and seconds are measured. For
each cache the result holds the bytes it stores at the end, the peak of allocated memory above the
weights and bases during the prompt and during decoding, and the median time of a decoding step.
Each cache runs once on a short text before it is measured.
"""
import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import SHAPES, random_bases                             # noqa: E402
from record import HERE, provenance, write                         # noqa: E402
from transformers_cache import LowRankCache, as_llama              # noqa: E402

TINY = dict(vocab=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128)
CACHES = {"dynamic": None, "compressed": {}, "bibranch": {"kind": "bibranch"},
          "bibranch-4bit": {"kind": "bibranch", "bits": 4}}


def random_model(shape, dtype, device):
    """A transformers LLaMA of this shape with its library's random initial weights."""
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], intermediate_size=shape["mlp"], max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.device(device):
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    hf.generation_config.eos_token_id = None
    return hf.eval().requires_grad_(False)


class Clock:
    """A streamer that notes when each token reaches the host, and the peak memory of the prompt."""

    def __init__(self, peak):
        self.marks, self.peak, self.prompt_peak = [], peak, None

    def put(self, value):
        self.marks.append(time.perf_counter())
        if len(self.marks) == 2:                       # the prompt itself, then the first new token
            self.prompt_peak = self.peak()

    def end(self):
        pass


def peak(device):
    """The peak of allocated bytes since it was last asked for; None on a CPU."""
    if device == "cpu":
        return None
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def measure(hf, bases, options, ids, new):
    """Bytes and milliseconds of one cache, for `new` tokens after ids (B, T)."""
    cache = transformers.DynamicCache() if options is None else LowRankCache(hf, bases, **options)
    device = ids.device.type
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    peak(device)
    clock = Clock(lambda: peak(device))
    hf.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0, streamer=clock)
    decode_peak = peak(device)
    stored = (sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
              if options is None else cache.nbytes)
    steps = [b - a for a, b in zip(clock.marks[1:], clock.marks[2:])]
    row = {"cache_bytes": stored, "ms_first_token": 1e3 * (clock.marks[1] - clock.marks[0]),
           "ms_step": 1e3 * median(steps), "ms_step_last_64": 1e3 * median(steps[-64:])}
    if device == "cuda":
        row |= {"prompt_peak_bytes": clock.prompt_peak - held,
                "decode_peak_bytes": decode_peak - held}
    return row


def command_line():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=[*SHAPES, "tiny"], default="llama-3-8b")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--prompt", type=int, default=3584, help="Tokens of each prompt.")
    p.add_argument("--new", type=int, default=512, help="Tokens generated after it.")
    p.add_argument("--kept", type=float, default=0.4)
    p.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="Default: results/transformers-memory-SHAPE.json.")
    p.add_argument("--commit")
    return p


def main():
    args = command_line().parse_args()
    transformers.logging.set_verbosity_error()
    shape = (SHAPES | {"tiny": TINY})[args.shape]
    hf = random_model(shape, getattr(torch, args.dtype), args.device)
    width = shape["kv_heads"] * shape["head_dim"]
    kept = 8 * round(args.kept * width / 8) / width            # ranks that are multiples of 8
    bases = random_bases(as_llama(hf), kept, commuting=False)
    ids = torch.randint(9, shape["vocab"], (args.batch, args.prompt), device=args.device)
    result = provenance(args.device, args.commit) | {
        "transformers": transformers.__version__, "batch": args.batch, "prompt": args.prompt,
        "new": args.new, "kept": kept, "dtype": args.dtype,
        "weights_bytes": sum(p.nbytes for p in hf.parameters()), "rows": {}}
    for name in args.caches:
        measure(hf, bases, CACHES[name], ids[:, :64], 8)
        result["rows"][name] = measure(hf, bases, CACHES[name], ids, args.new)
        write(args.out or HERE / "results" / f"transformers-memory-{args.shape}.json", result)


if __name__ == "__main__":
    main()
