"""The bounds of Sec. 5 and App. A: as printed, as corrected, and two that the papers only hint at.

    Thm. 1, Eq. 14      theorem_1            one matrix; attained at x = v_{k+1}
                        theorem_1_commuting  in a basis that commutes with RoPE, by frequency
    Thm. 2, Eq. 15      theorem_2            one matrix and an elementwise phi with |phi'| <= L_phi
    Thm. 3, Eq. 16      theorem_3_printed    false: it forgets ||x~_{i-1}|| and one L_phi [E11]
                        theorem_3            corrected
                        theorem_3_a_priori   the same from ||x|| alone: no layer is special [E12]
    in expectation      expected_error       the closed form of CSKV's fine-tuning [E30]
    one attention       attention_bound      K and V compressed together, RoPE and softmax included
    Eqs. 18, 19, Fig. 4 reconstruction_error relative, Frobenius; its square is the tail energy

Everything is float64; every compressed matrix is W~ = U U^T W with the basis that lorc.py ships.
SwiGLU is a product and not Lipschitz [E15]: Thms. 2 and 3 say nothing about a whole LLaMA block.

    python theory.py [--model PATH] [--kept F]        bound against measured error, layer by layer
"""
import math
import sys

import torch
import torch.nn.functional as F

import lorc
import model

# phi and the supremum of |phi'|: a test finds each again [E15]
PHI = {"identity": (lambda z: z, 1.0), "relu": (F.relu, 1.0), "tanh": (torch.tanh, 1.0),
       "silu": (F.silu, 1.09984), "gelu": (F.gelu, 1.12891), "steep": (lambda z: 1.5 * z, 1.5)}


def compressed(W, k, C=None):
    """W~ = U U^T W of rank k, with lorc.py's basis."""
    B = lorc.basis(W, k, C)
    return B.up @ (B.down @ W)


def sigma(W, i):
    """The singular value sigma_i of W, counted from 1 as in the paper; 0 past the last."""
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


def theorem_1_commuting(Wk, d_c, d):
    """Bounds on ||k_j - k~_j|| / ||x|| at each frequency j, (d/2,): Thm. 1 in lorc.commuting_basis.

    The largest singular value dropped at j. The largest of all j bounds every frequency, but not
    the whole key: frequencies can lose the same direction of x, and their squares add.
    """
    turns = lorc.commuting_basis(Wk, d_c, d).turns[:d_c // 2]
    Z = torch.complex(*Wk.double().unflatten(0, (-1, 2, d // 2)).unbind(1)).transpose(0, 1)
    values = torch.linalg.svdvals(Z)                                 # (d/2, min(G, D)), falling
    values = F.pad(values, (0, 1 + Z.shape[1] - values.shape[1]))
    return values.gather(1, turns.bincount(minlength=d // 2)[:, None])[:, 0]


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
    """Eq. 16, Eq. 17 term by term, as printed: without the input, so it cannot hold [E11]."""
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
    """Thm. 3 without x~: L_phi^L ||x|| sigma_{k_i+1} prod_{j != i} ||W_j||, for phi(0) = 0 [E12].

    Because ||W~_j|| <= ||W_j||, so ||x~_{i-1}|| <= L_phi^(i-1) ||x|| prod_{j<i} ||W_j||. The
    product is the same for every layer but for its own ||W_i||: nothing here says that shallow
    layers matter more.
    """
    whole = L_phi ** len(Ws) * norm(x)
    return [whole * sigma(W, k + 1) * after(Ws, i) * math.prod(norm(V) for V in Ws[:i])
            for i, (W, k) in enumerate(zip(Ws, ks))]


# In expectation ----------------------------------------------------------------------------------

def expected_error(W, k, C):
    """E ||W x - U U^T W x||^2 for inputs with E[x x^T] = C: sum of dropped eigenvalues of W C W^T.

    And no map M of rank k does better. Proof: E||W x - M x||^2 = ||(W - M) C^(1/2)||_F^2, and
    M C^(1/2) has rank at most k, so by Eckart and Young this is at least the sum of the dropped
    sigma^2 of W C^(1/2), which are the dropped eigenvalues of W C W^T. M = U U^T W attains it,
    since tr((I - U U^T) W C W^T) is that sum. So CSKV's layer-wise fine-tuning has this for its
    optimum [E30].
    """
    return lorc.spectrum(W, C)[0][k:].sum().item()


# One attention layer -----------------------------------------------------------------------------

def softmax_bound(delta):
    """Bound on ||softmax(s) - softmax(s')||_1 where all |s_n - s'_n| <= delta: 2 tanh(delta / 2).

    Proof: the change is largest in total variation for a set of mass P that gains delta while the
    rest loses it: its log-odds move by 2 delta, and logistic(a + 2 delta) - logistic(a) is largest
    at a = -delta, where it is tanh(delta / 2). It is below delta (softmax is 1-Lipschitz from l_inf
    to l_1) and below 2, and attained by two scores.
    """
    return 2 * torch.tanh(delta / 2)


def attention_bound(q_norm, x_norm, e_k, e_v, radius, p_tilde, d):
    """Bound on ||o - o~|| of one query and head, keys and values compressed together.

    q_norm ||q||; x_norm (S,) ||x_n||; e_k, e_v the spectral norms of this head's rows of W - W~, at
    most sigma_{d_c+1} of Wk and of Wv (Thm. 1); radius max_n ||v_n - c|| for any c (here c = o);
    p_tilde (S,) the compressed weights. All may have leading axes.

    Proof: o - o~ = sum (p_n - p~_n)(v_n - c) + sum p~_n (v_n - v~_n), because p - p~ sums to zero.
    The scores move by at most ||q|| ||k_n - k~_n|| / sqrt(d) <= ||q|| e_k ||x_n|| / sqrt(d),
    rotation being an isometry; softmax_bound gives ||p - p~||_1; and ||v_n - v~_n|| <= e_v ||x_n||.
    """
    delta = q_norm * e_k * x_norm.amax(-1) / math.sqrt(d)
    return softmax_bound(delta) * radius + e_v * (p_tilde * x_norm).sum(-1)


# App. B ------------------------------------------------------------------------------------------

def reconstruction_error(W, k):
    """||W - W~||_F / ||W||_F: Eqs. 18, 19, Fig. 4.
    Its square is the tail energy sum_{i>k} sigma_i^2 / sum."""
    return ((W - compressed(W, k)).norm() / W.norm()).item()


# On a checkpoint ---------------------------------------------------------------------------------

def layer_inputs(llama, tokens):
    """x (T, D) that Wk and Wv of each layer are given, in float64."""
    xs = []

    def add(layer, which, x, y):
        if which == "k":
            xs.append(x[0].double())
    with lorc.listening(llama, add):
        llama.hidden(tokens, lorc.new_caches(llama, "full", tokens.shape[1]))
    return xs


def own_text(llama, prompt, length=512):
    """Tokens (1, T): the prompt and what the model draws after it, at temperature 1, seed 0."""
    n = min(length, llama.config.context) - len(prompt)
    if not prompt or n < 1:
        most = n + len(prompt) - 1
        raise model.UserError(f"the prompt has {len(prompt)} tokens; give 1 to {most}")
    start = torch.tensor([prompt])
    caches = lorc.new_caches(llama, "full", len(prompt) + n)
    new = lorc.generate(llama, caches, start, n, temperature=1.0)
    return torch.cat((start, torch.tensor([list(new)])), 1)


def attention_error_and_bound(llama, attn, x, pair):
    """||o - o~|| and its bound for every query and head of one layer: two tensors (T, H)."""
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
    far = torch.cdist(o.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)     # (T, H, S)
    x_norm = x.norm(dim=-1).expand(T, 1, T) * seen
    bound = attention_bound(q.norm(dim=-1), x_norm, e_k, e_v, (far * seen).amax(-1), p_tilde, d)
    return (o - o_tilde).norm(dim=-1), bound


def table(llama, tokens, kept):
    """One row a layer: worst error / bound of Thm. 1 for K and V, mean square against the
    expectation's closed form, the attention bound (worst, median), Fig. 4's error of K and V.
    Ratios, at most 1."""
    plan, bases = lorc.lorc(llama, kept=kept)
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
    """A net in the theorem's shape, of real numbers: the largest square corner of each Wk."""
    m = min(llama.config.kv_width, llama.config.width)
    return [layer.attn.Wk.weight.double()[:m, :m] for layer in llama.layers]


def main(argv=None):
    from runtime import cli
    p = cli.Parser(
        prog="theory.py", allow_abbrev=False,
        description="Bound against measured error on a checkpoint's own activations.")
    p.add_argument("--model", default=str(model.Path(__file__).resolve().parent / "tiny"))
    fraction = cli.number_in(float, 0.01, 0.99, "fraction in [0.01, 0.99]")
    p.add_argument("--kept", type=fraction, default=0.6)
    p.add_argument("--prompt", default="Once upon a time",
                   help="The model goes on from here, and its text is measured.")
    args = p.parse_args(argv)
    return cli.run_command("theory", lambda: run(args))


def run(args):
    """Print the table of layers and Thm. 3 on the checkpoint's own matrices. Returns the status."""
    from runtime import checkpoint, text
    folder = checkpoint.find_model(args.model)
    checkpoint.check(folder)
    llama = model.load(folder, torch.float32)
    tokens = own_text(llama, text.Tokenizer(folder, llama.config).encode(args.prompt))
    print("measured / bound           Thm. 1        in the mean  attention        Eq. 19")
    print("layer  d_c    worst K  worst V        V (equal)   worst  median    K      V")
    for i, d_c, k, v, mean, worst, median, fk, fv in table(llama, tokens, args.kept):
        print(f"{i:5d} {d_c:4d}   {k:8.3f} {v:8.3f} {mean:16.6f} "
              f"{worst:7.3f} {median:7.4f}  {fk:5.3f}  {fv:5.3f}")
    print_network(square_net(llama), args.kept)
    return 0


def print_network(Ws, kept):
    """Thm. 3 on a real square-block net: printed, corrected, a priori; small and large input."""
    ks = [min(len(W) - 1, max(1, round(kept * len(W)))) for W in Ws]
    phi, L_phi = PHI["silu"]
    direction = torch.linalg.svd(Ws[0])[2][ks[0]]
    for scale in (1.0, 1e6):
        x = scale * direction
        x_tilde = forward([compressed(W, k) for W, k in zip(Ws, ks)], x, phi)
        error = norm(forward(Ws, x, phi)[-1] - x_tilde[-1])
        print(f"Thm. 3 on {len(Ws)} real blocks, phi = SiLU, ||x|| = {scale:g}: error {error:.3g}; "
              f"printed {sum(theorem_3_printed(Ws, ks, L_phi)):.3g}, "
              f"corrected {sum(theorem_3(Ws, ks, L_phi, x_tilde)):.3g}, "
              f"a priori {sum(theorem_3_a_priori(Ws, ks, L_phi, x)):.3g}")


if __name__ == "__main__":
    sys.exit(main())
