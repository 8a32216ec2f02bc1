"""float16 and bfloat16 against float32: perplexity of each cache over a long text, and generation.

    python experiments/dtypes.py --model PATH --text FILE --calibrate FILE
        [--tokens 8192] [--windows 32] [--device cuda] [--kept 0.5] [--bits 4] [--out FILE]

One window of all tokens is scored, so that positions run up to the end of the model's context. Then
each cache takes the same text as a prompt, and 16 tokens are generated. All logits must be finite;
otherwise the result says what went wrong. Bases are computed in the dtype in which they are used,
calibrated in that dtype, with one rank for all layers, keys and values.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from runtime import jobs as running
from runtime.scoring import negative_log_likelihood
from runtime.text import Tokenizer
import model
from record import HERE, provenance, write


NEW = 16              # tokens that are generated


def measure(llama, tokens, bases, kind, bits):
    """Perplexity of tokens (T,) in one window, and the ids generated after them; or the error."""
    options = {"bits": bits} if kind == "bibranch" else {}
    simulate = {"simulate_decoding": True} if kind == "bibranch" else {}

    def make(capacity):
        return lorc.new_caches(llama, kind, capacity, bases, **options, **simulate)
    try:
        nats, count = negative_log_likelihood(llama, tokens, len(tokens), make)
        caches = lorc.new_caches(llama, kind, len(tokens), bases, **options)
        ids = [new.item() for new in lorc.generate(llama, caches, tokens[None, :-NEW], NEW)]
    except model.UserError as e:
        return {"error": str(e)}
    return {"perplexity": math.exp(nats / count), "ids": ids}


def measure_dtype(args, dtype):
    """{kind of cache: result} with the model in one dtype. Raises UserError."""
    llama = model.load(args.model, getattr(torch, dtype), args.device)
    tokenizer = Tokenizer(args.model, llama.config)
    text, calibration = (torch.tensor(tokenizer.encode(running.read_text(path)), device=args.device)
                         for path in (args.text, args.calibrate))
    if not args.tokens <= min(len(text), llama.config.context):
        raise model.UserError(f"--tokens {args.tokens} is more than the text ({len(text)}) or the "
                              f"context ({llama.config.context}) has")
    moments = lorc.calibrated_moments(llama, calibration, "whitened", windows=args.windows,
                                      context=min(1024, llama.config.context))
    bases = lorc.compress(llama, kept=args.kept, schedule="uniform", moments=moments)[1]
    return {kind: measure(llama, text[:args.tokens], bases, kind, args.bits)
            for kind in ("full", "compressed", "bibranch")}


def compare(caches):
    """Add each result's distance from the same cache's in float32."""
    for of in caches.values():
        for found in of.values():
            if "error" not in found and "error" not in of["float32"]:
                found["over_float32"] = found["perplexity"] / of["float32"]["perplexity"] - 1
                found["same_ids"] = sum(a == b for a, b in zip(found["ids"], of["float32"]["ids"]))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--text", "--calibrate"):
        p.add_argument(name, required=True)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--windows", type=int, default=32, help="Of the calibration text. Default: 32.")
    p.add_argument("--device", default="cpu")
    p.add_argument("--kept", type=float, default=0.5)
    p.add_argument("--bits", type=int, choices=[16, 4], default=4)
    p.add_argument("--out")
    p.add_argument("--commit")
    args, caches = p.parse_args(), {}
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16", "float16"):
            for kind, found in measure_dtype(args, dtype).items():
                caches.setdefault(kind, {})[dtype] = found
                print(kind, dtype, found, file=sys.stderr, flush=True)
    compare(caches)
    about = {"tokens": args.tokens, "kept": args.kept, "bits": args.bits, "caches": caches}
    write(args.out or HERE / "results" / f"dtypes_{args.device.split(':')[0]}.json",
          provenance(args.device, args.commit) | about)


if __name__ == "__main__":
    try:
        main()
    except model.UserError as e:
        print(f"dtypes: {e}", file=sys.stderr)
        sys.exit(2)
