"""float16 and bfloat16 against float32: perplexity of each cache over a long text, and decoding after it.

    python experiments/dtypes.py --model PATH --text FILE --calibrate FILE
        [--tokens 8192] [--windows 32] [--device cuda] [--kept 0.5] [--bits 4] [--out FILE] [--commit HASH]

One window of all the tokens is scored, so positions run up to the end of the model's context; then each
cache takes the same text as a prompt and 16 tokens are generated. Every logit must be finite (lorc.py
stops otherwise, and the cell says so). Bases are made in the dtype they are used in, from a calibration
in that dtype; uniform d_c, keys and values alike.
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


def measure(llama, tokens, bases, kind, bits, new=16):
    """Perplexity of tokens (T,) in one window, and the ids generated after them; or what went wrong."""
    options = {"bits": bits} if kind == "bibranch" else {}
    strict = {"simulate_decoding": True} if kind == "bibranch" else {}

    def make(capacity):
        return lorc.new_caches(llama, kind, capacity, bases, **options, **strict)
    try:
        nats, count = negative_log_likelihood(llama, tokens, len(tokens), make)
        prompt = tokens[:len(tokens) - new][None]
        caches = lorc.new_caches(llama, kind, len(tokens), bases, **options)
        return {"perplexity": math.exp(nats / count), "ids": [t.item() for t in lorc.generate(llama, caches, prompt, new)]}
    except model.UserError as e:
        return {"error": str(e)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--text", "--calibrate"):
        p.add_argument(name, required=True)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--windows", type=int, default=32, help="Of the calibration text, 1,024 tokens each.")
    p.add_argument("--device", default="cpu")
    p.add_argument("--kept", type=float, default=0.5)
    p.add_argument("--bits", type=int, choices=[16, 4], default=4)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    result = provenance(args.device, args.commit) | {"tokens": args.tokens, "kept": args.kept, "bits": args.bits, "caches": {}}
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16", "float16"):
            llama = model.load(args.model, getattr(torch, dtype), args.device)
            tokenizer = Tokenizer(args.model, llama.config)
            read = [torch.tensor(tokenizer.encode(running.read_text(f)), device=args.device) for f in (args.text, args.calibrate)]
            text, window = read[0][:args.tokens], min(1024, llama.config.context)
            assert len(text) == args.tokens <= llama.config.context, "a text and a context of --tokens tokens are needed"
            moments = lorc.calibrated_moments(llama, read[1], "whitened", context=window, windows=args.windows)
            bases = lorc.compress(llama, kept=args.kept, schedule="uniform", moments=moments)[1]
            for kind in ("full", "compressed", "bibranch"):
                of = result["caches"].setdefault(kind, {})
                of[dtype] = found = measure(llama, text, bases, kind, args.bits)
                if "error" not in found and "error" not in of["float32"]:
                    found["over_float32"] = found["perplexity"] / of["float32"]["perplexity"] - 1
                    found["same_ids"] = sum(a == b for a, b in zip(found["ids"], of["float32"]["ids"]))
                print(kind, dtype, found, file=sys.stderr, flush=True)
    write(args.out or HERE / "results" / f"dtypes_{args.device.split(':')[0]}.json", result)


if __name__ == "__main__":
    main()
