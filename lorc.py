"""LoRC: low-rank compression of the KV cache, read beside the paper (Zhang et al., 2024).

Sec. 4 in the paper's order, then what runs it: caches, generation, perplexity.

    paper                          here
    -----------------------------  ------------------------------------------------------------
    Eq. 4, cache size              full_bytes
    Eq. 5, Eq. 6, Eq. 8, SVD       spectrum, basis        (one SVD over all heads)
    Eq. 7, Eq. 9, folding U        cache.LowRank          (Eq. 7 cannot be, [E4]; Eq. 9 per head)
    Eq. 10, condition number       log_kappa              kappa(W), in logs
    Eq. 12, cumulative             log_kappa_tilde        kappa~_l, in logs
    Eq. 13, compressed dimension   compressed_dimension   d_c of layer l, from d_max to d_min
    Alg. 1                         lorc                   its steps carry the line numbers
    rho                            kept                   fraction of the full cache's numbers [E13]

[E1] ... [E34] are the errata: README lists them in one line each. Logs are natural [E8].
Does NOT include: eviction of tokens, changed weights (Eq. 7 and Eq. 9 as stored matrices would be
larger than what they replace, [E5]), or training.

    import lorc, model
    llama = model.load("tiny")
    plan, bases = lorc.lorc(llama, kept=0.6)
    caches = lorc.new_caches(llama, "compressed", 200, bases)
    tokens = list(lorc.generate(llama, caches, prompt, 50))

As a program this file is runtime/cli.py: python lorc.py --prompt "Once upon a time"
"""
import sys

if __name__ == "__main__":
    sys.path.insert(0, __file__.rpartition("/")[0] or ".")        # also with PYTHONSAFEPATH=1
    from runtime.cli import main
    sys.exit(main())

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import Basis, BiBranchCache, CompressedCache, FullCache
from model import UserError


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
        raise UserError(f"--kept {kept:g} cannot be reached: these flags can keep "
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


def log_kappas(llama):
    """(ln kappa(Wk), ln kappa(Wv)) of each layer of the model."""
    return [(log_kappa(layer.attn.Wk.weight), log_kappa(layer.attn.Wv.weight))
            for layer in tqdm(llama.layers, "kappa", unit=" layers", leave=False, disable=None)]


def make_plan(kappas, d_max, kept=0.6, d_min=None, threshold=math.inf, schedule="progressive",
              skip=0, split=0.0, pairs=False):
    """Alg. 1, l. 1-11: how much of each layer is kept, from (ln kappa(Wk), ln kappa(Wv)) of each.

    kept solves for d_min where d_min is None; threshold is on ln kappa~ [E8].
    """
    log_tilde = log_kappa_tilde([k + v for k, v in kappas])                        # l. 1-5
    full = [x > threshold or layer < skip for layer, x in enumerate(log_tilde)]    # l. 8-11

    def ranks_of(d_min):
        return ranks(log_tilde, full, d_max, d_min, schedule, split, pairs)        # l. 7
    if d_min is None:
        d_min = solve_d_min(kept, ranks_of, d_max)
    return Plan(kappas, log_tilde, ranks_of(d_min), d_max)


def make_bases(llama, ranks, moments=None, commuting=False):
    """Alg. 1, l. 12-18: each layer's bases of keys and values, None where the layer stays full.

    moments: C of each layer's inputs, None for the paper's SVD. commuting: keys get a basis that
    commutes with RoPE. L. 15 and 19 are not taken [E4], [E5]; l. 20 is the caches.
    """
    c, bases = llama.config, []
    layers = tqdm(llama.layers, "bases", unit=" layers", leave=False, disable=None)
    for layer, (d_k, d_v), C in zip(layers, ranks, moments or [None] * len(ranks)):
        Wq, Wk, Wv = (W.weight for W in (layer.attn.Wq, layer.attn.Wk, layer.attn.Wv))
        if d_k == d_v == c.kv_width:
            bases.append(None)
            continue
        K = commuting_basis(Wk, d_k, c.head_dim, C, Wq) if commuting else basis(Wk, d_k, C)
        bases.append((K, basis(Wv, d_v, C)))
    return bases


def lorc(llama, moments=None, commuting=False, **options):
    """Algorithm 1: the plan, and each layer's bases of keys and values. options: as make_plan's."""
    plan = make_plan(log_kappas(llama), llama.config.kv_width, pairs=commuting, **options)
    return plan, make_bases(llama, plan.ranks, moments, commuting)


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

    def add(layer, which, x, y):
        if which == "k":                          # Wk and Wv are given the same x
            x = x[0, sinks:].double()                                                  # (T, D)
            sums[layer] += x.abs().sum(0) if kind == "asvd" else x.T @ x
    with listening(llama, add):
        for x in tqdm(tokens[:windows * context].split(context), "calibrating", unit=" windows",
                      leave=False, disable=None):
            if len(x) > sinks:
                llama.hidden(x[None], new_caches(llama, "full", len(x)))
                seen += len(x) - sinks
    return [total / seen for total in sums]


@contextmanager
def listening(llama, hear):
    """While it runs, hear(layer, "k" or "v", x, y) is called for every y = W x of Wk and of Wv."""
    def hook(layer, which):
        return lambda module, inputs, y: hear(layer, which, inputs[0], y)
    hooks = [W.register_forward_hook(hook(i, which)) for i, layer in enumerate(llama.layers)
             for which, W in (("k", layer.attn.Wk), ("v", layer.attn.Wv))]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


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


def sample(logits, temperature, top_p, generator):
    """The next token (B, 1) from logits (B, V): the largest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, order = (logits.double() / max(temperature, 1e-100)).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))


def generate(llama, caches, tokens, n, ends=(), temperature=0.0, top_p=1.0, seed=0, step=None):
    """Yield up to n tokens that follow `tokens` (1, T); an end token is yielded, and is the last.

    The caches must have room for T + n - 1 tokens. `step` may stand in for the model: tokens (1, T)
    -> logits (1, V) of the last.
    """
    def eager(tokens):
        return llama.head(llama.hidden(tokens, caches)[:, -1])
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(n):
        tokens = sample((step or eager)(tokens), temperature, top_p, generator)
        yield (token := tokens.item())
        if token in ends:
            return


def negative_log_likelihood(llama, tokens, context, make_caches):
    """Nats and number of predicted tokens: each window of `context` predicts all but its first."""
    nats = count = 0
    for x in tqdm(tokens.split(context), "scoring", unit=" windows", leave=False, disable=None):
        h = llama.hidden(x[None], make_caches(len(x)))[0]
        for h, y in zip(h[:-1].split(256), x[1:].split(256)):
            nats += F.cross_entropy(llama.head(h).float(), y, reduction="sum").item()
        count += len(x) - 1
    return nats, count
