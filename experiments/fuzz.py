"""Checkpoints are untrusted: a small valid one is mutated, and whatever comes of it is run.

    python experiments/fuzz.py [--first SEED] [--cases N] [--out FILE]

A case is its seed. One or two of the checkpoint's files are changed: a node of the JSON (config, index,
tokenizer files, the header of the weights), or bytes, or numbers of a tensor. Then lorc.py runs on the
folder. It must end within 5 seconds of CPU time, with memory of at most 4 times the folder (64 MiB at least: the
folder has 0.1), and either with status 0 and finite numbers, or with status 2 and one line. All else is
a finding: its seed and what happened are printed.
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
import lorc
from runtime import cli as command
from runtime import testing

SLACK, SECONDS = 2**26, 5
ODD = [0, -1, 1, 2, 3, 7, 16, 17, 61, 62, 10**6, 2**31 - 1, 2**31, 2**63, 10**30, -2**63, 0.5, -0.0, 1e-30, 1e29, 1e308,
       float("nan"), float("inf"), None, True, False, "", "x", "2", "w1", "\0", "\ud800", "../x", "/etc/passwd", ".",
       "config.json", "F64", "F16", "I8", "BF16", "yarn", "linear", "llama3", [], {}, [1], [[]], {"a": 1}, [0, 2**63],
       "(a+)+$", "{{", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "\udcff" * 3]
KEYS = {"config.json": ["head_dim", "rope_scaling", "rope_parameters", "hidden_act", "quantization_config", "eos_token_id",
                        "sliding_window", "partial_rotary_factor", "attention_bias", "tie_word_embeddings", "rope_theta"],
        "tokenizer_config.json": ["bos_token", "eos_token", "add_bos_token", "chat_template", "eos_token_id"]}


def tokenizer_bpe():
    """A byte-pair tokenizer of few words with all its parts, as a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    letters = [*"w0123456789", "\u0120"]
    vocab = {t: i for i, t in enumerate([*letters, "w1", "w2", "\u0120w", "<s>", "</s>"])}
    t = Tokenizer(models.BPE(vocab, [("w", "1"), ("w", "2"), ("\u0120", "w")], unk_token="<s>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])
    split = pre_tokenizers.Split(__import__("tokenizers").Regex(r" ?\w+|\s+"), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    t.add_special_tokens(["<s>", "</s>"])
    return t.to_str()


def bases():
    """Valid checkpoints, each a dict of file name -> bytes: one file or shards, float32 or bfloat16."""
    found = []
    rope = {"rope_scaling": testing.LLAMA3}
    for shards, dtype, change in ((1, torch.float32, {}), (2, torch.bfloat16, {"tie_word_embeddings": True}),
                                  (1, torch.bfloat16, rope | {"head_dim": 8})):
        with tempfile.TemporaryDirectory() as d:
            folder = testing.write_checkpoint(Path(d), testing.RAW | change, shards=shards, dtype=dtype)
            files = {f.name: f.read_bytes() for f in folder.iterdir()}
        files["tokenizer_config.json"] = b'{"bos_token": "w1", "eos_token": {"content": "w2"}, "add_bos_token": true}'
        files["generation_config.json"] = b'{"eos_token_id": [2, 3]}'
        if dtype == torch.bfloat16:
            files["tokenizer.json"] = tokenizer_bpe().encode()
        found.append(files)
    return found


def nodes(value):
    """Every (container, key) of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, x in list(pairs):
        yield value, key
        yield from nodes(x)


def mutate_json(value, rng, keys=()):
    """The JSON value, changed in place in one to three of its nodes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if keys and rng.random() < 0.3:
            value[rng.choice(keys)] = copy.deepcopy(rng.choice(ODD))
            continue
        if not (found := list(nodes(value))):
            return value
        where, key = rng.choice(found)
        other, its = rng.choice(found)
        act = rng.randrange(8)
        if act < 4:
            where[key] = copy.deepcopy(rng.choice(ODD))
        elif act == 4:
            where[key] = copy.deepcopy(other[its])
        elif act == 5:
            del where[key]
        elif act == 6 and type(where[key]) in (int, float):
            where[key] *= rng.choice((-1, 2, 0.5, 10, 1000, 10**9))
        elif isinstance(where, dict):
            where[str(rng.choice(ODD))] = where.pop(key)
    return value


def mutate_bytes(data, rng):
    """Bytes flipped, cut, repeated, or replaced as a whole."""
    act, at = rng.randrange(6), rng.randrange(len(data))
    if act < 2:
        data = bytearray(data)
        for _ in range(rng.choice((1, 2, 8, 64))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 34, 44, rng.randrange(256)))
        return bytes(data)
    if act == 2:
        return data[:at]
    if act == 3:
        return data[:at] + data[rng.randrange(len(data)):]
    if act == 4:
        return data[:at] + rng.choice((b"\0", b"\xff", b'"', b"{", b"9" * 5000, b"[" * 200_000)) + data[at:]
    return rng.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b'"x"', b"[" * 200_000, b'{"a":' * 100_000, b"0" * 9999))


def mutate_weights(data, rng):
    """The header of a safetensors file as JSON, its length, or numbers of the tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    head, body = data[8:8 + size], data[8 + size:]
    act = rng.randrange(4)
    if act == 0:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**27, 2**40, 2**63, 2**64 - 1))) + head + body
    if act == 1:                                            # a stretch of one tensor: special or huge numbers
        body, at = bytearray(body), rng.randrange(len(body)) // 4 * 4
        word = np.array([rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e30, 1e-45, 0.0, 1e10))], np.float32).tobytes()
        stretch = min(rng.choice((4, 4, 128, 4096, len(body))), len(body) - at) // 4 * 4
        body[at:at + stretch] = word * (stretch // 4)
        return data[:8 + size] + bytes(body)
    if act == 2 and (text := head.decode()):                # a key twice
        first = text.index('"model')
        head = (text[:1] + text[first:text.index("}", first) + 1] + "," + text[1:]).encode()
    else:
        head = json.dumps(mutate_json(json.loads(head), rng)).encode()
    return struct.pack("<Q", len(head)) + head + body


def mutated(files, rng):
    """The checkpoint's files with one or two of them changed."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice([*files, *(["config.json"] * 4), *([n for n in files if "safetensors" in n])])
        data = files[name]
        try:
            if rng.random() < 0.2:
                files[name] = mutate_bytes(data, rng)
            elif name.endswith(".safetensors"):
                files[name] = mutate_weights(data, rng)
            else:
                files[name] = json.dumps(mutate_json(json.loads(data), rng, KEYS.get(name, ()))).encode()
        except (ValueError, struct.error, IndexError, TypeError, RecursionError, AttributeError):
            pass                                            # what was changed before cannot be changed again
        if not files[name]:
            break
    return files


def resident(key):
    return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))


class Late(BaseException):
    """Neither an Exception nor an OSError: nothing may take it for a refusal."""


def late(signum, frame):
    raise Late


def not_a_number(word):
    raise AssertionError(f"{word} in the report")


def case(seed, checkpoints, folder, change=mutated):
    """What became of one case: "ran", "refused", or what was wrong with it."""
    rng = random.Random(seed)
    files = change(rng.choice(checkpoints), rng)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    words = ["--model", str(folder), "--prompt", "w1 w2 w3", "--max-new-tokens", "3", "--json", "--cache",
             rng.choice(("full", "compressed", "bibranch"))] + ["--chat"] * (rng.random() < 0.01)
    out, err, before, start = io.StringIO(), io.StringIO(), resident("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)      # the machine may be busy with other things
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command.main(words)
        if (spent := time.process_time() - start) > SECONDS:
            return f"time: {spent:.1f} s"
        extra = resident("VmHWM") - before
        if extra > max(SLACK, 4 * sum(map(len, files.values()))):
            return f"memory: {extra >> 20} MiB"
        if status == 0:
            json.loads(out.getvalue(), parse_constant=not_a_number)
            return "ran"
        line = err.getvalue()
        good = status == 2 and not out.getvalue() and line.startswith("lorc: ") and line.count("\n") == 1
        return "refused" if good else f"status {status}: {line[-300:]!r}"
    except BaseException as e:                              # a Rust panic is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        return f"{type(e).__name__}: {e!s:.300}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(first, cases):
    """Counts of outcomes, and {seed: what happened} of the findings."""
    signal.signal(signal.SIGALRM, late)
    counts, findings, checkpoints = collections.Counter(), {}, bases()
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as d:
        for seed in range(8):                               # untouched: they run, and libraries are loaded
            what = case(seed, checkpoints, Path(d) / "model", lambda files, rng: files)
            assert what == "ran" or seed == 0, what
        for seed in range(first, first + cases):
            what = case(seed, checkpoints, Path(d) / "model")
            counts[what if what in ("ran", "refused") else "finding"] += 1
            if what not in ("ran", "refused"):
                findings[seed] = what
                print(f"seed {seed}: {what}", flush=True)
    return counts, findings


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--cases", type=int, default=20_000)
    p.add_argument("--out")
    p.add_argument("--commit")
    args = p.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + 2**33, -1))
    start = time.perf_counter()
    counts, findings = fuzz(args.first, args.cases)
    result = {"first": args.first, "cases": args.cases, **counts, "seconds": round(time.perf_counter() - start, 1),
              "findings": findings}
    print(json.dumps(result, indent=1))
    if args.out:
        from record import provenance, write
        write(args.out, provenance("cpu", args.commit) | result)


if __name__ == "__main__":
    main()
