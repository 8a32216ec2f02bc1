"""The error bounds of LoRC's Sec. 5 and App. A: as printed, as corrected, and beyond the paper.

    Thm. 1, Eq. 14      theorem_1             one matrix; attained at x = v_{k+1}
    Thm. 2, Eq. 15      theorem_2             one matrix and an elementwise phi with |phi'| <= L_phi
    Thm. 3, Eq. 16      theorem_3_printed     false: ||x~_{i-1}|| and one L_phi are missing [E11]
                        theorem_3             corrected
                        theorem_3_a_priori    the same from ||x|| alone: no layer is special [E12]
    Eqs. 18, 19, Fig. 4 reconstruction_error  relative, in the Frobenius norm
    not in the paper    expected_error        what a basis loses in expectation, and why it is best
                        predicted_divergence  the same in nats; why one sort gives the best ranks
                        attention_bound       keys and values compressed, with RoPE and softmax

All computations are in float64. A compressed matrix is W~ = up down W, with lorc.basis. SwiGLU is a
product and not Lipschitz [E15], so Theorems 2 and 3 do not cover a whole LLaMA block.

    python theory.py [--model PATH] [--kept F]        bounds against measured errors, layer by layer
"""
import sys

if __name__ == "__main__":
    sys.path.insert(0, __file__.rpartition("/")[0] or ".")        # absent if PYTHONSAFEPATH=1
    from runtime.cli import bounds_main
    sys.exit(bounds_main())

import math

import torch
import torch.nn.functional as F

import lorc
import model

# Each phi with the supremum of |phi'|, which a test computes again [E15].
PHI = {"identity": (lambda z: z, 1.0), "relu": (F.relu, 1.0), "tanh": (torch.tanh, 1.0),
       "silu": (F.silu, 1.09984), "gelu": (F.gelu, 1.12891), "steep": (lambda z: 1.5 * z, 1.5)}


def compressed(W, k, C=None, M=None):
    """W~ = up down W of rank k, with the basis of lorc.basis."""
    b = lorc.basis(W, k, C, M)
    return b.up @ (b.down @ W)


def sigma(W, i):
    """The singular value sigma_i of W, counted from 1 as in the paper; 0 beyond the last one."""
    values = torch.linalg.svdvals(W)
    return values[i - 1].item() if i <= len(values) else 0.0


def norm(x):
    """||x||_2 of a vector, or the spectral norm of a matrix."""
    return (x.norm() if x.dim() == 1 else torch.linalg.matrix_norm(x, 2)).item()


# Secs. 5.1, 5.2: one layer -----------------------------------------------------------------------

def theorem_1(W, k, x):
    """Bound on ||W x - W~ x||: Thm. 1, Eq. 14."""
    return sigma(W, k + 1) * norm(x)


def theorem_2(W, k, x, L_phi):
    """Bound on ||phi(W x) - phi(W~ x)||: Thm. 2, Eq. 15."""
    return L_phi * theorem_1(W, k, x)


# Sec. 5.3: a network -----------------------------------------------------------------------------

def forward(Ws, x, phi):
    """x_0 = x, x_1, ..., x_L with x_i = phi(W_i x_{i-1})."""
    xs = [x]
    for W in Ws:
        xs.append(phi(W @ xs[-1]))
    return xs


def after(Ws, i):
    """prod_{j > i} ||W_j||_2 for layer i, counted from 0."""
    return math.prod(norm(W) for W in Ws[i + 1:])


def theorem_3_printed(Ws, ks, L_phi):
    """The terms of Eq. 16, Eq. 17 as printed. The input is missing, so the bound is false [E11]."""
    L = len(Ws)
    return [sigma(W, k + 1) * L_phi ** (L - 1 - i) * after(Ws, i)
            for i, (W, k) in enumerate(zip(Ws, ks))]


def theorem_3(Ws, ks, L_phi, x_tilde):
    """Thm. 3 corrected, term i: L_phi^(L-i+1) sigma_{k_i+1} ||x~_{i-1}|| prod_{j>i} ||W_j|| [E11].

    x_tilde: x~_0, ..., x~_L of the compressed network. Proof: App. A.2's own inductive step,
    ||x_i - x~_i|| <= L_phi (||W_i|| ||x_{i-1} - x~_{i-1}|| + sigma_{k_i+1} ||x~_{i-1}||), unrolled.
    """
    L = len(Ws)
    return [L_phi ** (L - i) * sigma(W, k + 1) * norm(x_tilde[i]) * after(Ws, i)
            for i, (W, k) in enumerate(zip(Ws, ks))]


def theorem_3_a_priori(Ws, ks, L_phi, x):
    """Thm. 3 without x~: L_phi^L ||x|| sigma_{k_i+1} prod_{j != i} ||W_j||, if phi(0) = 0 [E12].

    Since ||W~_j|| <= ||W_j||, ||x~_{i-1}|| <= L_phi^(i-1) ||x|| prod_{j<i} ||W_j||. Every layer has
    the same product except for its own factor, so this form gives shallow layers no special role.
    """
    total = L_phi ** len(Ws) * norm(x)
    return [total * sigma(W, k + 1) * after(Ws, i) * math.prod(norm(V) for V in Ws[:i])
            for i, (W, k) in enumerate(zip(Ws, ks))]


# The optimum in a metric: which map loses the least in expectation -------------------------------

def expected_error(W, k, C=None, M=None):
    """The least E (Wx - Ax)^T M (Wx - Ax) over all matrices A of rank k, where E[x x^T] = C.

    It is the sum of all but the k largest eigenvalues of R^T W C W^T R, where M = R R^T, and
    lorc.basis attains it. Proof. The error is ||R^T (W - A) C^1/2||_F^2, and R^T A C^1/2 has rank
    at most k. By Eckart and Young the error is at least the sum of the dropped sigma^2 of
    R^T W C^1/2, and these are the dropped eigenvalues. With the eigenvectors U of the k largest,
    A = R^-T U U^T R^T W attains it: the error is tr((I - U U^T) R^T W C W^T R).

    C = I and M = I give LoRC, C = diag(mean |x|) ASVD, and C = E[x x^T] the optimum of CSKV's
    layer-wise fine-tuning [E30]. W = I with the C and M of lorc.fisher_factors gives the loss
    metric, in which half the error is a KL divergence in nats.
    """
    return lorc.spectrum(W, C, M)[0][k:].sum().item()


def predicted_divergence(factors, ranks):
    """The KL divergence, in nats per token, that compressing to these ranks should cause.

    factors: from lorc.fisher_factors; ranks: (d_k, d_v) of each layer. It is half the sum of the
    expected errors of all matrices. Derivation. If the cache returns A k instead of k, with
    E = A - I, the predictions change by KL = vec(E)^T F vec(E) / 2 + O(|E|^3), where F is the
    Fisher information of A: KL and its gradient are zero at A = I, and F is its Hessian there. With
    F_ij,kl = M_ik C_jl this is tr(E^T M E C) / 2, half of expected_error's objective for W = I.

    lorc.sort_ranks minimizes this sum among all ranks with the same total that are multiples, at
    least one, of rank_multiple(d_max). Proof. Other such ranks can be reached by exchanges: one
    matrix loses its smallest kept step of eigenvalues and another gains its largest dropped one.
    The sort has kept the larger of the two, so no exchange reduces the sum. Three things are left
    out: higher orders of E, differences between F and M_ik C_jl, and covariances of the gradients
    of different matrices.
    """
    return sum(expected_error(torch.eye(len(C)).to(C), d_c, C, M) / 2
               for pair, dims in zip(factors, ranks) for (C, M), d_c in zip(pair, dims))


# One attention layer -----------------------------------------------------------------------------

def softmax_bound(delta):
    """Bound on ||softmax(s) - softmax(s')||_1 where all |s_n - s'_n| <= delta: 2 tanh(delta / 2).

    Proof. The total variation is largest when the scores of one set of positions rise by delta and
    all others fall by delta. The log-odds of that set then move by 2 delta, and
    logistic(a + 2 delta) - logistic(a) is largest at a = -delta, where it is tanh(delta / 2). The
    bound is attained by two scores, and it is less than delta and less than 2.
    """
    return 2 * torch.tanh(delta / 2)


def attention_bound(q_norm, x_norm, e_k, e_v, radius, p_tilde, d):
    """Bound on ||o - o~|| of one query and head when keys and values are compressed together.

    q_norm: ||q||. x_norm (S,): ||x_n||. e_k, e_v: the spectral norms of this head's rows of W - W~,
    which are at most sigma_{d_c+1} of Wk and of Wv (Thm. 1). radius: max_n ||v_n - c|| for any c.
    p_tilde (S,): the attention weights with compressed keys. All may have leading axes.

    Proof. o - o~ = sum (p_n - p~_n)(v_n - c) + sum p~_n (v_n - v~_n), because p - p~ sums to zero.
    A rotation does not change norms, so the scores move by at most ||q|| ||k_n - k~_n|| / sqrt(d)
    <= ||q|| e_k ||x_n|| / sqrt(d), softmax_bound bounds ||p - p~||_1, and ||v_n - v~_n|| is at most
    e_v ||x_n||.
    """
    delta = q_norm * e_k * x_norm.amax(-1) / math.sqrt(d)
    return softmax_bound(delta) * radius + e_v * (p_tilde * x_norm).sum(-1)


# App. B ------------------------------------------------------------------------------------------

def reconstruction_error(W, k):
    """||W - W~||_F / ||W||_F: Eqs. 18, 19 and Fig. 4. Its square is the fraction of the squared
    singular values that is dropped."""
    return ((W - compressed(W, k)).norm() / W.norm()).item()


# On a checkpoint ---------------------------------------------------------------------------------

def layer_inputs(llama, tokens):
    """The inputs x (T, D) of Wk and Wv in each layer, in float64."""
    xs = []

    def record(layer, h, cache, rope):             # called in place of the layer
        xs.append(layer.attn_norm(h)[0].double())
        return layer(h, cache, rope)
    llama.hidden(tokens, lorc.new_caches(llama, "full", tokens.shape[1]), record)
    return xs


def attention_error_and_bound(llama, attn, x, pair):
    """||o - o~|| and its bound for every query and head of one layer, each (T, H)."""
    H, G, d, T = llama.config.heads, llama.config.kv_heads, llama.config.head_dim, len(x)
    rope, at = model.Rope(llama.config), slice(0, T)
    rope.reserve(T, x)
    Wq, Wk, Wv = (W.weight.double() for W in (attn.Wq, attn.Wk, attn.Wv))
    lost = [W - compressed(W, b.d_c) for W, b in zip((Wk, Wv), pair)]     # as in Thm. 1
    e_k, e_v = (torch.linalg.matrix_norm(W.unflatten(0, (G, d)), 2).repeat_interleave(H // G)
                for W in lost)
    seen = torch.ones(T, T, dtype=torch.bool).tril()[:, None]

    def heads(W, n):
        return (x @ W.T).unflatten(-1, (n, d))[None]

    def attend(Wk, Wv):
        q, k = rope(heads(Wq, H), at), rope(heads(Wk, G), at)
        s = torch.einsum("tgrd,sgd->tgrs", q[0].unflatten(1, (G, -1)), k[0]).flatten(1, 2)
        p = (s / math.sqrt(d)).masked_fill(~seen, -torch.inf).softmax(-1)
        v = heads(Wv, G)[0].repeat_interleave(H // G, 1)                       # (S, H, d)
        return q[0], v, p, torch.einsum("ths,shd->thd", p, v)
    q, v, _, o = attend(Wk, Wv)
    _, _, p_tilde, o_tilde = attend(Wk - lost[0], Wv - lost[1])
    # the radius of attention_bound is measured from c = o
    far = torch.cdist(o.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)     # (T, H, S)
    x_norm = x.norm(dim=-1).expand(T, 1, T) * seen
    bound = attention_bound(q.norm(dim=-1), x_norm, e_k, e_v, (far * seen).amax(-1), p_tilde, d)
    return (o - o_tilde).norm(dim=-1), bound


def table(llama, tokens, kept):
    """Yield one row per compressed layer: its index, d_k, and ratios of error to bound.

    The ratios are Thm. 1's for the worst token (keys, values), expected_error's for the mean square
    (values), and the attention bound's (worst and median). The last two numbers are Eq. 19's error.
    """
    plan, bases = lorc.compress(llama, kept=kept)
    for i, (x, pair, layer) in enumerate(zip(layer_inputs(llama, tokens), bases, llama.layers)):
        if pair is None:
            continue
        row = [i, plan.ranks[i][0]]
        Ws = [layer.attn.Wk.weight.double(), layer.attn.Wv.weight.double()]
        for W, b in zip(Ws, pair):
            error = (x @ (W - compressed(W, b.d_c)).T).norm(dim=-1)
            bound = sigma(W, b.d_c + 1) * x.norm(dim=-1)
            row.append((error / bound.clamp(min=1e-300)).max().item())
        C = x.T @ x / len(x)
        best = (x @ (Ws[1] - compressed(Ws[1], pair[1].d_c, C)).T).square().sum(-1).mean()
        closed = expected_error(Ws[1], pair[1].d_c, C)
        total = torch.trace(Ws[1] @ C @ Ws[1].T)
        row.append(best.item() / closed if closed > 1e-9 * total else math.nan)
        error, bound = attention_error_and_bound(llama, layer.attn, x, pair)
        ratio = error / bound.clamp(min=1e-300)
        yield [*row, ratio.max().item(), ratio.median().item(),
               *(reconstruction_error(W, b.d_c) for W, b in zip(Ws, pair))]


def square_net(llama):
    """Matrices for Thm. 3 from a checkpoint: the largest square corner of each layer's Wk."""
    m = min(llama.config.kv_width, llama.config.width)
    return [layer.attn.Wk.weight.double()[:m, :m] for layer in llama.layers]
