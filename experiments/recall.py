"""Recall: LongEval's line retrieval, CSKV's own measure, as a text that the model completes.

A record is a list of lines "line torpid-kid: REGISTER_CONTENT is <2416>". After it comes the start
of one of its lines again, "line torpid-kid: REGISTER_CONTENT is <", and the model should continue
with that line's number. The lines are those of LongEval (published with LongChat). Its prompts have
200 lines, which is too much for a small model; the records here have 5 to 40. Measured over RECORDS
records, each with its standard error:

    exact         fraction of records in which greedy decoding gives the number and the bracket
    nats          mean of -ln p per token (a digit) of the right number
    nats_above    the same minus the full cache's, record by record
    rank          rank of the right number among all numbers of the record by likelihood; 1 is best
    first         fraction of records in which that rank is 1

The prompt is read and stored as in a token-by-token run (`simulate_decoding`). Each number of the
record is then fed token by token to a copy of the caches. The second part repeats exact and nats
for several window sizes, as in CSKV's Table 3: at 80 % saved, that table reports an accuracy of .77
with a window of 2, .92 with 32 and .96 with 4,096.

Verdict, on SmolLM2: with the loss metric at 0.4 kept, the exact matches are those of the full
cache, within two standard errors. At 0.2 kept the calibration text decides: with WikiText-2 about
half of them are left in records of 10 and more lines, with the bundled text, which contains
records, 83 to 97 % in 16 bits. Quantization alone in 2 bits loses almost all in such records. Nats
alone mislead: at 0.4 the calibrated basis has the full cache's nats on 20 lines, and 0.6 times its
exact matches.

    python experiments/recall.py --model PATH --text FILE --calibrate OTHER_FILE --data DIR

DIR/longeval/200_lines.jsonl is LongEval's file. --text is not read by this script.
"""
import copy
import json
import random
import re
import statistics
import sys

import torch

import study as shared
from cache import BiBranchCache, Latents, QuantizedLatents
from study import model

NEEDS_DATA = True
RECORDS = 200
LINES = (5, 10, 20, 40)
RANKED = 10                   # the rank is measured in records of at most so many lines
WINDOWS = (2, 8, 32, 128, 256)
WINDOW_LINES, WINDOW_KEPT = 20, 0.2
TOKENS = {"cuda": 2**16, "cpu": 2**12}    # of prompts that are read at a time
SEQUENCES = 2**10             # numbers that are fed at a time
PICTURED = {("full", 1.0, None), ("calibrated", 0.2, 16), ("loss metric", 0.2, 16),
            ("loss metric, bundled text", 0.2, 16), ("quantization alone", 1.0, 3)}
LINE = "line {}: REGISTER_CONTENT is <{}>\n"


def settings():
    """The compressed caches, as (label, keyword arguments of `caches_for`)."""
    yield "LoRC, uniform", {"kept": 0.6, "basis": "svd", "kind": "compressed"}
    for kept in (0.4, 0.2):
        yield "calibrated", {"kept": kept, "basis": "whitened", "bits": 16}
        for label, basis in (("loss metric", "loss, sorted"),
                             ("loss metric, bundled text", "loss, bundled text")):
            for bits in (16, 4):
                yield label, {"kept": kept, "basis": basis, "bits": bits}
    for bits in (4, 3, 2):
        yield "quantization alone", {"kept": 1.0, "basis": "identity", "bits": bits}


# Records -----------------------------------------------------------------------------------------

def read_lines(path):
    """All different lines of LongEval's file, as (name, number), and the text before a record."""
    lines, intro = {}, None
    for item in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        intro = intro or item["prompt"].partition("record start:")[0] + "record start:\n\n"
        for name, number in re.findall(r"line (\S+): REGISTER_CONTENT is <(\d+)>", item["prompt"]):
            lines.setdefault(name, number)
    return list(lines.items()), intro


def make_records(lines, n, count, seed=0):
    """`count` records of n lines that share no line: (lines, index of the line that is asked)."""
    if len(lines) < n * count:
        raise model.UserError(f"{count} records of {n} lines need {n * count} lines; the file has "
                              f"{len(lines)}")
    generator = random.Random(seed)
    lines = generator.sample(lines, n * count)
    return [(lines[i * n:(i + 1) * n], generator.randrange(n)) for i in range(count)]


def encode_records(tokenizer, intro, records):
    """Prompts of equal length (R, T), and the numbers of each record, the right one first.

    Prompts are cut on the left, within the intro, to the length of the shortest. A number is a list
    of tokens, the closing bracket included.
    """
    prompts, numbers = [], []
    for lines, asked in records:
        name, right = lines[asked]
        text = "".join(LINE.format(*line) for line in lines)
        prompts.append(tokenizer.encode(f"{intro}{text}" + LINE.format(name, "").split(">")[0]))
        others = [number for i, (_, number) in enumerate(lines) if i != asked]
        numbers.append([tokenizer.encode(number + ">", special=False)
                        for number in (right, *others)])
    T = min(map(len, prompts))
    return torch.tensor([prompt[-T:] for prompt in prompts]), numbers


# Reading and continuing --------------------------------------------------------------------------

class StoringCache:
    """Reads a prompt in one call as a token-by-token run would, and stores it as that run would."""

    def __init__(self, cache):
        self.cache, self.capacity = cache, cache.capacity

    def attend(self, q, k, v, rope):
        o = self.cache.attend(q, k, v, rope)
        self.cache.append(k, v, rope)
        self.cache.simulate_decoding = False
        return o


def repeated(stored, n):
    """A copy of a cache, or of a store of latents, with each of its sequences n times."""
    new = copy.copy(stored)
    for name, x in vars(stored).items():
        if isinstance(x, torch.Tensor):
            setattr(new, name, x.repeat_interleave(n, 0))
        elif isinstance(x, (Latents, QuantizedLatents)):
            setattr(new, name, repeated(x, n))
    if hasattr(new, "B"):
        new.B = n * stored.B
    return new


def continuations(llama, prompts, numbers, caches):
    """ln p of each token of each number after its prompt, and whether that token is the likeliest.

    prompts (R, T); numbers (R, n, L), padded with zeros; empty caches for R sequences. Returns two
    tensors (R, n, L).
    """
    R, n, L = numbers.shape
    wrapped = [StoringCache(cache) if isinstance(cache, BiBranchCache) else cache
               for cache in caches]
    logits = llama.head(llama.hidden(prompts, wrapped)[:, -1]).repeat_interleave(n, 0)
    caches, tokens = [repeated(cache, n) for cache in caches], numbers.flatten(0, 1)
    nats, likeliest = [], []
    for i in range(L):
        new = tokens[:, i:i + 1]
        nats.append(logits.log_softmax(-1).gather(1, new))
        likeliest.append(logits.argmax(-1, keepdim=True) == new)
        if i + 1 < L:
            logits = llama(new, caches)[:, 0]
    return [torch.cat(x, 1).view(R, n, L) for x in (nats, likeliest)]


def padded(numbers):
    """Lists of tokens, n for each record, as (R, n, L) with zeros, and a mask of the tokens."""
    L = max(len(tokens) for record in numbers for tokens in record)
    x = torch.tensor([[tokens + [0] * (L - len(tokens)) for tokens in record]
                      for record in numbers])
    size = torch.tensor([[len(tokens) for tokens in record] for record in numbers])
    return x, torch.arange(L) < size[..., None]


@torch.no_grad()
def measure_records(llama, prompts, numbers, make):
    """One dict a record: exact, nats, rank. make(capacity, B): empty caches."""
    found, device = [], llama.embed.weight.device
    x, real = padded(numbers)
    at_once = max(1, min(TOKENS[device.type] // prompts.shape[1], SEQUENCES // x.shape[1]))
    for part, y, mask in zip(*(t.split(at_once) for t in (prompts, x, real))):
        caches = make(part.shape[1] + y.shape[2], len(part))
        nats, likeliest = (t.cpu() for t in continuations(llama, part.to(device), y.to(device),
                                                          caches))
        total = (nats * mask).double().sum(-1)                               # (R, n)
        for i in range(len(part)):
            digits = int(mask[i, 0].sum()) - 1                               # without the bracket
            found.append({"exact": float((likeliest[i, 0] | ~mask[i, 0]).all()),
                          "nats": -nats[i, 0, :digits].double().mean().item(),
                          "rank": 1 + int((total[i] > total[i, 0]).sum())})
    return found


# Measuring ---------------------------------------------------------------------------------------

def caches_for(study, kept, basis, kind="bibranch", bits=16, window=32):
    """A function of (capacity, B) that makes empty caches. Bases are those for a window of 32."""
    options = {"bits": max(4, bits), "window": window} if kind == "bibranch" else {}
    bases = study.compressed(kept, basis)[1]
    return lambda capacity, B: study.caches(kind, bases, capacity, B, **options)


def summary(found, full):
    """Means and standard errors over records. full: the full cache's records."""
    columns = {"exact": [r["exact"] for r in found], "nats": [r["nats"] for r in found],
               "nats_above": [r["nats"] - f["nats"] for r, f in zip(found, full)],
               "rank": [r["rank"] for r in found], "first": [float(r["rank"] == 1) for r in found]}
    row = {"records": len(found)}
    for name, xs in columns.items():
        row[name] = round(statistics.fmean(xs), 5)
        row[name + "_se"] = round(statistics.stdev(xs) / len(xs) ** 0.5, 5)
    return row


def compare(study, lines, settings, ranked):
    """Rows for the full cache and `settings` on RECORDS records of `lines` lines."""
    every, intro = read_lines(study.args.data / "longeval" / "200_lines.jsonl")
    prompts, numbers = encode_records(study.tokenizer, intro, make_records(every, lines, RECORDS))
    if not ranked:
        numbers = [record[:1] for record in numbers]
    rows, full = [], None
    for label, setting in [("full", {"kept": 1.0, "basis": "svd", "kind": "full"}), *settings]:
        with shared.rounded_to(setting.get("bits", 16)):
            found = measure_records(study.llama, prompts, numbers,
                                    caches_for(study, **setting))
        full = full or found
        row = {"label": label, "lines": lines, "tokens": prompts.shape[1]} | setting
        row |= {"cache": row.pop("kind", "bibranch")} | summary(found, full)
        if not ranked:
            row = {key: x for key, x in row.items() if not key.startswith(("rank", "first"))}
        rows.append(row)
        study.say(f"{label:20s} {setting}  exact {row['exact']:.3f}  nats {row['nats']:.4f}")
    return rows


def measure(study):
    rows = []
    for lines in LINES:
        rows += compare(study, lines, list(settings()), lines <= RANKED)
    windows = [(label, {"kept": WINDOW_KEPT, "basis": basis, "window": window})
               for label, basis in (("calibrated", "whitened"), ("loss metric", "loss, sorted"))
               for window in WINDOWS]
    return rows + [row | {"part": "windows"}
                   for row in compare(study, WINDOW_LINES, windows, False)]


# Table and picture -------------------------------------------------------------------------------

def name_of(row):
    """What a table says about a row's cache."""
    if row["cache"] == "full":
        return "full cache"
    bits = f", {row['bits']} bits" if "bits" in row else ""
    return row["label"] + (f", {row['kept']:g} kept" if row["kept"] < 1 else "") + bits


def plot(found):
    for name, result in found.items():
        yield f"recall-{name}", table([row for row in result["rows"] if "part" not in row])
        if windows := [row for row in result["rows"] if "part" in row]:
            yield f"recall-window-{name}", window_table(windows)
    yield "recall", picture(list(found.values())[-1])


def with_error(row, key, digits="{:.3f}"):
    """A number with its standard error, or a dash where it was not measured."""
    if row is None or key not in row:
        return "–"
    error = f" ± {row[key + '_se']:.3f}" if key + "_se" in row else ""
    return digits.format(row[key]) + error


def table(rows):
    """One line a cache: exact matches, nats, and nats above the full cache's, for each number of
    lines; and the rank in the longest records where it was measured."""
    lines = sorted({row["lines"] for row in rows})
    ranked = [row["lines"] for row in rows if "rank" in row]
    header = ["cache", *(f"exact, {n} lines" for n in lines),
              *(f"nats per digit, {n} lines" for n in lines),
              *(f"above full, {n} lines" for n in lines)]
    if ranked:
        header.append(f"mean rank among {max(ranked)}")
    out = []
    for name in dict.fromkeys(map(name_of, rows)):
        of = {row["lines"]: row for row in rows if name_of(row) == name}
        cells = [with_error(of.get(n), key, digits) for key, digits in (
            ("exact", "{:.3f}"), ("nats", "{:.3f}"), ("nats_above", "{:+.3f}")) for n in lines]
        out.append([name, *cells, *([with_error(of.get(max(ranked)), "rank")] if ranked else [])])
    return shared.markdown(header, out)


def window_table(rows):
    """One line a window; the full cache first."""
    return shared.markdown(
        ["cache", "window", "exact", "nats per digit"],
        [[row["label"], row.get("window", "–"), f"{row['exact']:.3f} ± {row['exact_se']:.3f}",
          f"{row['nats']:.3f} ± {row['nats_se']:.3f}"] for row in rows])


def picture(result):
    """Exact matches against the lines of a record, and against the window, if measured."""
    parts = [[row | {"label": name_of(row)} for row in result["rows"] if "part" not in row
              and (row["label"], row["kept"], row.get("bits")) in PICTURED],
             [row for row in result["rows"] if "window" in row]]
    n = 2 if parts[1] else 1
    fig, axes = shared.pyplot().subplots(1, n, figsize=(4.2 * n, 3.4), squeeze=False,
                                         layout="constrained")
    shared.lines(axes[0, 0], parts[0], "lines", "exact")
    axes[0, 0].set(xlabel="lines of a record", ylabel="exact matches", ylim=(0, 0.7))
    if parts[1]:
        ax = axes[0, 1]
        shared.lines(ax, parts[1], "window", "exact")
        full = next(row for row in result["rows"] if "part" in row and row["cache"] == "full")
        ax.axhline(full["exact"], color="0.6", linewidth=2.5, zorder=0, label="full cache")
        ax.set(xlabel=f"window (tokens), {WINDOW_KEPT:g} kept", xscale="log",
               ylim=(0, 0.7),
               ylabel=f"exact matches, {WINDOW_LINES} lines")
        shared.plain_numbers(ax.xaxis)
    for ax in axes.flat:
        ax.legend(loc="upper left")
    return fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
