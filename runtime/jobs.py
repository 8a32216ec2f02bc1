"""One command: open the model, read what is asked, run it under each cache, report."""
import itertools
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

import lorc
import model
from model import UserError
from runtime import checkpoint, distributed, fast, saved_bases
from runtime.commuting import key_basis
from runtime.report import report
from runtime.scoring import negative_log_likelihood
from runtime.text import Stream, Tokenizer


def read_text(path):
    """A text file, or standard input for -; a line ends with one newline, also where it had CR LF.

    Raises UserError when there is no text in it.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" and sys.stdin else Path(path).read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n")
    except OSError as e:
        raise UserError(f"{name}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise UserError(f"{name} holds no text")
    return text


def finite(x, dtype=None):
    """x itself. Raises UserError when the model has overflowed its dtype, x's own by default."""
    if not torch.isfinite(x).all():
        raise UserError(f"the model overflows in {str(dtype or x.dtype)[6:]}; give another --dtype")
    return x


@contextmanager
def measuring(llama, bases):
    """Collect ||k - k~|| / ||k|| and ||v - v~|| / ||v|| of each layer over all tokens seen."""
    sums = torch.zeros(len(llama.layers), 2, 2, dtype=torch.float64)

    def add(layer, which, x, k):
        if bases[layer]:
            pair = bases[layer]["kv".index(which)]
            err = k - F.linear(F.linear(k, pair.down), pair.up)
            squares = torch.stack([x.double().square().sum() for x in (err, k)])
            sums[layer, "kv".index(which)] += squares.cpu()
    errors = []
    with lorc.observe_projections(llama, add):
        yield errors
    finite(sums, llama.norm.weight.dtype)
    errors += (sums[..., 0] / sums[..., 1].clamp(min=1e-30)).sqrt().tolist()


def open_model(args):
    """The model and its tokenizer, on the device and in the dtype asked for. Raises UserError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if distributed.rank_and_world_size()[1] > 1 and args.compile:
        raise UserError("--compile is for one process; leave it out under torchrun")
    if distributed.rank_and_world_size()[1] > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UserError(f"--device {device} is one card, and torchrun gives each process "
                                  "its own; write --device cuda")
        device += f":{os.environ['LOCAL_RANK']}"
    name = args.dtype or ("float32" if device.startswith("cpu") else None)
    dtype = name and getattr(torch, name)
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        trial = torch.ones(1, 1, dtype=dtype, device=device)
        (trial @ trial).item()
    except Exception:                                  # every backend has its own way to say no
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {device} cannot be used{f' with {name}' if name else ''}; "
                              f"here: {', '.join(here)}") from None
    folder = checkpoint.find_model(args.model)
    checkpoint.check(folder)
    llama = distributed.load(folder, dtype, device)
    checkpoint.check_numbers(llama)
    return llama, Tokenizer(folder, llama.config)


def read_prompt(args, llama, tokenizer, prompt):
    """Token ids of one --prompt. Raises UserError when it is empty or past the context."""
    prompt = read_text("-") if prompt == "-" else prompt
    ids = tokenizer.chat(prompt) if args.chat else tokenizer.encode(prompt)
    limit = llama.config.context
    if not tokenizer.fast.decode(ids).strip():
        raise UserError("the prompt is empty or holds only special tokens; give some text")
    if len(ids) > limit:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; "
                              "shorten it")
    return ids


def read_score(args, llama, tokenizer):
    """Token ids of the --perplexity text. Raises UserError when it cannot be scored as asked."""
    if args.context > llama.config.context:
        raise UserError(f"--context {args.context} is beyond the model's "
                              f"{llama.config.context} positions")
    tokens = tokenizer.encode(read_text(args.perplexity))[:args.max_tokens]
    if min(len(tokens), args.context) < 2:
        raise UserError(f"{args.perplexity} is too short to score, or the context is")
    return tokens


def read_jobs(args, llama, tokenizer):
    """Token ids of each --prompt, or of the --perplexity text."""
    if args.perplexity is not None:
        return [read_score(args, llama, tokenizer)]
    return [read_prompt(args, llama, tokenizer, p) for p in args.prompt or []]


def choose_bases(args, llama, tokenizer):
    """Plan and bases as the flags ask: loaded, or Alg. 1 with the C of --basis."""
    if args.bases is not None:
        return saved_bases.load_bases(args.bases, llama)
    d_max, moments = llama.config.kv_width, None
    if args.skip >= llama.config.layers:
        raise UserError(f"--skip {args.skip} leaves none of the model's "
                              f"{llama.config.layers} layers to compress")
    if args.d_min and args.d_min > d_max:
        raise UserError(f"--d-min {args.d_min} is above the KV width G*d = {d_max}")
    if args.basis == "norm":
        moments = lorc.norm_moments(llama)
    if args.calibrate is not None:
        tokens = distributed.run_on_rank_0(lambda: tokenizer.encode(read_text(args.calibrate)))
        context = min(1024, llama.config.context)
        usable = sum(max(0, min(context, len(tokens) - i) - args.sinks)
                     for i in range(0, min(len(tokens), 32 * context), context))
        if usable < d_max:
            raise UserError(f"{args.calibrate} gives {usable} tokens after the sinks of each "
                                  f"window; calibrating needs {d_max}, and gains from 30,000")
        tokens = torch.tensor(tokens, device=llama.norm.weight.device)
        moments = lorc.calibrated_moments(llama, tokens, args.basis, args.sinks, context)
        moments = [finite(C, llama.norm.weight.dtype) for C in moments]
    commuting = key_basis if args.basis == "commuting" else None
    plan = lorc.make_plan(distributed.gather(lorc.log_kappas(llama)), d_max, args.kept, args.d_min,
                          args.threshold, args.schedule, args.skip, args.split, bool(commuting))
    own = distributed.local_layers(llama.config.layers)
    return plan, lorc.make_bases(llama, plan.ranks[own], moments, key_basis=commuting)


def held(llama, caches, kind, plan):
    """Bytes of the buffers held, of a full cache for as many tokens, and the plan's fraction."""
    peak = [torch.cuda.max_memory_allocated()] if llama.norm.weight.is_cuda else []
    return {"kind": kind, "bytes": sum(distributed.gather([c.nbytes for c in caches])),
            "full_bytes": lorc.full_cache_bytes(llama, caches[0].capacity),
            "dtype": str(llama.norm.weight.dtype)[6:],
            "kept": 1.0 if kind == "full" else plan.kept} | (
                {"memory": distributed.gather(peak)} if peak else {})


def checked_step(llama, caches, compile):
    """generate's step: compiled as soon as the caches allow, the same in all processes, finite."""
    step = fast.stepper(llama, caches, compile)
    return lambda tokens: finite(distributed.broadcast(step(tokens)))


def speak(args, llama, tokenizer, ids, caches, bases, write):
    """Continue one prompt; `write` is given the text as it comes. Returns what happened."""
    stream, out, tokens, errors = Stream(tokenizer, ids), [], [], []
    start, marks = torch.tensor([ids], device=llama.norm.weight.device), [time.perf_counter()]
    n, status = caches[0].capacity + 1 - len(ids), "ok"
    steps = lorc.generate(llama, caches, start, n, tokenizer.ends, args.temperature, args.top_p,
                          args.seed, checked_step(llama, caches, args.compile))
    try:
        with measuring(llama, bases) as errors:
            tokens.append(next(steps).item())                                     # prefill
        marks.append(time.perf_counter())
        while tokens[-1] not in tokenizer.ends:
            out.append(stream.step(tokens[-1]))
            write(out[-1])
            tokens.append(next(steps).item())
    except StopIteration:
        status = "context" if n < args.max_new_tokens else "ok"
    except KeyboardInterrupt:
        status = "interrupted"
    marks += [time.perf_counter()] * (3 - len(marks))
    out.append(stream.rest() if stream.new else "")
    write(out[-1] + "\n")
    return {"text": "".join(out), "tokens": len(tokens), "ids": tokens, "errors": errors,
            "status": status, "prefill": marks[1] - marks[0], "decode": marks[2] - marks[1]}


def score(args, llama, tokens, make_caches, bases):
    """Perplexity of a text under one cache."""
    start = time.perf_counter()
    with measuring(llama, bases) as errors:
        nats, count = negative_log_likelihood(llama, tokens, args.context, make_caches)
        finite(torch.tensor(nats), llama.norm.weight.dtype)
    return {"perplexity": math.exp(min(nats / count, 700.0)), "tokens": count, "errors": errors,
            "status": "ok", "prefill": time.perf_counter() - start, "decode": 0.0}


def run_one(args, llama, tokenizer, kind, job, plan, bases, write):
    """One prompt, or the text to score, under one cache: what happened, and what was held."""
    bases = bases if kind != "full" else [None] * len(bases)
    options = {"sinks": args.sinks, "window": args.window, "bits": args.bits}
    if llama.norm.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    if args.perplexity is not None:
        job = torch.tensor(job, device=llama.norm.weight.device)

        def make(capacity):
            return lorc.new_caches(llama, kind, capacity, bases, simulate_decoding=True,
                                   **options)
        result = score(args, llama, job, make, bases)
        caches = make(min(args.context, len(job)))                # only counted
    else:
        n = min(args.max_new_tokens, llama.config.context - len(job) + 1)
        caches = lorc.new_caches(llama, kind, len(job) + n - 1, bases, **options)
        result = speak(args, llama, tokenizer, job, caches, bases, write)
    errors = distributed.gather(result["errors"])
    return result | {"errors": errors, "cache": held(llama, caches, kind, plan)}


def run(args):
    """One command, from the model's folder to the report. Returns the exit status."""
    marks, plan, runs = [time.perf_counter()], None, []
    texts = [file for file in (args.perplexity, args.calibrate) if file not in (None, "-")]
    for missing in distributed.run_on_rank_0(lambda: [x for x in texts if not os.path.exists(x)]):
        raise UserError(f"{missing}: No such file or directory")     # before the model's time
    llama, tokenizer = open_model(args)
    args.context = args.context or llama.config.context
    jobs = distributed.run_on_rank_0(lambda: read_jobs(args, llama, tokenizer))
    marks.append(time.perf_counter())
    bases = [None] * len(llama.layers)
    if args.cache != "full" or args.compare or args.plan or args.save is not None:
        plan, bases = choose_bases(args, llama, tokenizer)
    marks.append(time.perf_counter())
    if args.save is not None:
        saved_bases.save_bases(args.save, llama, plan, bases)
        print(f"wrote {Path(args.save) / 'bases.safetensors'}", file=sys.stderr)
    kinds, quiet = ["full", "compressed", "bibranch"], args.json or args.compare
    for kind, i in itertools.product(kinds if args.compare else [args.cache], range(len(jobs))):
        if args.prompt and not (quiet or args.chat) and getattr(sys.stdout, "isatty", bool)():
            print(tokenizer.fast.decode(jobs[i]), end="", file=sys.stderr, flush=True)
        write = (lambda text: None) if quiet else lambda text: print(text, end="", flush=True)
        runs.append(run_one(args, llama, tokenizer, kind, jobs[i], plan, bases, write))
        if runs[-1]["status"] == "interrupted":
            break
    report(args, plan, runs, {"load": marks[1] - marks[0], "bases": marks[2] - marks[1]})
    return 130 if any(r["status"] == "interrupted" for r in runs) else 0
