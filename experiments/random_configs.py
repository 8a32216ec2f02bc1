"""Checkpoints that transformers writes for random configurations equal its logits or are refused.

    python experiments/random_configs.py [--first SEED] [--cases N] [--out FILE]

A case is its seed. A random LlamaConfig or MistralConfig is drawn, with sizes, RoPE types, sliding
windows, biases and activations of all kinds. transformers makes a model of it with random weights
and saves it, in one file or in shards. Some config.json are then rewritten as transformers 4 wrote
them, or lose keys that have defaults. The folder is validated and read as for lorc.py, and

    supported      the logits are transformers', to a relative error of 1e-5, in float32
    not supported  the folder is refused, and the message names what is not supported

Anything else is a finding, which is printed with its seed. What is not supported is decided here
from the configuration alone, so refusing too much is a finding, too. Needs transformers.
"""
import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc
import model
from runtime import checkpoint

TOLERANCE = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw_rope(rng):
    """rope_parameters, or None."""
    kind = rng.choice(["default", "linear", "llama3"] * 4 + ["yarn", "dynamic"])
    rope = {"rope_type": kind}
    if rng.random() < 0.8:
        rope["rope_theta"] = 10 ** rng.uniform(0, 6)
    if kind != "default":
        rope["factor"] = rng.choice([1.0, 2.0, 4.0, 8.0, rng.uniform(1, 40)])
    if kind == "llama3":
        rope["low_freq_factor"] = rng.uniform(0.5, 2)
        rope["high_freq_factor"] = rope["low_freq_factor"] + rng.uniform(0.1, 4)
    if kind in ("llama3", "yarn") and rng.random() < 0.7:
        rope["original_max_position_embeddings"] = rng.choice([8, 16, 64, 8192])
    if rng.random() < 0.05:
        rope["partial_rotary_factor"] = rng.choice([0.5, 1.0])
    return rng.choice([None, rope, rope, rope])


def draw_config(rng):
    """A random configuration. Options that are not drawn keep transformers' defaults."""
    kind = rng.choice([LlamaConfig, MistralConfig])
    heads = rng.choice([1, 2, 3, 4, 6, 8])
    options = {
        "num_attention_heads": heads, "hidden_size": heads * rng.choice([2, 4, 6, 8, 10, 16]),
        "num_key_value_heads": rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        "num_hidden_layers": rng.randrange(1, 4), "intermediate_size": rng.randrange(1, 80),
        "vocab_size": rng.randrange(8, 300), "tie_word_embeddings": rng.random() < 0.4,
        "rope_parameters": draw_rope(rng), "bos_token_id": 1, "eos_token_id": 2}
    if kind is LlamaConfig and rng.random() < 0.3:
        options["num_key_value_heads"] = None
    if rng.random() < 0.4:
        options["head_dim"] = 2 * rng.randrange(1, 20)
    if rng.random() < 0.7:
        options["max_position_embeddings"] = rng.choice([16, 32, 64, 1000, 4096, 4097, 32768])
    if rng.random() < 0.7:
        options["rms_norm_eps"] = 10 ** rng.uniform(-12, -2)
    if rng.random() < 0.1:
        options["original_max_position_embeddings"] = rng.choice([8, 24, 512])
    if rng.random() < 0.05:
        options["hidden_act"] = rng.choice(["silu", "gelu", "relu"])
    if kind is MistralConfig and rng.random() < 0.7:
        options["sliding_window"] = rng.choice([None, None, 8, 16, 64, 1000, 4096, 32768])
    if kind is LlamaConfig and rng.random() < 0.1:
        options[rng.choice(["attention_bias", "mlp_bias"])] = True
    return kind(**options)


def unsupported(config):
    """The words of which one should be in the message, for each option that is not supported."""
    rope, words = config.rope_parameters, []
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        words.append(rope["rope_type"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        words.append("partial_rotary_factor")
    if config.hidden_act != "silu":
        words.append("hidden_act")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        words.append("sliding_window")
    return words + [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]


def write_random_model(config, rng, folder):
    """Save a model of this configuration with random weights, as transformers does."""
    torch.manual_seed(rng.randrange(2**31))
    theirs = AutoModelForCausalLM.from_config(config)
    for name, p in theirs.named_parameters():
        p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.3 * torch.randn(p.shape))
    shard = rng.choice(["5GB", "20KB"])
    theirs.to(rng.choice(DTYPES)).save_pretrained(folder, max_shard_size=shard)


def rewrite_config(folder, rng):
    """Write config.json as transformers 4 did, or leave keys out. Half of the files stay as is."""
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text())
    if rng.random() < 0.3:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if rng.random() < 0.3:
        for key in ("rms_norm_eps", "max_position_embeddings", "hidden_act", "sliding_window",
                    "rope_theta"):
            if rng.random() < 0.4:
                raw.pop(key, None)
    path.write_text(json.dumps(raw))


def case(seed):
    """What became of one case: (outcome, relative error or message)."""
    rng = random.Random(seed)
    config = draw_config(rng)
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        try:
            write_random_model(config, rng, folder)
        except (ZeroDivisionError, RuntimeError) as e:      # in its dynamic and yarn RoPE
            if not unsupported(config):
                return "finding", f"transformers: {e}"
            return "not written", None
        rewrite_config(folder, rng)
        config = AutoConfig.from_pretrained(folder)
        words = unsupported(config)
        try:
            checkpoint.check(folder)
        except model.UserError as e:
            named = any(word in str(e) for word in words)
            return ("refused", words[0]) if named else ("finding", f"refused: {e}")
        if words:
            return "finding", f"not refused: {words}"
        T = rng.randrange(1, 1 + min(48, config.max_position_embeddings))
        tokens = torch.randint(config.vocab_size, (rng.randrange(1, 3), T))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        llama = model.load(folder, torch.float32)
    caches = lorc.new_caches(llama, "full", T, B=len(tokens))
    ours, want = llama(tokens, caches), theirs(tokens).logits
    error = ((ours - want).norm() / want.norm()).item()
    return ("equal", error) if error < TOLERANCE else ("finding", f"relative error {error:.1e}")


def run_cases(first, cases):
    """Run as many cases as give this number of checkpoints. Returns the result as a dict."""
    start, counts, refused = time.perf_counter(), collections.Counter(), collections.Counter()
    findings, largest, seed = {}, 0.0, first - 1
    while sum(counts.values()) - counts["not written"] < cases:
        seed += 1
        outcome, detail = case(seed)
        counts[outcome] += 1
        if outcome == "equal":
            largest = max(largest, detail)
        elif outcome == "refused":
            refused[detail] += 1
        elif outcome == "finding":
            findings[seed] = detail
            print(f"seed {seed}: {detail}", flush=True)
    return {"first": first, "cases": cases, **counts, "largest_relative_error": largest,
            "refused_for": dict(refused), "findings": findings,
            "seconds": round(time.perf_counter() - start, 1)}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--cases", type=int, default=2000)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    result = run_cases(args.first, args.cases)
    print(json.dumps(result, indent=1))
    if args.out:
        import transformers
        from record import provenance, write
        versions = {"transformers": transformers.__version__}
        write(args.out, provenance("cpu", args.commit) | versions | result)


if __name__ == "__main__":
    main()
