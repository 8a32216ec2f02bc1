"""Checkpoints are untrusted: valid ones are mutated, and lorc.py runs on the result.

    python experiments/fuzz.py [--first SEED] [--cases N] [--out FILE]

A case is its seed. One or two files of a small checkpoint are mutated: nodes of the JSON files
(configuration, index, tokenizer, header of the weights or of saved bases), bytes, or numbers of a
tensor. Then lorc.py runs on the folder. It must end

    within 5 seconds of CPU time,
    with at most 4 times the memory of the folder, or 64 MiB (the folder has about 0.1 MiB),
    with status 0 and finite numbers, or with status 2, no output and one line of error.

Anything else is a finding, which is printed with its seed.
"""
import argparse
import collections
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lorc                                                                 # noqa: E402
import model                                                                # noqa: E402
from runtime import cli as command, saved_bases, testing                    # noqa: E402

MEMORY, SECONDS = 2**26, 5
SLOW_TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ODD = [0, -1, 1, 2, 3, 7, 16, 17, 61, 62, 10**6, 2**31 - 1, 2**31, 2**63, 10**30, -2**63, 0.5, -0.0,
       1e-30, 1e29, 1e308, float("nan"), float("inf"), None, True, False, "", "x", "2", "w1", "\0",
       "\ud800", "../x", "/etc/passwd", ".", "config.json", "F64", "F16", "I8", "BF16", "C64",
       "yarn", "linear", "llama3", [], {}, [1], [[]], {"a": 1}, [0, 2**63], "(a+)+$", "{{",
       SLOW_TEMPLATE, "\udcff" * 3]
KEYS = {"config.json": ["head_dim", "rope_scaling", "rope_parameters", "hidden_act",
                        "quantization_config", "eos_token_id", "sliding_window", "model_type",
                        "partial_rotary_factor", "attention_bias", "tie_word_embeddings",
                        "rope_theta", "original_max_position_embeddings"],
        "tokenizer_config.json": ["bos_token", "eos_token", "pad_token", "add_bos_token",
                                  "chat_template", "eos_token_id"]}


# The checkpoints that are mutated -----------------------------------------------------------------

def bpe_tokenizer():
    """tokenizer.json of a byte-level BPE with a normalizer, a post-processor and special tokens."""
    from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                            processors)
    letters = [*"w0123456789", "\u0120"]
    tokens = [*letters, "w1", "w2", "\u0120w", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("w", "1"), ("w", "2"), ("\u0120", "w")]
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<s>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\w+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    t.add_special_tokens(["<s>", "</s>"])
    return t.to_str()


def valid_checkpoints():
    """Valid checkpoints with saved bases, each a dict from file name to content."""
    kinds = [(1, torch.float32, {}),
             (2, torch.bfloat16, {"tie_word_embeddings": True}),
             (1, torch.bfloat16, {"head_dim": 8, "rope_scaling": testing.LLAMA3})]
    found = []
    for shards, dtype, change in kinds:
        with tempfile.TemporaryDirectory() as d:
            folder = testing.write_checkpoint(Path(d), testing.RAW | change, shards=shards,
                                                dtype=dtype)
            llama = model.load(folder, torch.float32)
            with torch.inference_mode():
                saved_bases.save_bases(folder, llama, *lorc.compress(llama, kept=0.7))
            files = {f.name: f.read_bytes() for f in folder.iterdir()}
        files["tokenizer_config.json"] = json.dumps({
            "bos_token": "w1", "eos_token": {"content": "w2"}, "add_bos_token": True,
            "chat_template": "{{ bos_token }} {{ messages[0]['content'] }}"}).encode()
        files["generation_config.json"] = b'{"eos_token_id": [2, 3]}'
        if dtype == torch.bfloat16:
            files["tokenizer.json"] = bpe_tokenizer().encode()
        found.append(files)
    return found


# Mutations ---------------------------------------------------------------------------------------

def nodes(value):
    """Every (container, key) of a JSON value."""
    pairs = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, x in pairs:
        yield value, key
        yield from nodes(x)


def mutate_node(where, key, found, rng):
    """Replace, copy, delete, scale or rename one node of a JSON value, in place."""
    action = rng.randrange(8)
    if action < 4:
        where[key] = copy.deepcopy(rng.choice(ODD))
    elif action == 4:
        other, its_key = rng.choice(found)
        where[key] = copy.deepcopy(other[its_key])
    elif action == 5:
        del where[key]
    elif action == 6 and type(where[key]) in (int, float):
        where[key] *= rng.choice((-1, 2, 0.5, 10, 1000, 10**9))
    elif isinstance(where, dict):
        where[str(rng.choice(ODD))] = where.pop(key)


def mutate_json(value, rng, keys=()):
    """The JSON value, changed in place in one to three nodes; `keys` may be added."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(nodes(value))
        if keys and rng.random() < 0.3:
            value[rng.choice(keys)] = copy.deepcopy(rng.choice(ODD))
        elif found:
            mutate_node(*rng.choice(found), found, rng)
    return value


def mutate_bytes(data, rng):
    """Bytes changed, cut off, cut out, inserted, or replaced as a whole."""
    action, at = rng.randrange(6), rng.randrange(len(data))
    if action < 2:
        data = bytearray(data)
        for _ in range(rng.choice((1, 2, 8, 64))):
            byte = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 34, 44, rng.randrange(256)))
            data[rng.randrange(len(data))] = byte
        return bytes(data)
    if action == 2:
        return data[:at]
    if action == 3:
        return data[:at] + data[rng.randrange(len(data)):]
    if action == 4:
        inserted = (b"\0", b"\xff", b'"', b"{", b"9" * 5000, b"[" * 200_000)
        return data[:at] + rng.choice(inserted) + data[at:]
    return rng.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b'"x"', b"[" * 200_000,
                       b'{"a":' * 100_000, b"0" * 9999))


def mutate_tensors(data, rng):
    """A safetensors file with a wrong length, special numbers, a name that occurs twice, or another
    header."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    action = rng.randrange(4)
    if action == 0:
        size = rng.choice((0, 1, size - 1, size + 1, 2**27, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", size) + header + body
    if action == 1:
        return data[:8 + size] + mutate_numbers(body, rng)
    if action == 2 and header:
        text = header.decode()
        first = text.index('"model')
        header = (text[:1] + text[first:text.index("}", first) + 1] + "," + text[1:]).encode()
    else:
        header = json.dumps(mutate_json(json.loads(header), rng)).encode()
    return struct.pack("<Q", len(header)) + header + body


def mutate_numbers(body, rng):
    """A stretch of the tensors overwritten with one special or huge number."""
    body, at = bytearray(body), rng.randrange(len(body)) // 4 * 4
    number = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e30, 1e-45, 0.0, 1e10))
    length = min(rng.choice((4, 4, 128, 4096, len(body))), len(body) - at) // 4
    body[at:at + 4 * length] = np.array([number], np.float32).tobytes() * length
    return bytes(body)


def mutate_file(name, data, rng):
    """The content of one file, mutated."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    if name.endswith(".safetensors"):
        return mutate_tensors(data, rng)
    return json.dumps(mutate_json(json.loads(data), rng, KEYS.get(name, ()))).encode()


def mutate_checkpoint(files, rng):
    """The checkpoint's files with one or two of them mutated."""
    files = dict(files)
    likely = 4 * ["config.json"] + [name for name in files if "safetensors" in name]
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice([*files, *likely])
        with contextlib.suppress(ValueError, struct.error, IndexError, TypeError, RecursionError,
                                 AttributeError):             # after a first mutation it may fail
            files[name] = mutate_file(name, files[name], rng)
        if not files[name]:
            break
    return files


# Running a case ----------------------------------------------------------------------------------

class OutOfTime(BaseException):
    """Neither an Exception nor an OSError, so that nothing can take it for a refusal."""


def out_of_time(signum, frame):
    raise OutOfTime


def memory(key):
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at most, VmSize reserved."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024


def refuse_constant(word):
    """For json.loads: NaN and Infinity are no JSON."""
    raise AssertionError(f"{word} in the report")


def flags(folder, rng):
    """The command line of a case."""
    words = ["--model", str(folder), "--prompt", "w1 w2 w3", "--max-new-tokens", "3", "--json"]
    cache = rng.choice(("full", "compressed", "bibranch"))
    if cache != "full" and rng.random() < 0.3:
        words += ["--bases", str(folder)]
    if rng.random() < 0.01:                                   # starts a process
        words.append("--chat")
    return [*words, "--cache", cache]


def run(words, limit):
    """Run lorc.py in this process. Returns "ran", "refused", or what was wrong."""
    out, err = io.StringIO(), io.StringIO()
    before, start = memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")                             # resets VmHWM
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command.main(words)
    seconds, extra = time.process_time() - start, memory("VmHWM") - before
    if seconds > SECONDS:
        return f"time: {seconds:.1f} s"
    if extra > limit:
        return f"memory: {extra >> 20} MiB"
    if status == 0:
        json.loads(out.getvalue(), parse_constant=refuse_constant)
        return "ran"
    line = err.getvalue()
    if status == 2 and not out.getvalue() and line.startswith("lorc: ") and line.count("\n") == 1:
        return "refused"
    return f"status {status}: {line[-300:]!r}"


def case(seed, checkpoints, folder, change=mutate_checkpoint):
    """What became of one case: "ran", "refused", or what was wrong."""
    rng = random.Random(seed)
    files = change(rng.choice(checkpoints), rng)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)        # the machine may be busy
    try:
        return run(flags(folder, rng), max(MEMORY, 4 * sum(map(len, files.values()))))
    except KeyboardInterrupt:
        raise
    except BaseException as e:                                # a panic in Rust is not an Exception
        return f"{type(e).__name__}: {e!s:.300}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(first, cases):
    """Counts of outcomes, and {seed: what was wrong} of the findings."""
    signal.signal(signal.SIGALRM, out_of_time)
    counts, findings, checkpoints = collections.Counter(), {}, valid_checkpoints()
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as d:
        folder = Path(d) / "model"
        for seed in range(8):                                 # unchanged checkpoints run
            outcome = case(seed, checkpoints, folder, lambda files, rng: files)
            assert outcome == "ran" or seed == 0, outcome     # the first imports libraries
        for seed in range(first, first + cases):
            outcome = case(seed, checkpoints, folder)
            if outcome in ("ran", "refused"):
                counts[outcome] += 1
            else:
                counts["finding"] += 1
                findings[seed] = outcome
                print(f"seed {seed}: {outcome}", flush=True)
    return counts, findings


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--cases", type=int, default=20_000)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**33, -1))
    start = time.perf_counter()
    counts, findings = fuzz(args.first, args.cases)
    result = {"first": args.first, "cases": args.cases, **counts,
              "seconds": round(time.perf_counter() - start, 1), "findings": findings}
    print(json.dumps(result, indent=1))
    if args.out:
        from record import provenance, write
        write(args.out, provenance("cpu", args.commit) | result)


if __name__ == "__main__":
    main()
