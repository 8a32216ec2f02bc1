"""Our forward pass and our text against transformers', live.

    python experiments/parity.py MODEL [MODEL ...]     logits and 64 greedy tokens on five prompts
    python experiments/parity.py --record              the numbers that runtime/test_api.py keeps as RECORDED

Needs transformers (experiments/requirements.txt). Everything is float32 on the CPU.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
from runtime.text import Tokenizer
import model
from runtime import testing

PROMPTS = ["Once upon a time", "The little dog was very", "Tom and Mia went to the park.",
           "One day, a bird", "\"What is that?\" asked"]


def logits_of(folder, tokens):
    """(ours, theirs) for tokens (1, T), float32."""
    llama = model.load(folder, torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return llama(tokens, lorc.new_caches(llama, "full", tokens.shape[1])), hf(tokens).logits, llama, hf


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def formula_models():
    """For each kind of checkpoint: its name, our logits and theirs, on one file and on shards."""
    for name, change in testing.VARIANTS.items():
        for shards in (1, 3):
            with tempfile.TemporaryDirectory() as folder:
                raw = testing.RAW | change
                testing.write_checkpoint(Path(folder), {k: v for k, v in raw.items() if v is not None}, shards=shards)
                ours, theirs, *_ = logits_of(folder, torch.tensor([testing.TOKENS]))
                yield name, shards, ours, theirs


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*")
    p.add_argument("--record", action="store_true")
    args = p.parse_args()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    found = list(formula_models())
    if args.record:
        print(json.dumps({n: [round(x.item(), 7) for x in (*t[0, -1, :4], t.norm())] for n, s, _, t in found if s == 1}))
        return
    for name, shards, ours, theirs in found:
        print(f"{name:16s} {shards} file(s): relative error of the logits {error(ours, theirs):.1e}")
    for folder in args.models:
        config = model.read_config(Path(folder))
        ours, theirs, llama, hf = logits_of(folder, torch.randint(0, config.vocab, (1, min(500, config.context))))
        print(f"{folder}: relative error of the logits {error(ours, theirs):.1e}")
        tokenizer = Tokenizer(folder, config)
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt)])
            a = [t.item() for t in lorc.generate(llama, lorc.new_caches(llama, "full", ids.shape[1] + 63), ids, 64, tokenizer.ends)]
            b = hf.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=sorted(tokenizer.ends))[0, ids.shape[1]:]
            print(f"  {'same' if a == b.tolist() else 'DIFFERENT'} {len(a)} tokens after {prompt!r}")


if __name__ == "__main__":
    main()
