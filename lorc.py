"""LoRC: low-rank compression of the KV cache, to be read beside the paper (Zhang et al., 2024).

    paper                           here
    ------------------------------  -----------------------------------------------------------
    Eqs. 5, 6, 8: SVD               svd_factors (literal); spectrum, basis (the same, faster)
    Eqs. 7, 9: folding U            cache.Basis (Eq. 9 for each head; Eq. 7 is impossible [E4])
    Eq. 10: condition number        log_kappa
    Eq. 12: cumulative condition    log_kappa_tilde
    Eq. 13: compressed dimension    compressed_dimension, round_ranks
    Algorithm 1                     compress = make_plan (lines 1-11) + make_bases (lines 12-18)
    Eq. 4: size of a full cache     full_cache_bytes
    rho, the compression ratio      kept: the fraction of the numbers that is kept [E13]

Eqs. 1-3 are in model.py and cache.py, Eqs. 14-19 in theory.py; the loss metric is at the end here.
[E1] to [E34] are the errata in experiments/README.md. Logarithms are natural [E8].

    import lorc, model
    llama = model.load("tiny")                                 # a folder in Hugging Face layout
    plan, bases = lorc.compress(llama, kept=0.6)               # Algorithm 1
    caches = lorc.new_caches(llama, "compressed", capacity=200, bases=bases)
    tokens = list(lorc.generate(llama, caches, prompt, n=50))  # prompt (B, T) token ids
"""
import sys

if __name__ == "__main__":
    sys.path.insert(0, __file__.rpartition("/")[0] or ".")        # absent if PYTHONSAFEPATH=1
    from runtime.cli import main
    sys.exit(main())

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cache import Basis, BiBranchCache, CompressedCache, FullCache
from model import Block, UserError


# Sec. 4.1: compressing one layer -----------------------------------------------------------------

def svd_factors(W, d_c):
    """Eq. 5, Eq. 6, Eq. 8, literally: the best approximation U (Sigma V^T) of W of rank d_c.

    W (G*d, D) is Wk or Wv with the rows of all G heads, as nn.Linear stores it. Returns
    U (G*d, d_c), whose columns are orthonormal, and Sigma V^T (d_c, D). The cache then keeps
    (Sigma V^T) x instead of W x. The paper's U is D x d_c, because it sets G*d = D [E3].
    """
    U, sigma, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :d_c], sigma[:d_c, None] * Vt[:d_c]


def spectrum(W, C=None, M=None):
    """Eigenvalues (m,), descending, and eigenvectors (m, m) of M^1/2 W C W^T M^1/2, W (m, n).

    C is the second moment E[x x^T] of the inputs: (n, n), or (n,) if diagonal. M (m, m) weights the
    error. None means the identity. With neither, the eigenvalues are sigma^2 and the eigenvectors
    U of W = U Sigma V^T, so this is the SVD, computed from a small Gram matrix. float64 is needed
    because the Gram matrix has the square of W's condition number.
    """
    W = W.double() if M is None else square_root(M)[0] @ W.double()
    WC = W if C is None else W * C.double() if C.dim() == 1 else W @ C.double()
    lam, U = torch.linalg.eigh(WC @ W.T)
    return lam.flip(0).clamp(min=0), U.flip(1)


def square_root(M):
    """M^1/2 and M^-1/2 of a positive definite matrix, in float64."""
    lam, Q = torch.linalg.eigh(M.double())
    return (Q * lam.sqrt()) @ Q.T, (Q * lam.rsqrt()) @ Q.T


def basis(W, d_c, C=None, M=None):
    """The map of rank d_c with the least expected error E (y - y~)^T M (y - y~) of y = W x.

    Without C and M this is LoRC's SVD: down = U^T, up = U, and the latent U^T (W x) equals
    (Sigma V^T) x [E1]. theory.expected_error has the proof."""
    U = spectrum(W, C, M)[1][:, :d_c]
    down, up = U.T, U
    if M is not None:
        root, inverse = square_root(M)
        down, up = U.T @ root, inverse @ U
    return Basis(down.to(W.dtype).contiguous(), up.to(W.dtype).contiguous())


# Sec. 4.2: how much of each layer is kept --------------------------------------------------------

def log_kappa(W):
    """ln of the condition number sigma_1 / sigma_p of W (m, n), p = min(m, n): Eq. 10.

    W need not be square or of full rank, so Eq. 10's inverse may not exist [E6]. sigma_p is raised
    to the smallest value that float64 resolves through the Gram matrix, so the result is finite.
    """
    lam = spectrum(W)[0]
    relative = (lam[min(W.shape) - 1] / lam[0]).nan_to_num(0)
    return -0.5 * math.log(relative.clamp(min=max(W.shape) * torch.finfo(lam.dtype).eps))


def log_kappas(llama):
    """(ln kappa(Wk), ln kappa(Wv)) of each layer of the model."""
    return [(log_kappa(layer.attn.Wk.weight), log_kappa(layer.attn.Wv.weight))
            for layer in llama.layers]


def log_kappa_tilde(log_kappas):
    """ln kappa~_l = sum over layers l..L of ln kappa(Wk) + ln kappa(Wv): Eq. 12.

    log_kappas: the pair of each layer. The product would overflow, its logarithm does not [E7]."""
    per_layer = [k + v for k, v in log_kappas]
    return [sum(per_layer[layer:]) for layer in range(len(per_layer))]


def compressed_dimension(log_tilde, d_max, d_min, schedule="progressive"):
    """d_c of each layer as a real number: Eq. 13. It never grows with depth, since kappa >= 1 [E9].

    The schedule "uniform", the paper's baseline, gives d_min to every layer."""
    if schedule == "uniform":
        return [float(d_min)] * len(log_tilde)
    lowest, highest = min(log_tilde), max(log_tilde)
    if highest == lowest:
        return [float(d_max)] * len(log_tilde)                            # Eq. 13 is 0/0 here [E9]
    return [d_max * (1 - (highest - x) / (highest - lowest) * (1 - d_min / d_max))
            for x in log_tilde]


def round_ranks(d_c, full, d_max, split=0.0, pairs=False):
    """Integer ranks (d_k, d_v) of each layer, from the real d_c of Eq. 13 [E9].

    full: whether each layer is left uncompressed. split * d_max is moved from keys to values.
    Ranks are multiples of rank_multiple(d_max), and d_k is even if `pairs`."""
    def nearest(x, multiple):
        return min(d_max, multiple * max(1, round(x / multiple)))
    step = rank_multiple(d_max)
    return [(d_max, d_max) if is_full else
            (nearest(d - split * d_max, max(step, 2 if pairs else 1)),
             nearest(d + split * d_max, step))
            for d, is_full in zip(d_c, full)]


def rank_multiple(d_max):
    """8 for wide models, because GPUs multiply matrices of such sizes fastest; otherwise 1."""
    return 8 if d_max >= 1024 and d_max % 8 == 0 else 1


def solve_d_min(kept, ranks_of, d_max):
    """The d_min for which ranks_of(d_min) keeps `kept`, up to rounding, found by bisection.

    ranks_of: d_min -> [(d_k, d_v)]. Raises UserError if no d_min in [1, d_max] does."""
    def fraction(d_min):
        return Plan([], [], ranks_of(d_min), d_max).kept
    low, high, slack = 1.0, float(d_max), 0.5 * rank_multiple(d_max) / d_max
    if not fraction(low) - slack <= kept <= fraction(high) + slack:
        lowest, highest = math.ceil(1e3 * fraction(low)) / 1e3, fraction(high)
        raise UserError(f"kept {kept:g} cannot be reached; with this schedule, skip, threshold "
                        f"and split, choose a value from {lowest:g} to {highest:.4g}")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) < kept else (low, middle)
    return min(low, high, key=lambda d: abs(fraction(d) - kept))


# Algorithm 1 -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """The ranks of all layers, and their condition numbers."""
    log_kappa: list         # (ln kappa(Wk), ln kappa(Wv)): Eq. 10
    log_kappa_tilde: list   # ln kappa~_l: Eq. 12
    ranks: list             # (d_k, d_v): Eq. 13, or sort_ranks
    d_max: int              # G*d, the rank of an uncompressed layer [E10]

    @property
    def kept(self) -> float:
        """The fraction of a full cache's numbers that is kept: the paper's rho [E13]."""
        return sum(d_k + d_v for d_k, d_v in self.ranks) / (2 * len(self.ranks) * self.d_max)


def compress(llama, moments=None, key_basis=None, **options):
    """Algorithm 1. Returns the Plan, and for each layer a pair of bases (keys, values) or None.

    moments, key_basis: as in make_bases. options: those of make_plan, such as kept=0.6."""
    plan = make_plan(log_kappas(llama), llama.config.kv_width, **options)
    return plan, make_bases(llama, plan.ranks, moments, key_basis)


def make_plan(log_kappas, d_max, kept=0.6, d_min=None, threshold=math.inf, schedule="progressive",
              skip=0, split=0.0, pairs=False):
    """Algorithm 1, lines 1-11: the Plan, from (ln kappa(Wk), ln kappa(Wv)) of each layer.

    kept: the fraction to keep, from which d_min is found if it is not given. Layers whose
    ln kappa~ is above `threshold` [E8], and the first `skip` layers, are left full. split: the
    fraction of d_max moved from keys to values. pairs: make d_k even. Raises UserError.
    """
    if schedule not in ("progressive", "uniform"):
        raise UserError(f"schedule must be 'progressive' or 'uniform', not {schedule!r}")
    if d_min is not None and not 1 <= d_min <= d_max:
        raise UserError(f"d_min must be between 1 and d_max = {d_max}, not {d_min}")
    if math.isnan(threshold) or skip < 0:
        raise UserError(f"threshold {threshold} must be a number, and skip {skip} at least 0")
    log_tilde = log_kappa_tilde(log_kappas)                                        # lines 1-5
    full = [x > threshold or layer < skip for layer, x in enumerate(log_tilde)]    # lines 8-11

    def ranks_of(d_min):                                                           # line 7
        d_c = compressed_dimension(log_tilde, d_max, d_min, schedule)
        return round_ranks(d_c, full, d_max, split, pairs)
    if d_min is None:
        d_min = solve_d_min(kept, ranks_of, d_max)
    return Plan(log_kappas, log_tilde, ranks_of(d_min), d_max)


def make_bases(llama, ranks, moments=None, key_basis=None):
    """Algorithm 1, lines 12-18: the bases (keys, values) of each layer, None where it is full.

    moments: C of each layer's inputs, None for the paper's SVD. key_basis(layer, d_k, C) may
    replace `basis` for keys. Line 15 is impossible [E4], and line 19 may enlarge W_o [E5].
    """
    moments, bases = moments or [None] * len(ranks), []
    if any(C is not None and not C.isfinite().all() for C in moments):
        raise ValueError("moments must be finite")
    for layer, (d_k, d_v), C in zip(llama.layers, ranks, moments, strict=True):
        Wk, Wv = layer.attn.Wk.weight, layer.attn.Wv.weight
        if d_k == d_v == llama.config.kv_width:
            bases.append(None)
            continue
        K = key_basis(layer, d_k, C) if key_basis else basis(Wk, d_k, C)           # lines 13, 14
        bases.append((K, basis(Wv, d_v, C)))                                       # lines 16-18
    return bases


# Generation --------------------------------------------------------------------------------------

def new_caches(llama, kind, capacity, bases=None, B=1, **options):
    """One empty cache for each layer, for B sequences of at most `capacity` tokens.

    kind: "full", "compressed" or "bibranch". A layer whose entry in `bases` is None has a full
    cache. options: those of cache.BiBranchCache. Raises ValueError for a wrong kind or no bases.
    """
    c, like = llama.config, llama.norm.weight
    if kind not in ("full", "compressed", "bibranch"):
        raise ValueError(f"kind must be 'full', 'compressed' or 'bibranch', not {kind!r}")
    if kind != "full" and (bases is None or len(bases) != len(llama.layers)):
        raise ValueError(f"a {kind} cache needs bases for each of the {len(llama.layers)} layers")

    def new_cache(pair):
        if kind == "full" or pair is None:
            return FullCache(B, capacity, c.kv_heads, c.head_dim, like.dtype, like.device)
        if kind == "compressed":
            return CompressedCache(B, capacity, *pair, c.head_dim)
        return BiBranchCache(B, capacity, *pair, c.head_dim, **options)
    return [new_cache(pair) for pair in bases or [None] * len(llama.layers)]


def full_cache_bytes(llama, capacity, B=1):
    """Bytes of all layers' full caches: twice Eq. 4 for each [E14], in the dtype of the weights."""
    c = llama.config
    return 2 * B * capacity * c.kv_width * c.layers * llama.norm.weight.element_size()


def sample(logits, temperature, top_p, generator):
    """The next token (B,) from logits (B, V): the most likely one at temperature 0, else one drawn
    from the smallest set of most likely tokens whose probability reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.double() / max(temperature, 1e-100)).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def generate(llama, caches, tokens, n, ends=(), temperature=0.0, top_p=1.0, seed=0, step=None):
    """Yield the next token (B,) of each sequence in `tokens` (B, T), at most n times.

    Generation ends early when every sequence has produced a token in `ends`; all go on until then.
    `step` may replace the model: tokens (B, T) -> logits (B, V) of the last. The first token raises
    ValueError if caches or context are too small for what is cached and T + n - 1 more tokens.
    """
    if not (temperature >= 0 and top_p > 0):
        raise ValueError(f"temperature {temperature} must be at least 0, and top_p {top_p} above 0")
    step = step or (lambda tokens: llama.head(llama.hidden(tokens, caches)[:, -1]))
    total = caches[0].length + tokens.shape[1] + n - 1
    room = min(llama.config.context, *(cache.capacity for cache in caches))
    if total > room:
        raise ValueError(f"{total} positions are needed; caches and context have room for {room}")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    ends, ended = torch.tensor(sorted(ends), device=tokens.device), False
    for _ in range(n):
        new = sample(step(tokens), temperature, top_p, generator)
        yield new
        ended = ended | torch.isin(new, ends)
        if ended.all():
            return
        tokens = new[:, None]


# Beyond LoRC: bases for the inputs that occur (ASVD, CSKV) ----------------------------------------

def norm_moments(llama):
    """C = diag(gamma^2) of each layer, as if RMSNorm's inputs were white; gamma is its weight."""
    return [layer.attn_norm.weight.double() ** 2 for layer in llama.layers]


def calibrated_moments(llama, tokens, kind, sinks=4, context=1024, windows=32):
    """C of each layer's inputs, measured on text: tokens (N,).

    kind "asvd": diag(mean |x|), where CSKV starts (ASVD with alpha = 1/2). kind "whitened":
    E[x x^T], whose basis is the optimum of CSKV's layer-wise fine-tuning [E30]. The first `sinks`
    positions of a window are left out: their inputs are unlike all others. Sums are in float64."""
    if kind not in ("asvd", "whitened"):
        raise ValueError(f"kind must be 'asvd' or 'whitened', not {kind!r}")
    sums, count = dict.fromkeys(llama.layers, 0.0), 0

    def add(layer, h, cache, rope):                # called in place of the layer
        x = layer.attn_norm(h)[:, sinks:].flatten(0, 1).double()                       # (n*T, D)
        sums[layer] += x.abs().sum(0) if kind == "asvd" else x.T @ x
        return layer(h, cache, rope)
    for x in split_windows(tokens, context, windows, sinks, "second moments"):
        llama.hidden(x, new_caches(llama, "full", x.shape[1], B=len(x)), add)
        count += x[:, sinks:].numel()
    return [total / count for total in sums.values()]


def split_windows(tokens, context, windows, exact, title):
    """Batches (n, T) of the first windows, of at most `context` and of more than `exact` tokens."""
    text = tokens[:windows * context]
    n = len(text) // context
    whole, rest = text[:n * context].view(n, context), text[None, n * context:]
    batches = [x for x in (*whole.split(8 if text.is_cuda else 1), rest)
               if len(x) and x.shape[1] > exact]
    if not batches:
        raise ValueError(f"no window of {context} in {len(tokens)} tokens has more than {exact}")
    return tqdm(batches, title, leave=False, delay=5, mininterval=5)


# Beyond both papers: bases and ranks in the metric of the loss ------------------------------------

def compress_for_loss(llama, tokens, kept=0.4, **options):
    """The loss metric: bases and ranks of least theory.predicted_divergence, as (Plan, bases).

    tokens (N,): sample text. options: those of fisher_factors, such as sinks, window, windows."""
    factors = fisher_factors(llama, tokens, **options)
    ranks, bases = sort_ranks(factors, kept), []
    eye = torch.eye(llama.config.kv_width).to(llama.norm.weight)
    for (d_k, d_v), (K, V) in zip(ranks, factors):
        full = d_k == d_v == len(eye)
        bases.append(None if full else (basis(eye, d_k, *K), basis(eye, d_v, *V)))
    kappas = log_kappas(llama)
    return Plan(kappas, log_kappa_tilde(kappas), ranks, len(eye)), bases


def fisher_factors(llama, tokens, sinks=4, window=32, context=1024, windows=48, seed=0,
                   recompute=True):
    """For the keys and for the values of each layer, the factors (C, M) of the Fisher information.

    Let the cache return A k instead of each key k (or value) that it stores compressed. G is the
    gradient, with respect to A at A = I, of a text's summed losses divided by the square root of
    its length, for labels drawn from the model. Its second moment is the Fisher information of A
    per token (theory.predicted_divergence). Each of the first `windows` texts of up to `context`
    tokens gives one G, through a bi-branch cache with these sinks and this `window`. Memory:
    weights, logits, all A and G, and the activations of one layer and the inputs of all, because
    layers are computed twice; without `recompute`, the activations of all layers."""
    eye, gradients = torch.eye(llama.config.kv_width).to(llama.norm.weight), []
    generator = torch.Generator(eye.device).manual_seed(seed)
    block = partial(checkpoint, use_reentrant=False) if recompute else Block.__call__
    for x in split_windows(tokens, context, windows, sinks + window, "gradients of the loss"):
        maps = [eye.repeat(len(x), 1, 1).requires_grad_() for _ in range(2 * len(llama.layers))]
        bases = [(Basis(eye, A_k), Basis(eye, A_v)) for A_k, A_v in zip(maps[::2], maps[1::2])]
        caches = new_caches(llama, "bibranch", x.shape[1], bases, len(x), sinks=sinks,
                            window=window, simulate_decoding=True)
        with torch.enable_grad():
            logits = llama.head(llama.hidden(x, caches, block)).flatten(0, 1).float()
            labels = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, labels, reduction="sum") / x.shape[1] ** 0.5
        gradients.append([G.cpu() for G in torch.autograd.grad(loss, maps)])
    factors = [kronecker_factors(torch.cat(G).to(eye.device)) for G in zip(*gradients)]
    return list(zip(factors[::2], factors[1::2]))


def kronecker_factors(G, rounds=3):
    """C and M with E[G_ij G_kl] close to M_ik C_jl, from samples G (n, m, m) of a random matrix.

    Maximum likelihood for a matrix normal distribution, by alternating M = E[G C^-1 G^T] / m and
    C = E[G^T M^-1 G] / m. 1 % of the mean eigenvalue is added to the diagonals of both."""
    G, eye = G.double(), torch.eye(G.shape[-1]).to(G.device, torch.float64)
    C = eye
    for _ in range(rounds):
        M = (G @ torch.linalg.inv(C) @ G.mT).mean(0) / len(eye)
        M += 0.01 * M.diagonal().mean() * eye
        C = (G.mT @ torch.linalg.inv(M) @ G).mean(0) / len(eye)
        C += 0.01 * C.diagonal().mean() * eye
    return C, M


def sort_ranks(factors, kept):
    """(d_k, d_v) of each layer: how many of the largest eigenvalues of M^1/2 C M^1/2 it has.

    Half an eigenvalue is what dropping it costs, in nats per token, whatever its layer. All are
    sorted in steps of rank_multiple(d_max), with at least one step for every matrix. No such ranks
    of equal sum cost less (theory.predicted_divergence). Raises UserError if `kept` is too low."""
    lam = [spectrum(torch.eye(len(C)).to(C), C, M)[0] for pair in factors for C, M in pair]
    step = rank_multiple(len(lam[0]))
    worth = torch.stack(lam).unflatten(1, (-1, step)).sum(-1)                  # (2*L, d_max/step)
    worth[:, 0] = math.inf
    count = round(kept * worth.numel())
    if count < len(worth):
        raise UserError(f"kept {kept:g} cannot be reached; choose {1 / worth.shape[1]:.3g} to 1")
    chosen = worth.flatten().argsort(descending=True)[:count] // worth.shape[1]
    ranks = chosen.bincount(minlength=len(worth)) * step
    return list(zip(ranks[::2].tolist(), ranks[1::2].tolist()))
