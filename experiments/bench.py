"""Eager speed beside transformers', in one process, interleaved; medians. README quotes the ratios.

    python experiments/bench.py --model PATH [--threads 2] [--rounds 7]

Same weights, same dtype, same threads: decode at batch 1 (63 steps after a prompt of 32), ours against
`generate`, its own prefill subtracted; and prefill of 2,048 tokens. Needs transformers.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
import model


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(llama, hf, rounds, new=64, length=2048):
    """Medians of seconds: {"decode": (ours, theirs), "prefill": (ours, theirs)}."""
    ids = torch.randint(0, llama.config.vocab, (1, length), generator=torch.Generator().manual_seed(0))
    prompt = ids[:, :32]

    def ours(n):
        list(lorc.generate(llama, lorc.new_caches(llama, "full", 32 + n), prompt, n))

    def theirs(n):
        hf.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    def prefill():
        h = llama.hidden(ids, lorc.new_caches(llama, "full", length))
        llama.head(h[:, -1])
    steps = [("decode", 0, lambda: timed(lambda: ours(new)) - timed(lambda: ours(1))),
             ("decode", 1, lambda: timed(lambda: theirs(new)) - timed(lambda: theirs(1))),
             ("prefill", 0, lambda: timed(prefill)), ("prefill", 1, lambda: timed(lambda: hf(ids, logits_to_keep=1)))]
    seconds = {"decode": ([], []), "prefill": ([], [])}
    for i in range(rounds + 1):
        for what, who, step in steps:
            seconds[what][who].append(step())
    return {what: [median(s[1:]) for s in pair] for what, pair in seconds.items()}     # the first warms up


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    with torch.inference_mode():
        llama = model.load(args.model, torch.float32)
        hf = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        seconds = measure(llama, hf, args.rounds)
    result = {what: {"ours_s": a, "transformers_s": b, "ratio": b / a} for what, (a, b) in seconds.items()}
    print(json.dumps({"torch": torch.__version__, "threads": args.threads, "dtype": "float32"} | result, indent=1))


if __name__ == "__main__":
    main()
