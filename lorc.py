"""LoRC: low-rank compression of the KV cache, read beside the paper (Zhang et al., 2024).

The first part of this file is Sec. 4 in the paper's order; the rest speaks, scores and reports.

    paper                          here
    -----------------------------  ------------------------------------------------------------
    Eq. 4, cache size              full_bytes
    Eq. 5, Eq. 6, Eq. 8, SVD       spectrum, basis        (one SVD over all heads)
    Eq. 7, Eq. 9, folding U        cache.CompressedCache  (Eq. 7 cannot be, [E4]; Eq. 9 per head)
    Eq. 10, condition number       log_kappa              kappa(W), in logs
    Eq. 12, cumulative             log_kappa_tilde        kappa~_l, in logs
    Eq. 13, compressed dimension   compressed_dimension   d_c of layer l, from d_max to d_min
    Alg. 1                         lorc                   its steps carry the line numbers
    rho                            kept                   fraction of the full cache's numbers [E13]

[E1] ... [E34] are the errata: README lists them in one line each. Logs are natural [E8].
Does NOT include: eviction of tokens, changed weights (Eq. 7 and Eq. 9 as stored matrices would be
larger than what they replace, [E5]), or training.

    python lorc.py --prompt "Once upon a time"
    python lorc.py --model PATH --prompt "..." --compare
    python lorc.py --model PATH --plan
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def heavy_imports():
    """torch takes a second or two: --help and a mistyped flag are answered before it is needed."""
    global torch, F, tqdm, model, Basis, BiBranchCache, CompressedCache, FullCache
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    import model
    from cache import Basis, BiBranchCache, CompressedCache, FullCache


# Sec. 4.1: one layer -----------------------------------------------------------------------------

def spectrum(W, C=None):
    """Eigenvalues lam (m,), falling, and eigenvectors U (m, m) of W C W^T: Eq. 5, Eq. 6, Eq. 8.

    W (m, n) is Wk or Wv of all heads together. C is the second moment of the inputs: None for the
    identity, (n,) for a diagonal, or (n, n). With C = I, lam = sigma^2 and U has the left singular
    vectors of W = U Sigma V^T in nn.Linear's orientation [E1], so that U^T (W x) = Sigma V^T x: the
    latent that the cache keeps is the paper's X(Sigma V^T)^T. Any other C measures the error
    ||Wx - U U^T Wx|| in the mean over inputs with that second moment [E30].
    Float64, because the Gram matrix squares the condition number.
    """
    W = W.double()
    WC = W if C is None else W * C.double() if C.dim() == 1 else W @ C.double()
    lam, U = torch.linalg.eigh(WC @ W.T)
    return lam.flip(0).clamp(min=0), U.flip(1)


def basis(W, d_c, C=None):
    """The best orthonormal basis of d_c columns for W x: down = U^T, up = U."""
    U = spectrum(W, C)[1][:, :d_c].to(W.dtype).contiguous()
    return Basis(U.T, U)


# Sec. 4.2: how much each layer may lose ----------------------------------------------------------

def log_kappa(W):
    """ln of the condition number sigma_1 / sigma_p of W (m, n), p = min(m, n): Eq. 10.

    W is not square and has no inverse [E6]. A sigma_p that float64 cannot resolve through the Gram
    matrix counts as the smallest that it could, so the result is finite for every W.
    """
    lam = spectrum(W)[0]
    relative = (lam[min(W.shape) - 1] / lam[0]).nan_to_num(0)
    return -0.5 * math.log(relative.clamp(min=max(W.shape) * torch.finfo(lam.dtype).eps))


def log_kappa_tilde(log_kappas):
    """Sum over layers l..L of ln kappa(Wk) + ln kappa(Wv), for each l: Eq. 12.

    log_kappas: one number a layer. The product overflows, its logarithm does not [E7].
    """
    return [sum(log_kappas[layer:]) for layer in range(len(log_kappas))]


def compressed_dimension(log_tilde, d_max, d_min, schedule="progressive"):
    """d_c of each layer, real-valued: Eq. 13. It never grows with depth, because kappa >= 1 [E9].

    `uniform` is the paper's baseline: every layer is given d_min.
    """
    top, spread = max(log_tilde), max(log_tilde) - min(log_tilde)
    depth = [(top - x) / spread if spread > 0 else 0.0 for x in log_tilde]
    if schedule == "uniform":
        depth = [1.0] * len(log_tilde)
    return [d_max * (1 - t * (1 - d_min / d_max)) for t in depth]


def ranks(log_tilde, full, d_max, d_min, schedule="progressive", split=0.0):
    """(d_k, d_v) of each layer: Eq. 13 rounded, with `split` * d_max moved from keys to values.

    full: which layers stay whole. Keys and values each keep between 1 and d_max numbers.
    """
    def whole(x):
        return min(d_max, max(1, round(x)))
    real = compressed_dimension(log_tilde, d_max, d_min, schedule)
    return [(d_max, d_max) if f else (whole(d - split * d_max), whole(d + split * d_max))
            for d, f in zip(real, full)]


def solve_d_min(kept, ranks_of, d_max):
    """The d_min whose ranks keep the fraction `kept` of all numbers, to within one rank a layer.

    ranks_of: d_min -> [(d_k, d_v)]. Raises UserError when no d_min in [1, d_max] does.
    """
    def fraction(d_min):
        return sum(map(sum, plan := ranks_of(d_min))) / (2 * len(plan) * d_max)
    low, high = 1.0, float(d_max)
    if not fraction(low) - 0.5 / d_max <= kept <= fraction(high) + 0.5 / d_max:
        least = math.ceil(1000 * fraction(low)) / 1000
        raise model.UserError(f"--kept {kept:g} cannot be reached: these flags can keep {least:g} "
                              f"to {fraction(high):.4g} (--schedule uniform reaches lower)")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) < kept else (low, middle)
    return min(low, high, key=lambda d: abs(fraction(d) - kept))


@dataclass(frozen=True)
class Plan:
    """What Alg. 1 decided, layer by layer."""

    log_kappa: list         # ln kappa(Wk), ln kappa(Wv): Eq. 10
    log_tilde: list         # ln kappa~_l: Eq. 12
    ranks: list             # d_k, d_v: Eq. 13
    d_max: int              # G*d [E10]

    @property
    def kept(self) -> float:
        """rho over the whole cache: numbers kept / numbers of a full cache."""
        return sum(map(sum, self.ranks)) / (2 * len(self.ranks) * self.d_max)


def lorc(llama, kept=0.6, d_min=None, threshold=math.inf, schedule="progressive", skip=0, split=0.0,
         moments=None):
    """Algorithm 1: the plan, and each layer's bases of keys and values, None where it stays full.

    kept solves for d_min where d_min is None; threshold is on ln kappa~ [E8]; moments: C of each
    layer's inputs, None for the paper's SVD.
    """
    weights = [(layer.attn.Wk.weight, layer.attn.Wv.weight) for layer in llama.layers]
    d_max, moments = llama.config.kv_width, moments or [None] * len(weights)
    kappa = [(log_kappa(Wk), log_kappa(Wv))                                        # l. 3
             for Wk, Wv in tqdm(weights, "kappa", unit=" layers", leave=False, disable=None)]
    log_tilde = log_kappa_tilde([k + v for k, v in kappa])                         # l. 1-5
    full = [x > threshold or layer < skip for layer, x in enumerate(log_tilde)]    # l. 8-11

    def ranks_of(d_min):
        return ranks(log_tilde, full, d_max, d_min, schedule, split)               # l. 7
    plan = Plan(kappa, log_tilde, ranks_of(d_min or solve_d_min(kept, ranks_of, d_max)), d_max)
    bases = [None if d_k == d_v == d_max else
             (basis(Wk, d_k, C), basis(Wv, d_v, C))                                # l. 12-14, 16-18
             for (Wk, Wv), (d_k, d_v), C in zip(tqdm(weights, "bases", unit=" layers", leave=False,
                                                     disable=None), plan.ranks, moments)]
    return plan, bases                        # l. 15, 19 not taken [E4], [E5]; l. 20: the caches


# Which C: one formula for every method -----------------------------------------------------------

def norm_moments(llama):
    """C = diag(gamma^2) of each layer: the RMSNorm weight before Wk and Wv, without any data."""
    return [layer.attn_norm.weight.double() ** 2 for layer in llama.layers]


def calibrated_moments(llama, tokens, kind, sinks=4, context=1024, windows=32):
    """C of each layer from text: diag(mean |x|) for `asvd` (alpha = 1/2), E[x x^T] for `whitened`.

    One pass of the uncompressed model over `windows` windows of `context` tokens; the first `sinks`
    positions of each, whose inputs are unlike all others, are left out. Sums are kept in float64.
    """
    sums, seen = [0.0] * len(llama.layers), 0

    def collect(layer):
        def hook(module, inputs):
            x = inputs[0][0, sinks:].double()             # (T, D), what Wk and Wv are given
            sums[layer] += x.abs().sum(0) if kind == "asvd" else x.T @ x
        return hook
    hooks = [layer.attn.Wk.register_forward_pre_hook(collect(i))
             for i, layer in enumerate(llama.layers)]
    try:
        for x in tqdm(tokens[:windows * context].split(context), "calibrating", unit=" windows",
                      leave=False, disable=None):
            if len(x) > sinks:
                llama.hidden(x[None], new_caches(llama, "full", len(x)))
                seen += len(x) - sinks
    finally:
        for hook in hooks:
            hook.remove()
    return [total / seen for total in sums]


# Running -----------------------------------------------------------------------------------------

def new_caches(llama, kind, capacity, bases=None, B=1, **bibranch):
    """One empty cache a layer: full, compressed or bibranch; full where the layer has no basis."""
    c, like = llama.config, llama.embed.weight

    def cache(pair):
        if pair is None or kind == "full":
            return FullCache(B, capacity, c.kv_heads, c.head_dim, like.dtype, like.device)
        if kind == "compressed":
            return CompressedCache(B, capacity, *pair, c.head_dim)
        return BiBranchCache(B, capacity, *pair, c.head_dim, **bibranch)
    return [cache(pair) for pair in bases or [None] * c.layers]


def full_bytes(llama, capacity, B=1):
    """Bytes of a full cache: Eq. 4 for K and for V [E14], times layers and bytes of a number."""
    c = llama.config
    return 2 * B * capacity * c.kv_width * c.layers * llama.embed.weight.element_size()


def sample(logits, temperature, top_p, generator):
    """The next token (B, 1) from logits (B, V): the largest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))


def generate(llama, caches, tokens, n, ends=(), temperature=0.0, top_p=1.0, seed=0):
    """Yield up to n tokens that follow `tokens` (1, T), the end token, if one comes, included.

    The first comes after prefill. The caches must have room for T + n - 1 tokens.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for left in range(n, 0, -1):
        h = llama.hidden(tokens, caches)
        tokens = sample(llama.head(h[:, -1]), temperature, top_p, generator)
        yield (token := tokens.item())
        if token in ends:
            return


def negative_log_likelihood(llama, tokens, context, make_caches):
    """Nats and number of predicted tokens: each window of `context` predicts all but its first."""
    nats = count = 0
    bar = tqdm(total=len(tokens), desc="scoring", unit=" tokens", leave=False, disable=None)
    for x in tokens.split(context):
        h = llama.hidden(x[None], make_caches(len(x)))[0]
        for h, y in zip(h[:-1].split(256), x[1:].split(256)):
            nats += F.cross_entropy(llama.head(h).float(), y, reduction="sum").item()
        count += len(x) - 1
        bar.update(len(x))
    bar.close()
    return nats, count


@contextmanager
def measuring(llama, bases):
    """Collect ||k - k~|| / ||k|| and ||v - v~|| / ||v|| of each layer over all tokens seen."""
    sums = torch.zeros(len(llama.layers), 2, 2)

    def collect(layer, which, pair):
        def hook(module, inputs, k):
            err = k - F.linear(F.linear(k, pair.down), pair.up)
            sums[layer, which] += torch.stack([x.double().square().sum() for x in (err, k)]).cpu()
        return hook
    hooks = [W.register_forward_hook(collect(i, j, pair[j]))
             for i, (layer, pair) in enumerate(zip(llama.layers, bases)) if pair
             for j, W in enumerate((layer.attn.Wk, layer.attn.Wv))]
    errors = []
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()
        errors += (sums[..., 0] / sums[..., 1].clamp(min=1e-30)).sqrt().tolist()


# Saving bases ------------------------------------------------------------------------------------

def fingerprint(llama):
    """What ties bases to a model: a hash of its shape and of some numbers of every Wk and Wv."""
    h = hashlib.sha256(repr(llama.config).encode())
    for layer in llama.layers:
        for W in (layer.attn.Wk.weight, layer.attn.Wv.weight):
            h.update(W[:4, :16].bfloat16().view(torch.int16).cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def save_bases(folder, llama, plan, bases, method):
    """Write bases and plan to folder/bases.safetensors: whole or not at all. Raises UserError."""
    from safetensors.torch import save_file
    tensors = {f"layers.{i}.{kind}.{part}": x.contiguous() for i, pair in enumerate(bases) if pair
               for kind, b in zip("kv", pair) for part, x in b._asdict().items()}
    about = {"log_kappa": plan.log_kappa, "log_tilde": plan.log_tilde, "ranks": plan.ranks}
    metadata = {"model": fingerprint(llama), "method": method, "kept": repr(plan.kept),
                "plan": json.dumps(about)}
    path = Path(folder) / "bases.safetensors"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors or {"none": torch.zeros(1)}, beside, metadata)
        os.replace(beside, path)
    except Exception as e:
        raise model.UserError(f"--save {folder}: {e}") from None
    finally:
        beside.unlink(missing_ok=True) if beside.parent.is_dir() else None


def load_bases(folder, llama):
    """The plan, the bases and the method's name from folder/bases.safetensors. Raises UserError."""
    from safetensors import safe_open
    path, d_max = Path(folder) / "bases.safetensors", llama.config.kv_width
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
            tensors = {name: f.get_tensor(name).to(llama.embed.weight) for name in f.keys()}
        if about.get("model") != fingerprint(llama):
            raise model.UserError(f"{path} was made for another model; make new bases with --save")
        plan = Plan(**json.loads(about["plan"]), d_max=d_max)
        bases = [tuple(Basis(tensors[f"layers.{i}.{kind}.down"], tensors[f"layers.{i}.{kind}.up"])
                       for kind in "kv") if [d_k, d_v] != [d_max, d_max] else None
                 for i, (d_k, d_v) in enumerate(plan.ranks)]
        for pair, dims in zip(bases, plan.ranks, strict=True):
            for b, d_c in zip(pair or (), dims):
                assert b.down.shape == b.up.T.shape == (d_c, d_max)
    except model.UserError:
        raise
    except Exception as e:
        raise model.UserError(f"{path} holds no bases for this model: {e!r:.80}") from None
    return plan, bases, about.get("method", "")


# The command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage: what is wrong and where to look."""
        self.exit(2, f"lorc: {message} (see --help)\n")


def within(kind, low, high, what):
    """An argparse type: a number of `kind` from low to high."""
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    read.__name__ = what
    return read


def command_line():
    """Every flag; the defaults that hang on other flags are None here and settled in `settle`."""
    p = Parser(prog="lorc.py", description="LoRC and CSKV: a LLaMA that keeps a low-rank KV cache.")
    count, positive = within(int, 0, 10**9, "count"), within(int, 1, 10**9, "positive count")
    fraction = within(float, 1e-6, 1, "fraction in (0, 1]")
    more = within(int, 2, 10**9, "count above 1")
    flag = p.add_argument
    flag("--model", default=str(Path(__file__).resolve().parent / "tiny"), metavar="PATH",
         help="A folder in Hugging Face layout, or a Hub id. Default: tiny/ beside lorc.py.")
    flag = p.add_argument_group("what to do").add_argument
    flag("--prompt", action="append", metavar="TEXT",
         help="Continue this text; repeatable; - reads standard input.")
    flag("--perplexity", metavar="FILE", help="Score this text under the chosen cache.")
    flag("--plan", action="store_true", help="Print kappa, kappa~ and d_c per layer and stop.")
    flag("--compare", action="store_true", help="Run all three caches and print them side by side.")
    flag("--save", metavar="DIR", help="Write bases and plan to DIR/bases.safetensors.")
    flag("--json", action="store_true", help="Print one JSON object instead of text.")
    flag = p.add_argument_group("the cache").add_argument
    flag("--cache", choices=["full", "compressed", "bibranch"], default="compressed",
         help="What is kept. Default: compressed.")
    flag("--kept", type=fraction, metavar="F",
         help="rho, the fraction of the full cache's numbers that latents keep. Default: 0.6.")
    flag("--d-min", type=positive, metavar="N", help="d_min of Eq. 13, instead of --kept.")
    flag("--threshold", type=float, metavar="F",
         help="Alg. 1, l. 8: layers whose ln kappa~ is above stay full. Default: none.")
    flag("--schedule", choices=["progressive", "uniform"],
         help="Eq. 13, or the same d_c everywhere. Default: progressive; uniform with --calibrate.")
    flag("--skip", type=count, default=0, metavar="N",
         help="Leave the first N layers full. Default: 0.")
    flag("--split", type=within(float, -1, 1, "number in [-1, 1]"), default=0.0, metavar="F",
         help="Kept fraction moved from keys to values. Default: 0.")
    flag("--basis", choices=["svd", "norm", "asvd", "whitened"],
         help="C: I, gamma^2, mean |x|, E[xx^T]. Default: svd; whitened with --calibrate.")
    flag("--calibrate", metavar="FILE",
         help="Text for asvd and whitened; its first 32,768 tokens are used.")
    flag("--bases", metavar="DIR", help="Use the bases and the plan that --save wrote.")
    flag("--sinks", type=count, default=4, metavar="N",
         help="Exact first tokens of the bi-branch cache; left out of calibration. Default: 4.")
    flag("--window", type=count, default=32, metavar="N",
         help="Exact last tokens of the bi-branch cache. Default: 32.")
    flag("--bits", type=int, choices=[16, 4], default=16,
         help="Of a bi-branch latent; 16 stands for the model's own dtype. Default: 16.")
    flag = p.add_argument_group("running").add_argument
    flag("--max-new-tokens", type=positive, default=128, metavar="N", help="Default: 128.")
    flag("--temperature", type=within(float, 0, 1e3, "number >= 0"), default=0.0, metavar="F",
         help="0 is greedy. Default: 0.")
    flag("--top-p", type=fraction, default=1.0, metavar="F",
         help="Draw from the smallest set of tokens with this probability. Default: 1.")
    flag("--seed", type=count, default=0, metavar="N", help="Default: 0.")
    flag("--chat", action="store_true", help="Wrap the prompt in the model's own chat template.")
    flag("--context", type=more, metavar="N",
         help="Window length for --perplexity. Default: the model's maximum.")
    flag("--max-tokens", type=more, metavar="N", help="Score only the first N tokens.")
    flag("--dtype", choices=["float32", "bfloat16", "float16"],
         help="Default: the checkpoint's on CUDA, float32 on the CPU.")
    flag("--device", help="cpu or cuda. Default: cuda where there is one.")
    return p


def settle(p, args):
    """Refuse contradictions among the flags, and settle the defaults that hang on others."""
    plan = {f"--{name.replace('_', '-')}": getattr(args, name) for name in
            ("kept", "d_min", "threshold", "schedule", "skip", "split", "basis", "calibrate")}
    brought = [name for name, value in plan.items() if value not in (None, 0)]
    refuse = {
        "--prompt, --perplexity and --plan exclude each other":
            sum(map(bool, (args.prompt, args.perplexity, args.plan))) > 1,
        "nothing to do: give --prompt TEXT, --perplexity FILE, --plan or --save DIR":
            not (args.prompt or args.perplexity or args.plan or args.save),
        "--compare needs --prompt or --perplexity":
            args.compare and not (args.prompt or args.perplexity),
        f"--bases brings its own plan; leave out {', '.join(brought)}": args.bases and brought,
        "--kept and --d-min exclude each other": args.kept and args.d_min,
        f"--basis {args.basis} uses no text; leave out --calibrate":
            args.calibrate and args.basis in ("svd", "norm"),
        f"--basis {args.basis} needs --calibrate FILE":
            args.basis in ("asvd", "whitened") and not args.calibrate,
        "--threshold should be a number": args.threshold is not None and math.isnan(args.threshold),
    }
    for message, wrong in refuse.items():
        if wrong:
            p.error(message)
    args.basis = args.basis or ("whitened" if args.calibrate else "svd")
    args.schedule = args.schedule or ("uniform" if args.calibrate else "progressive")
    args.kept = args.kept or 0.6
    args.threshold = math.inf if args.threshold is None else args.threshold
    return args


def read_text(path):
    """A text file, or standard input for -. Raises UserError when there is no text in it."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as e:
        raise model.UserError(f"{path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise model.UserError(f"{path} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise model.UserError(f"{'standard input' if path == '-' else path} holds no text")
    return text


def open_model(args):
    """The model and its tokenizer, on the device and in the dtype asked for. Raises UserError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except Exception as e:
        why = str(e).splitlines()[0]
        raise model.UserError(f"--device {device} cannot be used: {why}") from None
    dtype = args.dtype or ("float32" if device == "cpu" else None)
    folder = model.find_model(args.model)
    llama = model.load(folder, dtype and getattr(torch, dtype), device)
    return llama, model.Tokenizer(folder, llama.config)


def choose_bases(args, llama, tokenizer):
    """Plan and bases as the flags ask: loaded, or Alg. 1 with the C of --basis."""
    if args.bases:
        return load_bases(args.bases, llama)[:2]
    moments = norm_moments(llama) if args.basis == "norm" else None
    if args.calibrate:
        tokens = torch.tensor(tokenizer.encode(read_text(args.calibrate)))
        least, context = llama.config.kv_width, min(1024, llama.config.context)
        if len(tokens) < least + args.sinks:
            raise model.UserError(f"{args.calibrate} has {len(tokens)} tokens; calibrating this "
                                  f"model needs {least + args.sinks}, and gains from 30,000")
        tokens = tokens.to(llama.embed.weight.device)
        moments = calibrated_moments(llama, tokens, args.basis, args.sinks, context)
    return lorc(llama, args.kept, args.d_min, args.threshold, args.schedule, args.skip, args.split,
                moments)


def speak(args, llama, tokenizer, prompt, kind, bases, write):
    """Continue one prompt under one cache; `write` is given the text as it comes."""
    ids = tokenizer.chat(prompt) if args.chat else tokenizer.encode(prompt)
    limit = llama.config.context
    if not ids:
        raise model.UserError("the prompt is empty; give some text")
    if len(ids) > limit:
        raise model.UserError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; "
                              "shorten it")
    n = min(args.max_new_tokens, limit - len(ids) + 1)
    caches = new_caches(llama, kind, len(ids) + n - 1, bases, **bibranch_options(args, kind))
    stream, out, tokens, marks = model.Stream(tokenizer, ids), [], [], [time.perf_counter()]
    start = torch.tensor([ids], device=llama.embed.weight.device)
    steps = generate(llama, caches, start, n, tokenizer.ends, args.temperature,
                     args.top_p, args.seed)
    status = "ok"
    try:
        with measuring(llama, bases if kind != "full" else []) as errors:
            tokens.append(next(steps))                                     # prefill
        marks.append(time.perf_counter())
        while tokens[-1] not in tokenizer.ends:
            out.append(stream.step(tokens[-1]))
            write(out[-1])
            tokens.append(next(steps))
    except StopIteration:
        status = "context" if n < args.max_new_tokens else "ok"
    except KeyboardInterrupt:
        status = "interrupted"
    marks += [time.perf_counter()] * (3 - len(marks))
    out.append(stream.rest() if stream.new else "")
    write(out[-1] + "\n")
    return {"text": "".join(out), "tokens": len(tokens), "ids": tokens, "errors": errors,
            "status": status, "cache": cache_report(llama, caches, kind, len(ids) + n - 1),
            "seconds": {"prefill": marks[1] - marks[0], "decode": marks[2] - marks[1]}}


def score(args, llama, tokens, kind, bases):
    """Perplexity of a text under one cache, and its measurements."""
    context, shown = args.context or llama.config.context, []
    options = bibranch_options(args, kind) | ({"strict": True} if kind == "bibranch" else {})

    def make(capacity):
        caches = new_caches(llama, kind, capacity, bases, **options)
        shown.append(cache_report(llama, caches, kind, capacity))
        return caches
    start = time.perf_counter()
    with measuring(llama, bases if kind != "full" else []) as errors:
        nats, count = negative_log_likelihood(llama, tokens, context, make)
    return {"perplexity": math.exp(min(700, nats / count)), "tokens": count, "errors": errors,
            "status": "ok", "cache": shown[0],
            "seconds": {"prefill": time.perf_counter() - start, "decode": 0.0}}


def show(text):
    print(text, end="", flush=True)


def hush(text):
    pass


def bibranch_options(args, kind):
    """What only the bi-branch cache is told."""
    wanted = {"sinks": args.sinks, "window": args.window, "bits": args.bits}
    return wanted if kind == "bibranch" else {}


def cache_report(llama, caches, kind, capacity):
    """Bytes of the buffers held, and of a full cache for as many tokens."""
    return {"kind": kind, "bytes": sum(c.nbytes for c in caches),
            "full_bytes": full_bytes(llama, capacity)}


def run(args):
    """One command, from the model's folder to the report. Returns the exit status."""
    marks = [time.perf_counter()]
    llama, tokenizer = open_model(args)
    marks.append(time.perf_counter())
    plan, bases = None, [None] * llama.config.layers
    if args.cache != "full" or args.compare or args.plan or args.save:
        plan, bases = choose_bases(args, llama, tokenizer)
    marks.append(time.perf_counter())
    if args.save:
        save_bases(args.save, llama, plan, bases, args.basis)
    quiet = args.json or args.compare
    kinds = ["full", "compressed", "bibranch"] if args.compare else [args.cache]
    runs = {kind: [] for kind in kinds}
    if args.perplexity:
        if args.context and args.context > llama.config.context:
            raise model.UserError(f"--context {args.context} is beyond the model's "
                                  f"{llama.config.context} positions")
        tokens = torch.tensor(tokenizer.encode(read_text(args.perplexity))[:args.max_tokens])
        if len(tokens) < 2:
            raise model.UserError(f"{args.perplexity} is too short to score")
        for kind in kinds:
            runs[kind].append(score(args, llama, tokens.to(llama.embed.weight.device), kind, bases))
    prompts = [read_text("-") if p == "-" else p for p in args.prompt or []]
    for prompt in prompts:
        for kind in kinds:
            if not (quiet or args.chat) and sys.stdout.isatty():
                print(prompt, end="", file=sys.stderr, flush=True)
            write = hush if quiet else show
            runs[kind].append(speak(args, llama, tokenizer, prompt, kind, bases, write))
    seconds = {"load": marks[1] - marks[0], "bases": marks[2] - marks[1]}
    report(args, plan, runs, seconds)
    return 130 if any(r["status"] == "interrupted" for rs in runs.values() for r in rs) else 0


def plan_rows(plan, errors):
    """The plan as the table's and the JSON's rows: one dict a layer."""
    return [{"layer": i, "log_kappa_k": k, "log_kappa_v": v, "log_kappa": k + v,
             "log_kappa_tilde": t, "d_k": d_k, "d_v": d_v, "kept": (d_k + d_v) / (2 * plan.d_max)}
            | ({"error_k": errors[i][0], "error_v": errors[i][1]} if errors else {})
            for i, ((k, v), t, (d_k, d_v))
            in enumerate(zip(plan.log_kappa, plan.log_tilde, plan.ranks))]


def size(n):
    """Bytes for a reader: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def say(*what):
    """A line of the report: on standard error, beside the text."""
    print(*what, file=sys.stderr)


def report(args, plan, runs, seconds):
    """The result for a program (--json, on standard output) or for a reader (on standard error)."""
    done = [r for results in runs.values() for r in results]
    errors = next((r["errors"] for r in done if r["cache"]["kind"] != "full"), [])
    rows = plan_rows(plan, errors) if plan else []
    for r in done:
        r["cache"]["kept"] = plan.kept if plan and r["cache"]["kind"] != "full" else 1.0
    if args.json:
        print(json.dumps(as_json(args, runs, rows, seconds)))
        return
    if rows:
        print_plan(rows, plan, errors, sys.stdout if args.plan else sys.stderr)
    if args.compare:
        print_comparison(runs)
        return
    for r in done:
        c, s = r["cache"], r["seconds"]
        if "perplexity" in r:
            print(f"perplexity {r['perplexity']:.4f}")
        held, full = c["bytes"], c["full_bytes"]
        say(f"{c['kind']} cache: {size(held)} held ({held:,} bytes), a full one would hold "
            f"{size(full)} ({full:,}): {held / full:.1%}")
        say(f"{r['tokens']} tokens; seconds: "
            + ", ".join(f"{what} {spent:.2f}" for what, spent in (seconds | s).items()))
        if r["status"] == "context":
            say("stopped at the model's context: it was made for no more positions")


def as_json(args, runs, rows, seconds):
    """The one object of --json; README lists its fields. Several prompts give a list of texts."""
    def one(results):
        texts = [r["text"] for r in results if "text" in r]
        found = {"text": texts[0] if len(texts) == 1 else texts} if texts else {}
        found |= {"perplexity": r["perplexity"] for r in results if "perplexity" in r}
        largest = max((r["cache"] for r in results), key=lambda c: c["full_bytes"])
        spent = {k: sum(r["seconds"][k] for r in results) for k in ("prefill", "decode")}
        return {"cache": largest} | found | {"tokens": sum(r["tokens"] for r in results),
                                             "seconds": seconds | spent}
    result = {"model": args.model, "plan": rows}
    if args.compare:
        return result | {"compare": [one(rs) for rs in runs.values()], "agree": agreement(runs)}
    results = runs[args.cache]
    return result | (one(results) if results else {"seconds": seconds})


def agreement(runs):
    """How many tokens of each prompt equal the full cache's before the first difference."""
    def same(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return {kind: [same(r["ids"], f["ids"]) for r, f in zip(results, runs["full"]) if "ids" in r]
            for kind, results in runs.items()}


def print_plan(rows, plan, errors, to):
    """The table of layers, and a plain sentence when the measured error is large [E17]."""
    measured = "  |k-k~|/|k|  |v-v~|/|v|" if errors else ""
    print(f"layer  ln k(Wk)  ln k(Wv)   ln k~   d_k   d_v   kept{measured}", file=to)
    for r in rows:
        print(f"{r['layer']:5d}  {r['log_kappa_k']:8.2f}  {r['log_kappa_v']:8.2f}  "
              f"{r['log_kappa_tilde']:6.1f}  {r['d_k']:4d}  {r['d_v']:4d}  {r['kept']:5.3f}"
              + (f"  {r['error_k']:10.3f}  {r['error_v']:10.3f}" if errors else ""), file=to)
    print(f"kept {plan.kept:.4f} of the full cache's numbers (d_max {plan.d_max})", file=to)
    worst = max((max(e) for e in errors), default=0)
    if worst > 0.3:
        print(f"On this text the worst layer loses {worst:.0%} of its keys or values: do not trust "
              "the output. --cache bibranch --calibrate FILE repair most of it.", file=to)


def print_comparison(runs):
    """The three caches side by side, on standard output: the table is the result."""
    agree = agreement(runs)
    print("cache              bytes  of full  prefill s  decode s")
    for kind, results in runs.items():
        for i, r in enumerate(results):
            c, s = r["cache"], r["seconds"]
            last = (f"perplexity {r['perplexity']:.4f}" if "perplexity" in r
                    else f"agrees with full for {agree[kind][i]} of {r['tokens']} tokens")
            print(f"{kind:10s}  {c['bytes']:12,}  {c['bytes'] / c['full_bytes']:7.1%}  "
                  f"{s['prefill']:9.2f}  {s['decode']:8.2f}  {last}")
    for kind, results in runs.items():
        for r in results:
            if "text" in r:
                print(f"\n--- {kind}\n{r['text']}")


def main(argv=None):
    """The command line. Returns the status: 2 for what the user can mend, 130 after Ctrl-C."""
    parser = command_line()
    args = settle(parser, parser.parse_args(argv))
    try:
        heavy_imports()
        with torch.inference_mode():
            return run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                              # the reader, `| head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except model.UserError as e:
        print(f"lorc: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
heavy_imports()
