"""One command, from the model's folder to the report: what `run` does, and its steps."""
import itertools
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

import lorc
import model
from cache import QuantizedLatents
from model import UserError
from runtime import checkpoint, compiled, distributed, saved_bases
from runtime.cli import CALIBRATION_CONTEXT, LOSS_WINDOWS, MOMENT_WINDOWS
from runtime.commuting import key_basis
from runtime.report import report
from runtime.scoring import ErrorMeter, finite, score_text
from runtime.text import Stream, Tokenizer

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                 "BF16": torch.bfloat16}
DIVERGENCE_TOKENS = 1024        # the divergence of a generated text is measured on so many tokens


@dataclass
class Setup:
    """What the runs of one command share."""

    args: object
    llama: model.Llama
    tokenizer: Tokenizer
    stored: torch.dtype             # the precision in which the checkpoint stores its weights
    plan: object = None             # None if no run of this command compresses anything
    bases: list = field(default_factory=list)

    def bases_for(self, kind):
        """This process's bases for a kind of cache: none for a full one."""
        return self.bases if kind != "full" else [None] * len(self.llama.layers)

    def new_caches(self, kind, capacity, simulate_decoding=False):
        """Empty caches of one kind, with the flags' sinks, window and bits."""
        return lorc.new_caches(self.llama, kind, capacity, self.bases_for(kind),
                               sinks=self.args.sinks, window=self.args.window,
                               bits=self.args.bits, simulate_decoding=simulate_decoding)


@dataclass
class Result:
    """One prompt, or the text that was scored, under one cache."""

    cache: dict                         # see cache_summary
    tokens: int                         # generated, or scored
    cached: int                         # tokens that were fed to the cache
    exact: int                          # those of them that it kept exactly to the end
    errors: list                        # (keys, values) of each layer; empty if not measured
    prefill: float                      # seconds
    decode: float = 0.0
    status: str = "ok"                  # or "context" or "interrupted"
    text: str | None = None
    ids: list | None = None             # of the generated tokens
    perplexity: float | None = None
    divergence: float | None = None     # mean over divergence_tokens, in nats; None: not measured
    divergence_tokens: int = 0


# Input -------------------------------------------------------------------------------------------

def read_text(path):
    """The text of a file, or of standard input for "-", with the line ends CR LF read as LF.

    Raises UserError if the file cannot be read, is not UTF-8 or contains only white space.
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
        raise UserError(f"{name} contains no text")
    return text


def check_files(args):
    """Raises UserError for a missing text file, or if --save could not write.

    What is slow, such as reading the model, comes after it.
    """
    def check():
        for file in (args.perplexity, args.calibrate):
            if file not in (None, "-") and not os.path.exists(file):
                raise UserError(f"{file}: No such file or directory")
        if args.save is not None:
            saved_bases.check_writable(args.save)
    distributed.run_on_rank_0(check)


def choose_device(args):
    """The device and the dtype (None for the checkpoint's own). Raises UserError if unusable."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if distributed.rank_and_world_size()[1] > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UserError(f"--device {device} is one GPU, but torchrun gives each process its "
                            "own; write --device cuda")
        device += f":{os.environ['LOCAL_RANK']}"
    name = args.dtype or ("float32" if device.startswith("cpu") else None)
    dtype = name and getattr(torch, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of devices that PyTorch no longer supports
            if device.startswith("cuda:"):
                torch.cuda.set_device(device)
            trial = torch.ones(1, 1, dtype=dtype, device=device)
            (trial @ trial).item()
    except Exception:                                   # each backend raises errors of its own
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {device} cannot be used{f' with {name}' if name else ''}; "
                        f"here: {', '.join(here)}") from None
    return device, dtype


def check_processes(args):
    """Raises UserError for what is not supported when torchrun starts several processes."""
    if distributed.rank_and_world_size()[1] == 1:
        return
    if args.compile:
        raise UserError("--compile works in one process only; leave it out under torchrun")
    if args.calibrate is not None and args.basis == "loss":
        raise UserError("--basis loss needs gradients through all layers in one process; save "
                        "the bases in one process (--calibrate --save DIR) and give --bases DIR "
                        "here, or choose --basis whitened")


def open_model(args):
    """The model, its tokenizer and the dtype of its stored weights. Raises UserError."""
    check_processes(args)
    device, dtype = choose_device(args)
    folder = checkpoint.find_model(args.model)
    checkpoint.check(folder)
    llama = distributed.load(folder, dtype, device)
    checkpoint.check_numbers(llama)
    return llama, Tokenizer(folder, llama.config), stored_dtype(folder)


def stored_dtype(folder):
    """The dtype in which a checkpoint stores its embedding."""
    name = model.hf_name("embed.weight")
    with safe_open(model.find_tensors(Path(folder))[name], "pt") as f:
        return STORED_DTYPES[f.get_slice(name).get_dtype()]


def read_prompt(args, llama, tokenizer, prompt):
    """Token ids of one --prompt. Raises UserError if it is empty or longer than the context."""
    ids = tokenizer.chat(prompt) if args.chat else tokenizer.encode(prompt)
    limit = llama.config.context
    if not tokenizer.fast.decode(ids).strip():
        raise UserError("the prompt is empty or contains only special tokens; give some text")
    if len(ids) > limit:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; "
                        "shorten it")
    return ids


def read_score(args, llama, tokenizer):
    """Token ids of the --perplexity text. Raises UserError if it cannot be scored."""
    if args.context > llama.config.context:
        raise UserError(f"--context {args.context} is beyond the model's "
                        f"{llama.config.context} positions")
    tokens = tokenizer.encode(read_text(args.perplexity))[:args.max_tokens]
    if min(len(tokens), args.context) < 2:
        raise UserError(f"{args.perplexity} is too short to score, or the context is")
    return tokens


def read_jobs(args, llama, tokenizer):
    """Token ids of each --prompt, or of the --perplexity text.

    A prompt read from standard input replaces its "-" in args.given, for the command that the
    report suggests.
    """
    if args.perplexity is not None:
        return [read_score(args, llama, tokenizer)]
    prompts = [read_text("-") if prompt == "-" else prompt for prompt in args.prompt or []]
    if prompts:
        args.given["prompt"] = prompts
    return [read_prompt(args, llama, tokenizer, prompt) for prompt in prompts]


# Bases -------------------------------------------------------------------------------------------

def choose_bases(args, llama, tokenizer):
    """Plan and bases as the flags ask: saved ones, those of --basis loss, or Algorithm 1's."""
    if args.bases is not None:
        return saved_bases.load_bases(args.bases, llama)
    d_max, layers = llama.config.kv_width, llama.config.layers
    if args.skip >= layers:
        raise UserError(f"--skip {args.skip} leaves none of the model's {layers} layers to "
                        "compress")
    if args.d_min and args.d_min > d_max:
        raise UserError(f"--d-min {args.d_min} is above the KV width G*d = {d_max}")
    moments = lorc.norm_moments(llama) if args.basis == "norm" else None
    if args.calibrate is not None:
        tokens, context = calibration_tokens(args, llama, tokenizer)
        if args.basis == "loss":
            return compress_for_loss(args, llama, tokens, context)
        kind = "asvd" if args.basis == "asvd" else "whitened"
        moments = lorc.calibrated_moments(llama, tokens, kind, args.sinks, context,
                                          MOMENT_WINDOWS)
        moments = [finite(C, llama.norm.weight.dtype) for C in moments]
    plan = choose_plan(args, distributed.gather(lorc.log_kappas(llama)), d_max)
    own = distributed.local_layers(layers)
    return plan, lorc.make_bases(llama, plan.ranks[own], moments,
                                 key_basis=key_basis if args.basis == "commuting" else None)


def compress_for_loss(args, llama, tokens, context):
    """Plan and bases of --basis loss. Raises UserError if the model or its gradients overflow."""
    window = tokens[None, :context]
    parameters = sum(p.numel() for p in llama.parameters())
    finite(llama.hidden(window, lorc.new_caches(llama, "full", window.shape[1])))
    # On a CPU, the activations of a small model fit into memory. A GPU reads 8 windows at a time.
    try:
        plan, bases = lorc.compress_for_loss(llama, tokens, args.kept, sinks=args.sinks,
                                             window=args.window, context=context,
                                             windows=LOSS_WINDOWS,
                                             recompute=window.is_cuda or parameters > 5e8)
        usable = all(basis.up.isfinite().all() for pair in bases if pair for basis in pair)
    except (ValueError, torch.linalg.LinAlgError):              # of a matrix that is not finite
        usable = False
    if not usable:
        name = str(llama.norm.weight.dtype).removeprefix("torch.")
        raise UserError(f"the gradients of the loss overflow or vanish in {name}; give another "
                        "--dtype, or --basis whitened, which needs none")
    return plan, bases


def calibration_tokens(args, llama, tokenizer):
    """The --calibrate text as (tokens, window length). Raises UserError if it is too short.

    Counted are the tokens that a basis is fitted to: those after the sinks of each window, and for
    --basis loss those that also leave the window of exact tokens.
    """
    tokens = distributed.run_on_rank_0(lambda: tokenizer.encode(read_text(args.calibrate)))
    context = min(CALIBRATION_CONTEXT, llama.config.context)
    windows = LOSS_WINDOWS if args.basis == "loss" else MOMENT_WINDOWS
    used = min(len(tokens), windows * context)
    exact = args.sinks + args.window if args.basis == "loss" else args.sinks
    usable = sum(max(0, min(context, used - start) - exact) for start in range(0, used, context))
    if usable < llama.config.kv_width:
        raise UserError(f"{args.calibrate} gives {usable} tokens, without the {exact} exact ones "
                        f"of each window of {context}; calibration needs {llama.config.kv_width}, "
                        "and 30,000 are better")
    return torch.tensor(tokens, device=llama.norm.weight.device), context


def choose_plan(args, log_kappas, d_max):
    """Algorithm 1's plan. Raises UserError if these flags cannot reach --kept."""
    def plan(schedule):
        return lorc.make_plan(log_kappas, d_max, args.kept, args.d_min, args.threshold, schedule,
                              args.skip, args.split, args.basis == "commuting")
    try:
        return plan(args.schedule)
    except UserError as error:
        if args.schedule == "uniform":
            raise
        try:
            plan("uniform")
        except UserError:
            raise error from None
        raise UserError(f"{error}; --schedule uniform reaches {args.kept:g}") from None


# One run -----------------------------------------------------------------------------------------

def cache_summary(setup, caches, kind, memory=None):
    """Sizes of the caches of all layers, as --json prints them.

    "bytes" are those of the buffers in this process's dtype; "stored_bytes" what they would be in
    the precision of the checkpoint. memory: peak bytes on this process's GPU, if it has one.
    """
    llama, capacity = setup.llama, caches[0].capacity
    dtype = llama.norm.weight.dtype
    nbytes = sum(distributed.gather([cache.nbytes for cache in caches]))
    packed = sum(distributed.gather([packed_bytes(cache) for cache in caches]))
    full = lorc.full_cache_bytes(llama, capacity)
    ratio = setup.stored.itemsize / dtype.itemsize
    summary = {"kind": kind, "bytes": nbytes, "full_bytes": full,
               "dtype": str(dtype).removeprefix("torch."),
               "kept": 1.0 if kind == "full" else setup.plan.kept,
               "stored_dtype": str(setup.stored).removeprefix("torch."),
               "stored_bytes": round(packed + (nbytes - packed) * ratio),
               "stored_full_bytes": round(full * ratio)}
    if memory:
        summary["memory"] = distributed.gather([memory])
    return summary


def packed_bytes(cache):
    """Bytes of a cache's 4-bit codes, which are the same in every dtype."""
    stores = [getattr(cache, name, None) for name in ("c_k", "c_v")]
    return sum(store.packed.nbytes for store in stores if isinstance(store, QuantizedLatents))


def exact_tokens(args, kind, tokens):
    """How many of a sequence's tokens a cache keeps exactly."""
    if kind == "compressed":
        return 0
    return tokens if kind == "full" else min(tokens, args.sinks + args.window)


def checked_step(llama, caches, compile):
    """A decode step for lorc.generate: compiled once the caches allow it, the same logits in all
    processes, and UserError if they are not finite."""
    step = compiled.make_step(llama, caches, compile)
    return lambda tokens: finite(distributed.broadcast(step(tokens)))


def generate_text(setup, kind, prompt, write):
    """Continue one prompt (token ids) under one kind of cache; write(text) receives new text."""
    args, llama, tokenizer = setup.args, setup.llama, setup.tokenizer
    n = min(args.max_new_tokens, llama.config.context - len(prompt) + 1)
    on_gpu = llama.norm.weight.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    caches = setup.new_caches(kind, len(prompt) + n - 1)
    start = torch.tensor([prompt], device=llama.norm.weight.device)
    steps = lorc.generate(llama, caches, start, n, tokenizer.ends, args.temperature, args.top_p,
                          args.seed, checked_step(llama, caches, args.compile))
    meter = ErrorMeter(llama, setup.bases_for(kind))
    ids, text, status, clock = stream_tokens(steps, meter, tokenizer, prompt, write)
    if status == "ok" and n < args.max_new_tokens and ids[-1] not in tokenizer.ends:
        status = "context"
    cached = len(prompt) + max(len(ids) - 1, 0)
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    errors = distributed.gather(meter.errors() if len(ids) else [])
    return Result(cache_summary(setup, caches, kind, memory), len(ids), cached,
                  exact_tokens(args, kind, cached), errors, clock[1] - clock[0],
                  clock[2] - clock[1], status, text, ids)


def stream_tokens(steps, meter, tokenizer, prompt, write):
    """Take tokens from `steps` and write their text until the end or Ctrl-C.

    Returns the token ids, the text, the status, and the times of start, first token and end.
    """
    stream, ids, pieces = Stream(tokenizer, prompt), [], []
    clock, status = [time.perf_counter()], "ok"
    try:
        with meter.observe():
            ids.append(next(steps).item())                                      # the prefill
        clock.append(time.perf_counter())
        while ids[-1] not in tokenizer.ends:
            pieces.append(stream.step(ids[-1]))
            write(pieces[-1])
            ids.append(next(steps).item())
    except StopIteration:
        pass
    except KeyboardInterrupt:
        status = "interrupted"
    while len(clock) < 3:
        clock.append(time.perf_counter())
    pieces.append(stream.rest() if stream.new else "")
    write(pieces[-1] + "\n")
    return ids, "".join(pieces), status, clock


def run_prompts(setup, jobs, write):
    """Continue every prompt under the caches that the flags ask for; measure the divergence."""
    kinds = ["full", "compressed", "bibranch"] if setup.args.compare else [setup.args.cache]
    results = []
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    echo = write is not None and not setup.args.chat and on_terminal
    for kind, prompt in itertools.product(kinds, jobs):
        if echo:
            print(setup.tokenizer.fast.decode(prompt), end="", file=sys.stderr, flush=True)
        results.append(generate_text(setup, kind, prompt, write or (lambda text: None)))
        if results[-1].status == "interrupted":
            return results
    try:
        for i, prompt in enumerate(jobs):
            measure_divergence(setup, prompt, results[i::len(jobs)])
    except KeyboardInterrupt:
        results[-1].status = "interrupted"
    return results


def measure_divergence(setup, prompt, results):
    """Set the divergence of one prompt's results.

    The text is the prompt and what was generated after it, by the full cache if there are several;
    at most its first DIVERGENCE_TOKENS tokens are measured. This costs one more prefill per cache.
    """
    kinds = [result.cache["kind"] for result in results if result.cache["kind"] != "full"]
    if kinds:
        limit = min(DIVERGENCE_TOKENS, setup.llama.config.context)
        text = torch.tensor((prompt + results[0].ids)[:limit])
        scores = score_text(setup.llama, text.to(setup.llama.norm.weight.device), limit,
                            ["full", *kinds], lambda *of: setup.new_caches(*of, True), {})
    for result in results:
        kind = result.cache["kind"]
        if kind != "full":
            result.divergence = max(0.0, scores[kind].divergence / scores[kind].count)
            result.divergence_tokens = scores[kind].count
        else:
            result.divergence = 0.0


def run_perplexity(setup, tokens):
    """Score the text under the full cache and under those that the flags ask for."""
    args, llama = setup.args, setup.llama
    kinds = ["full", "compressed", "bibranch"] if args.compare else ["full", args.cache]
    kinds = list(dict.fromkeys(kinds))
    meters = {kind: ErrorMeter(llama, setup.bases_for(kind)) for kind in kinds if kind != "full"}
    tokens = torch.tensor(tokens, device=llama.norm.weight.device)
    scores = score_text(llama, tokens, args.context, kinds,
                        lambda *of: setup.new_caches(*of, True), meters)
    results, lengths = [], [len(window) for window in tokens.split(args.context)]
    for kind, score in scores.items():
        errors = distributed.gather(meters[kind].errors()) if kind in meters else []
        perplexity = math.exp(min(score.negative_log_likelihood / score.count, 700.0))
        exact = sum(exact_tokens(args, kind, length) for length in lengths)
        results.append(Result(
            cache_summary(setup, score.caches, kind, score.memory), score.count, len(tokens), exact,
            errors, score.seconds, perplexity=perplexity, divergence_tokens=score.count,
            divergence=max(0.0, score.divergence / score.count)))
    return results


# One command -------------------------------------------------------------------------------------

def run(args):
    """Run one command, from the model's folder to the report. Returns the exit status."""
    clock = [time.perf_counter()]
    check_files(args)
    llama, tokenizer, stored = open_model(args)
    args.context = args.context or llama.config.context
    jobs = distributed.run_on_rank_0(lambda: read_jobs(args, llama, tokenizer))
    setup = Setup(args, llama, tokenizer, stored, bases=[None] * len(llama.layers))
    clock.append(time.perf_counter())
    if args.cache != "full" or args.compare or args.plan or args.save is not None:
        setup.plan, setup.bases = choose_bases(args, llama, tokenizer)
    clock.append(time.perf_counter())
    if args.save is not None:
        saved_bases.save_bases(args.save, llama, setup.plan, setup.bases)
        path = Path(args.save) / "bases.safetensors"
        print(f"wrote {path}: bases that keep {setup.plan.kept:.1%} of the numbers, computed in "
              f"{clock[2] - clock[1]:.1f} s", file=sys.stderr)
    with torch.inference_mode():
        if args.perplexity is not None:
            results = run_perplexity(setup, jobs[0])
        else:
            results = run_prompts(setup, jobs, None if args.json or args.compare else write)
    seconds = {"load": clock[1] - clock[0], "bases": clock[2] - clock[1]}
    report(args, setup.plan, results, seconds)
    return 130 if any(result.status == "interrupted" for result in results) else 0


def write(text):
    print(text, end="", flush=True)
