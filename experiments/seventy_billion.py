"""LLaMA-3-70B's shape on two cards: a random checkpoint in safetensors shards, run by torchrun.

Writes the checkpoint, one shard per layer, in bfloat16: 141 GB with all 80 layers, or as many
layers as the disk has room for. Then torchrun starts `lorc.py --compare` on it with the prompt on
standard input: the full cache, latents of half the rank, and the same in 4 bits with a window. The
result holds each cache's bytes and each card's peak memory, weights included. Norm weights are 1,
all others Gaussian of variance 1 / columns, so that nothing overflows. The second command is a
miniature that needs no GPU:

    python experiments/seventy_billion.py [--layers 80] [--length 8192] [--folder DIR] [--out FILE]
    python experiments/seventy_billion.py --layers 4 --width 256 --vocab 4096 --length 400
"""
import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.text import Tokenizer
import model
from record import HERE, provenance, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = HERE.parent
FLAGS = ["--compare", "--kept", "0.5", "--schedule", "uniform", "--bits", "4"]


def raw_config(args, free):
    """config.json of LLaMA-3-70B, narrower if asked, with no more layers than `free` bytes hold."""
    layer, ends = 25.5 * args.width**2, 4 * args.vocab * args.width      # bytes in bfloat16
    fit = int((free - ends - 2**32) // layer)
    return {"model_type": "llama", "vocab_size": args.vocab, "hidden_size": args.width,
            "num_hidden_layers": min(args.layers, fit), "num_attention_heads": 64,
            "num_key_value_heads": 8, "intermediate_size": args.width * 7 // 2,
            "max_position_embeddings": args.length, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False}


def write_shard(path, shapes, seed):
    """Random tensors in one safetensors file: the header's length, the header, the numbers."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = torch.empty(sum(sizes), dtype=torch.bfloat16, device=DEVICE)
    draw, header, at = torch.Generator(DEVICE).manual_seed(seed), {}, 0
    for (name, shape), x in zip(shapes.items(), flat.split(sizes)):
        x.fill_(1) if len(shape) == 1 else x.normal_(0, shape[1] ** -0.5, generator=draw)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                # aligns the numbers
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.write(flat.cpu().view(torch.uint8).numpy())
    return at


def write_checkpoint(folder, raw):
    """A Hugging Face folder with tiny/'s tokenizer, four shards at a time. Returns its bytes."""
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / name, folder)
    with torch.device("meta"):
        parameters = model.Llama(model.read_config(folder)).named_parameters()
    shards = {}
    for name, p in parameters:
        of_layer = [part for part in name.split(".") if part.isdigit()]
        shard = "-".join(["model", *of_layer]) + ".safetensors"
        shards.setdefault(shard, {})[model.hf_name(name)] = tuple(p.shape)
    index = {name: shard for shard, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(write_shard, [folder / shard for shard in shards], shards.values(),
                            range(len(shards))))


def long_prompt(folder, n):
    """About n tokens of English."""
    tokenizer = Tokenizer(folder, model.read_config(folder))
    ids = tokenizer.encode((ROOT / "README.md").read_text() * (1 + n // 2000))
    return tokenizer.fast.decode(ids[:n])


def torchrun(args, folder):
    """lorc.py's JSON about the checkpoint, from args.processes processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(args.processes), str(ROOT / "lorc.py"), "--model", str(folder), "--prompt", "-",
               "--max-new-tokens", str(args.new), "--json", *FLAGS]
    done = subprocess.run(command, input=long_prompt(folder, args.length - args.new - 64),
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("lorc.py has failed")
    return {"flags": FLAGS} | json.loads(done.stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 80, "width": 8192, "vocab": 128256, "length": 8192, "new": 32,
                          "processes": 2}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--folder", help="A folder with room for it. Default: a temporary folder.")
    p.add_argument("--out", default=HERE / "results" / "seventy_billion.json")
    p.add_argument("--commit")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        raw, start = raw_config(args, shutil.disk_usage(folder).free), time.perf_counter()
        print(f"writing {raw['num_hidden_layers']} of {args.layers} layers", flush=True)
        size = write_checkpoint(Path(folder), raw)
        result = provenance(DEVICE, args.commit) | {"processes": args.processes, "config": raw}
        result |= {"weights_bytes": size, "write_seconds": time.perf_counter() - start}
        print(f"wrote {size / 1e9:.1f} GB in {result['write_seconds']:.1f} s", flush=True)
        found = torchrun(args, Path(folder))
    del found["plan"], found["model"]
    for one in found["compare"]:
        del one["text"]                                  # random weights give a random text
    write(args.out, result | found)


if __name__ == "__main__":
    main()
