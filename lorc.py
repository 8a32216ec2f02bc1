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
    torchrun --nproc-per-node 2 lorc.py --model PATH --prompt "..."      layers over two processes
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


def heavy_imports():
    """torch takes a second or two: --help and a mistyped flag are answered before it is needed."""
    global torch, F, tqdm, model, Basis, BiBranchCache, CompressedCache, FullCache, Static
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    import model
    from cache import Basis, BiBranchCache, CompressedCache, FullCache, Static


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


def ranks(log_tilde, full, d_max, d_min, schedule="progressive", split=0.0, pairs=False):
    """(d_k, d_v) of each layer: Eq. 13 rounded, with `split` * d_max moved from keys to values.

    full: which layers stay whole. Keys and values each keep at most d_max numbers, a multiple of
    rank_step(d_max) and not 0; with `pairs`, keys an even number.
    """
    def whole(x, step):
        return min(d_max, step * max(1, round(x / step)))
    real, step = compressed_dimension(log_tilde, d_max, d_min, schedule), rank_step(d_max)
    return [(d_max, d_max) if f else
            (whole(d - split * d_max, max(step, 1 + pairs)), whole(d + split * d_max, step))
            for d, f in zip(real, full)]


def rank_step(d_max):
    """What ranks are multiples of: 8 in wide models, as matrix units want; 1 where 8 is much."""
    return 8 if d_max >= 1024 and d_max % 8 == 0 else 1


def solve_d_min(kept, ranks_of, d_max):
    """The d_min whose ranks keep the fraction `kept` of all numbers, to within one step a layer.

    ranks_of: d_min -> [(d_k, d_v)]. Raises UserError when no d_min in [1, d_max] does.
    """
    def fraction(d_min):
        return sum(map(sum, plan := ranks_of(d_min))) / (2 * len(plan) * d_max)
    low, high, slack = 1.0, float(d_max), 0.5 * rank_step(d_max) / d_max
    if not fraction(low) - slack <= kept <= fraction(high) + slack:
        raise model.UserError(f"--kept {kept:g} cannot be reached: these flags can keep "
                              f"{math.ceil(1e3 * fraction(low)) / 1e3:g} to {fraction(high):.4g}; "
                              "ask for that, or change --schedule, --skip, --threshold or --split")
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
         moments=None, commuting=False):
    """Algorithm 1: the plan, and each layer's bases of keys and values, None where it stays full.

    kept solves for d_min where d_min is None; threshold is on ln kappa~ [E8]; moments: C of each
    layer's inputs, None for the paper's SVD; commuting: keys get a basis that commutes with RoPE.
    """
    weights = [(layer.attn.Wk.weight, layer.attn.Wv.weight) for layer in llama.layers]
    d_max, moments = llama.config.kv_width, moments or [None] * len(weights)
    kappa = [(log_kappa(Wk), log_kappa(Wv))                                        # l. 3
             for Wk, Wv in tqdm(weights, "kappa", unit=" layers", leave=False, disable=None)]
    kappa, own = model.gather(kappa), model.share(llama.config.layers)    # of all, of this process
    log_tilde = log_kappa_tilde([k + v for k, v in kappa])                         # l. 1-5
    full = [x > threshold or layer < skip for layer, x in enumerate(log_tilde)]    # l. 8-11

    def ranks_of(d_min):
        return ranks(log_tilde, full, d_max, d_min, schedule, split, commuting)    # l. 7

    def keys(layer, d_k, C):
        Wq, Wk = layer.attn.Wq.weight, layer.attn.Wk.weight
        d = llama.config.head_dim
        return commuting_basis(Wk, d_k, d, C, Wq) if commuting else basis(Wk, d_k, C)
    plan = Plan(kappa, log_tilde, ranks_of(d_min or solve_d_min(kept, ranks_of, d_max)), d_max)
    bases = [None if d_k == d_v == d_max else
             (keys(layer, d_k, C), basis(layer.attn.Wv.weight, d_v, C))            # l. 12-14, 16-18
             for layer, (d_k, d_v), C in
             zip(tqdm(llama.layers, "bases", unit=" layers", leave=False, disable=None),
                 plan.ranks[own], moments)]
    return plan, bases                        # l. 15, 19 not taken [E4], [E5]; l. 20: the caches


# Which C: one formula for every method -----------------------------------------------------------

def norm_moments(llama):
    """C = diag(gamma^2) of each layer: the RMSNorm weight before Wk and Wv, without any data."""
    return [layer.attn_norm.weight.double() ** 2 for layer in llama.layers]


def calibrated_moments(llama, tokens, kind, sinks=4, context=1024, windows=32):
    """C of each layer from text: diag(mean |x|) for `asvd` (alpha = 1/2), else E[x x^T].

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
    return [finite(total / seen, llama.norm.weight.dtype) for total in sums]


# A basis that commutes with RoPE: what App. C wants --------------------------------------------

def commuting_basis(Wk, d_c, d, C=None, Wq=None):
    """The best basis of d_c numbers, an even count, for keys Wk x, whose map commutes with RoPE.

    RoPE multiplies the complex number of components (j, j + d/2) of every head by one phase, so a
    complex mix of the heads at one j commutes with it. At each j it is the eigenvectors of the
    heads' complex second moment; one sort over all j shares d_c among them. A row counts as much as
    its head group's queries are large at j: E |q_j|^2 where Wq (H*d, D) and C (D, D) are given.
    """
    Z = Wk.double().unflatten(0, (-1, 2, d // 2))                    # (G, 2, d/2, D)
    Z = torch.complex(Z[:, 0], Z[:, 1]).transpose(0, 1)              # (d/2, G, D): z_j = Z_j x
    energy = torch.ones_like(Z[..., 0].real)                         # (d/2, G)
    if Wq is not None and C is not None:
        q = (Wq.double() @ C.double() * Wq.double()).sum(1)          # (H*d,)
        energy = q.unflatten(0, (len(Z[0]), -1, 2, d // 2)).mean(1).sum(1).T
        energy = (energy / energy.max()).clamp(min=1e-6)             # no row is given up
    root = energy.sqrt()[..., None]                                  # (d/2, G, 1)
    ZC = Z if C is None else Z @ C.to(Z)
    lam, Q = torch.linalg.eigh(root * (ZC @ Z.mH) * root.mT)         # (d/2, G), (d/2, G, G)
    kept = lam.flatten().argsort(descending=True)[:d_c // 2]
    j, m = kept // lam.shape[1], kept % lam.shape[1]
    Q, root = Q[j, :, m].T, root[j, :, 0].T                          # (G, d_c/2)

    def real(u):                                                     # z += u c, as real numbers
        out = u.real.new_zeros(len(u), 2, d // 2, 2, len(j))
        i = torch.arange(len(j), device=j.device)
        out[:, 0, j, 0, i], out[:, 0, j, 1, i] = u.real, -u.imag
        out[:, 1, j, 0, i], out[:, 1, j, 1, i] = u.imag, u.real
        return out.flatten(3).flatten(0, 2).to(Wk.dtype)
    return Basis(real(Q * root).T.contiguous(), real(Q / root), torch.cat((j, j + d // 2)))


# Running -----------------------------------------------------------------------------------------

def new_caches(llama, kind, capacity, bases=None, B=1, **bibranch):
    """One empty cache a layer: full, compressed or bibranch; full where the layer has no basis."""
    c, like = llama.config, llama.norm.weight

    def cache(pair):
        if pair is None or kind == "full":
            return FullCache(B, capacity, c.kv_heads, c.head_dim, like.dtype, like.device)
        if kind == "compressed":
            return CompressedCache(B, capacity, *pair, c.head_dim)
        return BiBranchCache(B, capacity, *pair, c.head_dim, **bibranch)
    return [cache(pair) for pair in bases or [None] * len(llama.layers)]


def full_bytes(llama, capacity, B=1):
    """Bytes of a full cache: Eq. 4 for K and for V [E14], times layers and bytes of a number."""
    c = llama.config
    return 2 * B * capacity * c.kv_width * c.layers * llama.norm.weight.element_size()


def finite(x, dtype=None):
    """x itself. Raises UserError when the model has overflowed its dtype, x's own by default."""
    if not torch.isfinite(x).all():
        raise model.UserError(f"the model overflows in {str(dtype or x.dtype)[6:]}; "
                              "give another --dtype")
    return x


def sample(logits, temperature, top_p, generator):
    """The next token (B, 1) from logits (B, V): the largest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, order = (logits.double() / max(temperature, 1e-100)).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))


def generate(llama, caches, tokens, n, ends=(), temperature=0.0, top_p=1.0, seed=0, compile=False):
    """Yield up to n tokens that follow `tokens` (1, T), the end token, if one comes, included.

    The first comes after prefill. The caches must have room for T + n - 1 tokens.
    """
    def step(tokens):
        h = llama.hidden(tokens, caches)
        return h if h is None else llama.head(h[:, -1])            # None: not the last process
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for left in range(n, 0, -1):
        logits = step(tokens)
        if compile and left > 1 and all(cache.settled for cache in caches):
            step, compile = compiled(llama, caches), False
        tokens = tokens.new_empty(1, 1)
        if logits is not None:
            tokens = sample(finite(logits), temperature, top_p, generator)
        tokens = model.from_last(tokens)
        yield (token := tokens.item())
        if token in ends:
            return


def compiled(llama, caches, B=1):
    """The decode step, tokens (B, 1) -> logits (B, V), for every place after what the caches hold.

    No shape tells the place, a tensor does: what is compiled once serves to the end. On CUDA the
    first call compiles, the second records all kernels as one graph, later ones launch it; the
    logits are then one buffer, written over by the next call.
    Raises UserError where there is no compiler.
    """
    assert all(cache.settled for cache in caches)
    device, graph, logits = llama.norm.weight.device, None, None
    fused = device.type == "cuda" and B == 1               # the compiler's own matrix times vector
    block = torch.compile(model.Block.forward, options={"coordinate_descent_tuning": fused})
    at = torch.tensor([caches[0].n], device=device)
    steps, tokens = [Static(cache, at) for cache in caches], None

    def step():
        h = llama.hidden(tokens, steps, block)
        at.add_(1)
        return llama.head(h[:, -1])

    def decode(new):
        nonlocal graph, logits, tokens
        if tokens is None:
            tokens = new.clone()
            try:
                return step()
            except torch._dynamo.exc.TorchDynamoException as e:
                why = " ".join(str(e).split("\n\n")[0].split())          # then come PyTorch's hints
                raise model.UserError(f"--compile: {why:.160}; install a C++ compiler, or leave "
                                      "out --compile") from None
        tokens.copy_(new)
        if device.type != "cuda":
            return step()
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = step()
        graph.replay()
        return logits
    return decode


def negative_log_likelihood(llama, tokens, context, make_caches):
    """Nats and number of predicted tokens: each window of `context` predicts all but its first."""
    nats = count = 0
    bar = tqdm(total=len(tokens), desc="scoring", unit=" tokens", leave=False, disable=None)
    for x in tokens.split(context):
        h = llama.hidden(x[None], make_caches(len(x)))
        for h, y in zip(h[0, :-1].split(256), x[1:].split(256)) if h is not None else ():
            nats += F.cross_entropy(finite(llama.head(h)).float(), y, reduction="sum").item()
        count += len(x) - 1
        bar.update(len(x))
    bar.close()
    return sum(model.gather([nats])), count


@contextmanager
def measuring(llama, bases):
    """Collect ||k - k~|| / ||k|| and ||v - v~|| / ||v|| of each layer over all tokens seen."""
    sums = torch.zeros(len(llama.layers), 2, 2, dtype=torch.float64)

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
        finite(sums, llama.norm.weight.dtype)
        errors += (sums[..., 0] / sums[..., 1].clamp(min=1e-30)).sqrt().tolist()


# Saving bases ------------------------------------------------------------------------------------

def fingerprint(llama):
    """What ties bases to a model: its shape in words, some numbers of every Wk and Wv (2L, 16)."""
    rows = [W.weight[0, :16] for layer in llama.layers for W in (layer.attn.Wk, layer.attn.Wv)]
    return repr(llama.config), torch.stack(model.gather([row.float().cpu() for row in rows]))


def save_bases(folder, llama, plan, bases):
    """Write bases and plan to folder/bases.safetensors: whole or not at all. Raises UserError."""
    from safetensors.torch import save
    shape, numbers = fingerprint(llama)

    def on_cpu(b):
        return Basis(*(x if x is None else x.cpu() for x in b))
    bases = model.gather([pair and tuple(map(on_cpu, pair)) for pair in bases])
    if model.place()[0] > 0:
        return
    tensors = {f"layers.{i}.{kind}.{part}": x.clone(memory_format=torch.contiguous_format)
               for i, pair in enumerate(bases) if pair
               for kind, b in zip("kv", pair) for part, x in b._asdict().items() if x is not None}
    about = {"model": shape,
             "plan": json.dumps({"log_kappa": plan.log_kappa, "ranks": plan.ranks})}
    path = Path(folder) / "bases.safetensors"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(save(tensors | {"model": numbers}, about))
        os.replace(beside, path)
    except OSError as e:
        raise model.UserError(f"--save {folder}: {e.strerror or e}; give a folder that can be "
                              "written to") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def fits(b, d_c, config):
    """Whether a basis has d_c columns for this model and numbers that can be computed with."""
    whole = b.down.shape == b.up.T.shape == (d_c, config.kv_width)
    if b.turns is not None:
        first, half = b.turns[:d_c // 2], config.head_dim // 2
        whole &= b.turns.dtype == torch.int64
        whole &= torch.equal(b.turns, torch.cat((first, first + half)))
        whole &= bool(((first >= 0) & (first < half)).all())
    return whole and (b.down @ b.up).isfinite().all()


def load_bases(folder, llama):
    """The plan and the bases in folder/bases.safetensors. Raises UserError if they do not fit."""
    from safetensors import safe_open
    path, L, d_max = Path(folder) / "bases.safetensors", llama.config.layers, llama.config.kv_width
    own = model.share(L)
    if not path.is_file():
        raise model.UserError(f"{folder} holds no {path.name}; give the folder that --save wrote")
    try:
        with safe_open(path, "pt") as f:
            about, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
        saved = json.loads(about["plan"])
        kappa, ranks = ([(a, b) for a, b in saved[name]] for name in ("log_kappa", "ranks"))
        shape, numbers = fingerprint(llama)
        if about["model"] != shape or not torch.allclose(tensors["model"], numbers, 0.01, 1e-4):
            raise model.UserError(f"{path} was made for another model; make new ones with --save")
        good = len(kappa) == len(ranks) == L
        good &= all(type(x) is float for pair in kappa for x in pair)
        if not (good and all(type(x) is int and 1 <= x <= d_max for pair in ranks for x in pair)):
            raise ValueError
        like = llama.norm.weight

        def read(name):
            down, up, turns = (tensors.get(f"{name}.{part}") for part in Basis._fields)
            turns = turns if turns is None else turns.to(like.device)
            return Basis(down.to(like), up.to(like), turns)
        bases = [None if pair == (d_max, d_max) else
                 tuple(read(f"layers.{i}.{kind}") for kind in "kv")
                 for i, pair in list(enumerate(ranks))[own]]
        if not all(fits(b, d_c, llama.config)
                   for pair, dims in zip(bases, ranks[own]) if pair for b, d_c in zip(pair, dims)):
            raise ValueError
    except model.UserError:
        raise
    except Exception:                               # anything at all can be wrong with a file
        raise model.UserError(f"{path} holds no bases that can be read; make some with --save"
                              ) from None
    return Plan(kappa, log_kappa_tilde([k + v for k, v in kappa]), ranks, d_max), bases


# The command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage: what is wrong and where to look."""
        if os.environ.get("RANK", "0") != "0":          # torchrun: the first says it for all
            time.sleep(1)
            self.exit(2)
        self.exit(2, f"{Path(self.prog).stem}: {' '.join(message.split()):.400} (see --help)\n")


def within(kind, low, high, what):
    """An argparse type: a number of `kind` from low to high."""
    def read(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"should be a {what}, not {text!r:.40}")
    return read


def nonempty(text):
    """An argparse type: a name, not the empty text that an unset variable of the shell leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("should not be empty")
    return text


PLAN_FLAGS = "kept d_min threshold schedule skip split basis calibrate".split()
SPEAK_FLAGS = "max_new_tokens temperature top_p seed chat compile".split()
DEFAULTS = {"cache": "compressed", "kept": 0.6, "threshold": math.inf, "skip": 0, "split": 0.0,
            "sinks": 4, "window": 32, "bits": 16, "max_new_tokens": 128, "temperature": 0.0,
            "top_p": 1.0, "seed": 0}


def command_line():
    """Every flag. None means not given: `settle` needs to know, and fills in the defaults."""
    p = Parser(prog="lorc.py", description="LoRC and CSKV: a LLaMA that keeps a low-rank KV cache.",
               allow_abbrev=False)
    count = within(int, 0, 10**9, "count up to 10^9")
    positive = within(int, 1, 10**9, "positive count up to 10^9")
    fraction = within(float, 1e-6, 1, "fraction in (0, 1]")
    more = within(int, 2, 10**9, "count > 1")
    flag = p.add_argument
    flag("--model", type=nonempty, default=str(Path(__file__).resolve().parent / "tiny"),
         metavar="PATH",
         help="A folder in Hugging Face layout, or a Hub id. Default: tiny/ beside lorc.py.")
    group = p.add_argument_group("what to do")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--prompt", action="append", metavar="TEXT",
         help="Continue this text; repeatable; - reads standard input.")
    flag("--perplexity", type=nonempty, metavar="FILE",
         help="Score this text under the chosen cache.")
    flag("--plan", action="store_true", help="Print kappa, kappa~ and d_c per layer and stop.")
    flag = group.add_argument
    flag("--compare", action="store_true", help="Run all three caches and print them side by side.")
    flag("--save", type=nonempty, metavar="DIR",
         help="Write bases and plan to DIR/bases.safetensors.")
    flag("--json", action="store_true", help="Print one JSON object instead of text.")
    group = p.add_argument_group("the cache")
    flag = group.add_argument
    flag("--cache", choices=["full", "compressed", "bibranch"],
         help="What is kept. Default: compressed.")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--kept", type=fraction, metavar="F",
         help="rho, the fraction of the full cache's numbers that latents keep. Default: 0.6.")
    flag("--d-min", type=positive, metavar="N",
         help="d_min of Eq. 13, instead of --kept; rounded as all ranks are.")
    flag = group.add_argument
    flag("--threshold", type=within(float, -math.inf, math.inf, "number"), metavar="F",
         help="Alg. 1, l. 8: layers whose ln kappa~ is above stay full. Default: none.")
    flag("--schedule", choices=["progressive", "uniform"],
         help="Eq. 13, or the same d_c everywhere. Default: progressive; uniform with --calibrate.")
    flag("--skip", type=count, metavar="N", help="Leave the first N layers full. Default: 0.")
    flag("--split", type=within(float, -1, 1, "number in [-1, 1]"), metavar="F",
         help="Kept fraction moved from keys to values. Default: 0.")
    flag("--basis", choices=["svd", "norm", "asvd", "whitened", "commuting"],
         help="C: I, gamma^2, mean |x|, E[xx^T]. Default: svd; whitened with --calibrate. "
              "commuting: keys that need no rebuilding, from I or, with --calibrate, E[xx^T].")
    flag("--calibrate", type=nonempty, metavar="FILE",
         help="Text for asvd, whitened and commuting; its first 32 windows of up to 1,024 tokens "
              "are used.")
    flag("--bases", type=nonempty, metavar="DIR",
         help="Use the bases and the plan that --save wrote.")
    flag("--sinks", type=count, metavar="N",
         help="Exact first tokens of the bi-branch cache; left out of calibration. Default: 4.")
    flag("--window", type=count, metavar="N",
         help="Exact last tokens of the bi-branch cache. Default: 32.")
    flag("--bits", type=within(int, 4, 16, "number, 16 or 4"), choices=[16, 4],
         help="Of a bi-branch latent; 16 stands for the model's own dtype. Default: 16.")
    flag = p.add_argument_group("running").add_argument
    flag("--max-new-tokens", type=positive, metavar="N", help="Default: 128.")
    flag("--temperature", type=within(float, 0, 1e3, "number >= 0"), metavar="F",
         help="0 is greedy. Default: 0.")
    flag("--top-p", type=fraction, metavar="F",
         help="Draw from the smallest set of tokens with this probability. Default: 1.")
    flag("--seed", type=count, metavar="N", help="Default: 0.")
    flag("--chat", action="store_true", help="Wrap the prompt in the model's own chat template.")
    flag("--compile", action="store_true",
         help="Compile the decode step: slow to start, then fast; on CUDA one graph. A bi-branch "
              "cache decodes uncompiled until its window is full.")
    flag("--context", type=more, metavar="N",
         help="Window length for --perplexity. Default: the model's maximum.")
    flag("--max-tokens", type=more, metavar="N", help="Score only the first N tokens.")
    flag("--dtype", choices=["float32", "bfloat16", "float16"],
         help="Default: the checkpoint's on CUDA, float32 on the CPU.")
    flag("--device", type=nonempty, help="cpu or cuda. Default: cuda where there is one.")
    return p


def settle(p, args):
    """Refuse flags that contradict each other or would do nothing, and fill in the defaults."""
    given = [name for name, value in vars(args).items() if value is not None and value is not False]

    def leave_out(flags, why):
        if found := [f"--{name.replace('_', '-')}" for name in flags if name in given]:
            p.error(f"{why}; leave out {', '.join(found)}")
    if not {"prompt", "perplexity", "plan", "save"} & set(given):
        p.error("nothing to do: give --prompt TEXT, --perplexity FILE, --plan or --save DIR")
    if [*(args.prompt or ()), args.perplexity, args.calibrate].count("-") > 1:
        p.error("standard input can be read once; give one -")
    if args.bases is not None:
        leave_out([*PLAN_FLAGS, "save"], "--bases brings its own plan")
    if args.compare:
        leave_out(["cache"], "--compare runs all three caches")
    if args.cache == "full" and args.save is None:
        leave_out([*PLAN_FLAGS, "bases"], "--cache full keeps everything")
    if args.cache != "bibranch" and not args.compare:
        leave_out(["window", "bits"] + ["sinks"] * (args.calibrate is None),
                  "only --cache bibranch has two branches, and only --calibrate leaves sinks out")
    if args.prompt is None and args.perplexity is None:
        leave_out(["compare", "cache", "window", "bits"],
                  "no cache is filled without --prompt or --perplexity")
    if args.perplexity is None:
        leave_out(["context", "max_tokens"], "nothing is scored without --perplexity")
    if args.prompt is None:
        leave_out(SPEAK_FLAGS, "nothing is said without --prompt")
    if args.max_new_tokens == 1:
        leave_out(["compile"], "the only new token comes with the prompt")
    if not args.temperature:
        leave_out(["top_p", "seed"], "nothing is drawn at temperature 0")
    if args.basis in ("svd", "norm"):
        leave_out(["calibrate"], f"--basis {args.basis} uses no text")
    if args.basis in ("asvd", "whitened") and args.calibrate is None:
        p.error(f"--basis {args.basis} needs --calibrate FILE")
    calibrated = args.calibrate is not None
    defaults = DEFAULTS | {"basis": "whitened" if calibrated else "svd",
                           "schedule": "uniform" if calibrated else "progressive"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def read_text(path):
    """A text file, or standard input for -; a line ends with one newline, also where it had CR LF.

    Raises UserError when there is no text in it.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" and sys.stdin else Path(path).read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n")
    except OSError as e:
        raise model.UserError(f"{name}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise model.UserError(f"{name} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise model.UserError(f"{name} holds no text")
    return text


def open_model(args):
    """The model and its tokenizer, on the device and in the dtype asked for. Raises UserError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model.place()[1] > 1 and args.compile:
        raise model.UserError("--compile is for one process; leave it out under torchrun")
    if model.place()[1] > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise model.UserError(f"--device {device} is one card, and torchrun gives each process "
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
        raise model.UserError(f"--device {device} cannot be used{f' with {name}' if name else ''}; "
                              f"here: {', '.join(here)}") from None
    folder = model.find_model(args.model)
    llama = model.load(folder, dtype, device)
    return llama, model.Tokenizer(folder, llama.config)


def read_prompt(args, llama, tokenizer, prompt):
    """Token ids of one --prompt. Raises UserError when it is empty or past the context."""
    prompt = read_text("-") if prompt == "-" else prompt
    ids = tokenizer.chat(prompt) if args.chat else tokenizer.encode(prompt)
    limit = llama.config.context
    if not tokenizer.fast.decode(ids).strip():
        raise model.UserError("the prompt is empty or holds only special tokens; give some text")
    if len(ids) > limit:
        raise model.UserError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; "
                              "shorten it")
    return ids


def read_score(args, llama, tokenizer):
    """Token ids of the --perplexity text. Raises UserError when it cannot be scored as asked."""
    if args.context > llama.config.context:
        raise model.UserError(f"--context {args.context} is beyond the model's "
                              f"{llama.config.context} positions")
    tokens = tokenizer.encode(read_text(args.perplexity))[:args.max_tokens]
    if min(len(tokens), args.context) < 2:
        raise model.UserError(f"{args.perplexity} is too short to score, or the context is")
    return tokens


def read_jobs(args, llama, tokenizer):
    """Token ids of each --prompt, or of the --perplexity text."""
    if args.perplexity is not None:
        return [read_score(args, llama, tokenizer)]
    return [read_prompt(args, llama, tokenizer, p) for p in args.prompt or []]


def choose_bases(args, llama, tokenizer):
    """Plan and bases as the flags ask: loaded, or Alg. 1 with the C of --basis."""
    if args.bases is not None:
        return load_bases(args.bases, llama)
    d_max, moments = llama.config.kv_width, None
    if args.skip >= llama.config.layers:
        raise model.UserError(f"--skip {args.skip} leaves none of the model's "
                              f"{llama.config.layers} layers to compress")
    if args.d_min and args.d_min > d_max:
        raise model.UserError(f"--d-min {args.d_min} is above the KV width G*d = {d_max}")
    if args.basis == "norm":
        moments = norm_moments(llama)
    if args.calibrate is not None:
        tokens = model.from_first(lambda: tokenizer.encode(read_text(args.calibrate)))
        context = min(1024, llama.config.context)
        usable = sum(max(0, min(context, len(tokens) - i) - args.sinks)
                     for i in range(0, min(len(tokens), 32 * context), context))
        if usable < d_max:
            raise model.UserError(f"{args.calibrate} gives {usable} tokens after the sinks of each "
                                  f"window; calibrating needs {d_max}, and gains from 30,000")
        tokens = torch.tensor(tokens, device=llama.norm.weight.device)
        moments = calibrated_moments(llama, tokens, args.basis, args.sinks, context)
    return lorc(llama, args.kept, args.d_min, args.threshold, args.schedule, args.skip, args.split,
                moments, args.basis == "commuting")


def held(llama, caches, kind, plan):
    """Bytes of the buffers held, of a full cache for as many tokens, and the plan's fraction."""
    peak = [torch.cuda.max_memory_allocated()] if llama.norm.weight.is_cuda else []
    return {"kind": kind, "bytes": sum(model.gather([c.nbytes for c in caches])),
            "full_bytes": full_bytes(llama, caches[0].capacity),
            "dtype": str(llama.norm.weight.dtype)[6:],
            "kept": 1.0 if kind == "full" else plan.kept} | (
                {"memory": model.gather(peak)} if peak else {})


def speak(args, llama, tokenizer, ids, caches, bases, write):
    """Continue one prompt; `write` is given the text as it comes. Returns what happened."""
    stream, out, tokens, errors = model.Stream(tokenizer, ids), [], [], []
    start, marks = torch.tensor([ids], device=llama.norm.weight.device), [time.perf_counter()]
    n, status = caches[0].capacity + 1 - len(ids), "ok"
    steps = generate(llama, caches, start, n, tokenizer.ends, args.temperature, args.top_p,
                     args.seed, args.compile)
    try:
        with measuring(llama, bases) as errors:
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
            "status": status, "prefill": marks[1] - marks[0], "decode": marks[2] - marks[1]}


def score(args, llama, tokens, make_caches, bases):
    """Perplexity of a text under one cache."""
    start = time.perf_counter()
    with measuring(llama, bases) as errors:
        nats, count = negative_log_likelihood(llama, tokens, args.context, make_caches)
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
            return new_caches(llama, kind, capacity, bases, strict=True, **options)
        result = score(args, llama, job, make, bases)
        caches = make(min(args.context, len(job)))                # only counted
    else:
        n = min(args.max_new_tokens, llama.config.context - len(job) + 1)
        caches = new_caches(llama, kind, len(job) + n - 1, bases, **options)
        result = speak(args, llama, tokenizer, job, caches, bases, write)
    errors = model.gather(result["errors"])
    return result | {"errors": errors, "cache": held(llama, caches, kind, plan)}


def run(args):
    """One command, from the model's folder to the report. Returns the exit status."""
    marks, plan, runs = [time.perf_counter()], None, []
    texts = [file for file in (args.perplexity, args.calibrate) if file not in (None, "-")]
    for missing in model.from_first(lambda: [x for x in texts if not os.path.exists(x)]):
        raise model.UserError(f"{missing}: No such file or directory")     # before the model's time
    llama, tokenizer = open_model(args)
    args.context = args.context or llama.config.context
    jobs = model.from_first(lambda: read_jobs(args, llama, tokenizer))
    marks.append(time.perf_counter())
    bases = [None] * len(llama.layers)
    if args.cache != "full" or args.compare or args.plan or args.save is not None:
        plan, bases = choose_bases(args, llama, tokenizer)
    marks.append(time.perf_counter())
    if args.save is not None:
        save_bases(args.save, llama, plan, bases)
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


# The report --------------------------------------------------------------------------------------

def report(args, plan, runs, seconds):
    """The result for a program (--json, on standard output) or for a reader (on standard error)."""
    compressed = [r["errors"] for r in runs if r["cache"]["kind"] != "full" and r["errors"]]
    errors = [tuple(map(max, zip(*layer))) for layer in zip(*compressed)]     # worst of all prompts
    rows = plan_rows(plan, errors) if plan else []
    if args.json:
        print(json.dumps({"model": args.model, "plan": rows} | as_json(args, runs, seconds)))
        return
    to = sys.stdout if args.plan else sys.stderr
    if rows:
        print_plan(rows, plan, to)
    if args.compare:
        print_comparison(runs)
    for r in runs if not args.compare else []:
        if "perplexity" in r:
            print(f"perplexity {r['perplexity']:.4f}")
        c = r["cache"]
        spent = seconds | {"prefill": r["prefill"], "decode": r["decode"]}
        print(f"{c['kind']} cache: {size(c['bytes'])} held ({c['bytes']:,} bytes), "
              f"a full one in {c['dtype']} {size(c['full_bytes'])} ({c['full_bytes']:,}): "
              f"{c['bytes'] / c['full_bytes']:.1%}\n"
              f"{r['tokens']} tokens; seconds: "
              + ", ".join(f"{k} {s:.2f}" for k, s in spent.items())
              + " (compiling included)" * bool(args.compile)
              + ("\npeak memory: " + ", ".join(map(size, c["memory"])) if "memory" in c else ""),
              file=sys.stderr)
    for status in sorted({r["status"] for r in runs} - {"ok"}):
        print({"context": "stopped at the model's context: it was made for no more positions",
               "interrupted": "interrupted"}[status], file=sys.stderr)
    worst = max((max(e) for e in errors), default=0)
    two = [r["cache"] for r in runs if r["cache"]["kind"] == "bibranch"]
    if two and all(c["kept"] < 1 and c["bytes"] == c["full_bytes"] for c in two):
        print("Every token fits into sinks and window: the bi-branch cache compressed nothing "
              "here.", file=sys.stderr)
    elif args.cache == "bibranch" or args.compare:
        print("The errors are of the low-rank part alone: exact tokens have none, and rounding to "
              "4 bits is not in them.", file=sys.stderr)
    elif worst > 0.3:
        print(f"On this text the worst layer loses {worst:.0%} of its keys or values: read the "
              "text with care. --cache bibranch"
              f"{' with --calibrate FILE' * (args.calibrate is None)} repairs most of it.",
              file=sys.stderr)


def plan_rows(plan, errors):
    """The plan as the table's and the JSON's rows: one dict a layer."""
    layers = zip(plan.log_kappa, plan.log_tilde, plan.ranks)
    return [{"layer": i, "log_kappa_k": k, "log_kappa_v": v, "log_kappa": k + v,
             "log_kappa_tilde": t, "d_k": d_k, "d_v": d_v, "kept": (d_k + d_v) / (2 * plan.d_max)}
            | ({"error_k": errors[i][0], "error_v": errors[i][1]} if errors else {})
            for i, ((k, v), t, (d_k, d_v)) in enumerate(layers)]


def as_json(args, runs, seconds):
    """What was run, as README lists it. Prompts give a list of texts; --compare three objects."""
    def one(results):
        texts = [r["text"] for r in results if "text" in r]
        return ({"cache": max((r["cache"] for r in results), key=lambda c: c["full_bytes"])}
                | ({"text": texts[0] if len(texts) == 1 else texts} if texts else {})
                | {"perplexity": r["perplexity"] for r in results if "perplexity" in r}
                | {"tokens": sum(r["tokens"] for r in results),
                   "status": next((r["status"] for r in results if r["status"] != "ok"), "ok"),
                   "seconds": seconds | {k: sum(r[k] for r in results)
                                         for k in ("prefill", "decode")}})
    kinds = list(dict.fromkeys(r["cache"]["kind"] for r in runs))
    found = [one([r for r in runs if r["cache"]["kind"] == kind]) for kind in kinds]
    if args.compare:
        return {"compare": found, "agree": {k: agreement(runs, k) for k in kinds if args.prompt}}
    return found[0] if found else {"seconds": seconds}


def agreement(runs, kind):
    """How many tokens of each prompt equal the full cache's before the first difference."""
    ids = {k: [r["ids"] for r in runs if r["cache"]["kind"] == k] for k in ("full", kind)}
    return [sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b)))
            for a, b in zip(ids[kind], ids["full"])]


def size(n):
    """Bytes for a reader: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def print_plan(rows, plan, to):
    """The table of layers: Eq. 10, Eq. 12, Eq. 13, and the error measured on the user's text."""
    measured = "error_k" in rows[0]
    print("layer  ln k(Wk)  ln k(Wv)   ln k~   d_k   d_v   kept"
          + "  |k-k~|/|k|  |v-v~|/|v|" * measured, file=to)
    for r in rows:
        print(f"{r['layer']:5d}  {r['log_kappa_k']:8.2f}  {r['log_kappa_v']:8.2f}  "
              f"{r['log_kappa_tilde']:6.1f}  {r['d_k']:4d}  {r['d_v']:4d}  {r['kept']:5.3f}"
              + (f"  {r['error_k']:10.3f}  {r['error_v']:10.3f}" if measured else ""), file=to)
    print(f"kept {plan.kept:.4f} of the full cache's numbers (d_max {plan.d_max})", file=to)


def print_comparison(runs):
    """The three caches side by side, on standard output: the table is the result."""
    print("cache              bytes  of full  prefill s  decode s")
    for kind in dict.fromkeys(r["cache"]["kind"] for r in runs):
        of_kind = [r for r in runs if r["cache"]["kind"] == kind]
        agree = agreement(runs, kind) if "ids" in of_kind[0] else [0]
        for r, same in zip(of_kind, agree):
            c = r["cache"]
            last = (f"perplexity {r['perplexity']:.4f}" if "perplexity" in r
                    else f"first {same} of {r['tokens']} tokens as with the full cache")
            print(f"{kind:10s}  {c['bytes']:12,}  {c['bytes'] / c['full_bytes']:7.1%}  "
                  f"{r['prefill']:9.2f}  {r['decode']:8.2f}  {last}")
    for r in runs:
        if "text" in r:
            print(f"\n--- {r['cache']['kind']}\n{r['text']}")


def answer(name, work):
    """The status of work(): 2 and one line for what the user can mend, 130 after Ctrl-C, 141 when
    the reader of standard output (`| head`) has gone."""
    try:
        heavy_imports()
        with torch.inference_mode(), model.processes():
            status = work()
        print(end="", flush=True)                      # standard output may be closed
        return status
    except KeyboardInterrupt:
        return 130
    except OSError as e:                     # what waits to be written must not fail again at exit
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return 141
        message = str(e)
    except UnicodeEncodeError as e:
        message = (f"standard output takes only {e.encoding}, and the text has "
                   f"{e.object[e.start]!a}; set PYTHONIOENCODING=utf-8")
    except model.UserError as e:
        message = str(e)
    except (MemoryError, RuntimeError) as e:        # PyTorch says it of the CPU with a RuntimeError
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        message = "not enough memory for this model, text and number of new tokens; ask for less"
    print(f"{name}: {' '.join(message.split()):.400}", file=sys.stderr)
    return 2


def main(argv=None):
    """The command line; `answer` says what the status means."""
    parser = command_line()
    args = settle(parser, parser.parse_args(argv))
    return answer("lorc", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
heavy_imports()
