"""CSKV's layer-wise fine-tuning, and where it lands: on the closed form [E30].

CSKV writes Wk or Wv as B A, caches A x, and trains A and B of each layer by gradient descent on
E||W x - B A x||^2, x the uncompressed model's hidden states. That is a linear least-squares problem
of bounded rank. Its best B is the top eigenvectors U of W C W^T, C = E[x x^T], with A = U^T W, so
that A x = U^T k is what lorc.basis caches; what is lost is the sum of the dropped eigenvalues.

    python experiments/cskv_finetune.py --text TRAIN [--model PATH] [--layers 0 3] [--kept 0.4]

Reading order:
    hidden_states   what Wk and Wv of some layers are given, window by window
    closed_form     U^T W and U, and the loss they have
    starts          random, SVD, ASVD: the paper's three
    descend         AdamW for all layers, keys and values, and starts at once
    published       the 4-bit rounding of CSKV's code, with its clipped straight-through estimator
    fine_tune_4bit  training with rounding in the loop, against rounding the closed form

Losses are relative: mean ||k - k~||^2 / mean ||k||^2. Axes in einsum: s starts, l layers, k keys
and values, t tokens, c latents, i inputs (D), o outputs (G*d). Without --model it runs on tiny/.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import einsum
from torch.optim.lr_scheduler import LinearLR

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lorc                                                        # noqa: E402
from runtime import jobs as running
from runtime.text import Tokenizer
import model                                                       # noqa: E402
from cache import GROUP, round_trip                                # noqa: E402
from record import provenance                                      # noqa: E402

SINKS = 4        # first positions, which the bi-branch cache keeps exact, are left out
STARTS = ("random", "svd", "asvd")


# The problem -------------------------------------------------------------------------------------

@torch.no_grad()
def hidden_states(llama, windows, layers):
    """What Wk and Wv of `layers` are given, (windows, l, t, i), but for the first SINKS tokens."""
    seen = []

    def collect(module, inputs):
        seen.append(inputs[0][0, SINKS:])
    hooks = [llama.layers[i].attn.Wk.register_forward_pre_hook(collect) for i in layers]
    for x in windows:
        llama.hidden(x[None], lorc.new_caches(llama, "full", len(x)))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).unflatten(0, (len(windows), len(layers)))


def moments(X):
    """C = E[x x^T] of each layer, (l, i, i), in float64."""
    return sum(einsum("lti,ltj->lij", x, x) for x in X.double()) / (X.shape[0] * X.shape[2])


def loss_of(A, B, W, C):
    """The relative loss, exactly, over all inputs whose second moment is C: (s, l, k)."""
    W = W.double()
    rest = W - einsum("slkoc,slkci->slkoi", B.double(), A.double())
    return einsum("slkoi,lij,slkoj->slk", rest, C, rest) / einsum("lkoi,lij,lkoj->lk", W, C, W)


def closed_form(W, C, d_c):
    """The optimum, A = U^T W and B = U, as one start (1, l, k, ...); and its loss, (l, k)."""
    found = [[lorc.spectrum(w, c) for w in pair] for pair, c in zip(W, C)]
    lam = torch.stack([torch.stack([lam for lam, _ in pair]) for pair in found])
    U = torch.stack([torch.stack([U[:, :d_c] for _, U in pair]) for pair in found]).to(W)
    return einsum("lkoc,lkoi->lkci", U, W)[None], U[None], lam[..., d_c:].sum(-1) / lam.sum(-1)


def starts(W, X, d_c, seed):
    """A (s, l, k, c, i) and B (s, l, k, o, c): random, SVD of W, and ASVD, that of W diag(s)."""
    generator = torch.Generator().manual_seed(seed)
    s = (X.abs().mean((0, 2)) + 1e-6).sqrt()[:, None, None]        # (l, 1, 1, i): alpha = 1/2
    shapes = (*W.shape[:2], d_c, W.shape[3]), (*W.shape[:3], d_c)
    A, B = ([torch.randn(shape, generator=generator).to(W) * shape[-1] ** -0.5] for shape in shapes)
    for scale in (torch.ones_like(s), s):
        U, S, Vh = torch.linalg.svd(W * scale, full_matrices=False)
        root = S[..., :d_c].sqrt()
        A.append(root[..., None] * Vh[..., :d_c, :] / scale)
        B.append(U[..., :d_c] * root[..., None, :])
    return torch.stack(A), torch.stack(B)


# Gradient descent --------------------------------------------------------------------------------

def descend(A, B, W, X, rounding, args, each):
    """Train A and B by AdamW with a linear decay, one window a step, on keys' and values' error.

    The problems share no number, and AdamW treats each number by itself: the sum of all losses
    trains them as if each were alone. `each(step, A, B)` is called every now and then.
    """
    A, B = (x.clone().requires_grad_() for x in (A, B))
    optimizer = torch.optim.AdamW((A, B), args.lr)
    decay = LinearLR(optimizer, 1, 0.01, args.steps)
    energy = einsum("lkoi,lij,lkoj->lk", W.double(), moments(X), W.double()).to(W)
    order = torch.randint(len(X), (args.steps,), generator=torch.Generator().manual_seed(args.seed))
    for step, i in enumerate(order):
        if step % args.every == 0:
            each(step, A.detach(), B.detach())
        c = rounding(einsum("lti,slkci->slktc", X[i], A))
        error = einsum("slktc,slkoc->slkto", c, B) - einsum("lti,lkoi->lkto", X[i], W)
        loss = (error.square().sum(-1).mean(-1) / energy).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    each(args.steps, A.detach(), B.detach())
    return A.detach(), B.detach()


# Four bits ---------------------------------------------------------------------------------------

def ours(c):
    """cache.round_trip, straight-through: minimum and maximum are exact, and nothing is clipped."""
    rounded = round_trip(c.flatten(0, -3)).view_as(c)
    return c + (rounded - c).detach()


def published(c):
    """CSKV's: the zero point is a whole number from 0 to 15, and values can be out of range [E31].

    The clipped straight-through estimator: gradient 1 within the range, 0 outside.
    """
    full = c.shape[-2] // GROUP * GROUP
    groups = c[..., :full, :].unflatten(-2, (-1, GROUP))
    low, high = groups.amin(-2, keepdim=True), groups.amax(-2, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-8)
    zero = (-low / step).round().clamp(0, 15)
    inside = groups.clamp(-zero * step, (15 - zero) * step)        # its gradient is the estimator
    rounded = ((inside / step).round() * step - inside).detach() + inside
    return torch.cat((rounded.flatten(-3, -2), c[..., full:, :]), -2)


@torch.no_grad()
def rounded_loss(A, B, W, X, rounding):
    """The relative loss with rounded latents, measured over the windows X: (s, l, k)."""
    lost = kept = 0
    for x in X:
        k = einsum("lti,lkoi->lkto", x, W)
        k_tilde = einsum("slktc,slkoc->slkto", rounding(einsum("lti,slkci->slktc", x, A)), B)
        lost, kept = lost + (k - k_tilde).square().sum((-1, -2)), kept + k.square().sum((-1, -2))
    return lost / kept


def fine_tune_4bit(optimum, W, X, held, args):
    """For each quantizer, on held-out text: the closed form rounded, then trained with rounding."""
    found = {"not rounded": rounded_loss(*optimum, W, held, lambda c: c)[0].tolist()}
    for rounding in (ours, published):
        def loss(A, B):
            return rounded_loss(A, B, W, held, rounding)[0].tolist()
        trained = descend(*optimum, W, X, rounding, args, lambda *_: None)
        found[rounding.__name__] = {"rounded": loss(*optimum), "trained": loss(*trained)}
    return found


# The command line --------------------------------------------------------------------------------

def command_line():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--model", default=str(ROOT / "tiny"), help="Folder of the model. Default: tiny/.")
    add("--text", required=True, metavar="FILE", help="Text whose hidden states are fitted.")
    add("--layers", type=int, nargs="+", metavar="N", help="Default: first, middle and last.")
    add("--kept", type=float, default=0.4, metavar="F", help="d_c / (G*d). Default: 0.4.")
    add("--windows", type=int, default=48, metavar="N", help="Windows of text; the last eighth is"
        " held out. Default: 48.")
    add("--steps", type=int, default=2000, metavar="N", help="Default: 2000.")
    add("--every", type=int, default=50, metavar="N", help="Steps between points. Default: 50.")
    add("--lr", type=float, default=1e-3, help="CSKV has 5e-5. Default: 0.001.")
    add("--seed", type=int, default=0, help="Draws the random start and the order. Default: 0.")
    add("--out", type=Path, metavar="FILE", help="Write curves and losses there, as JSON.")
    add("--device", help="cpu or cuda. Default: cuda where there is one.")
    add("--commit", help="Written into the JSON. Default: what git says.")
    return p


def problem(args):
    """W (l, k, o, i), and the hidden states of `args.layers` to train on and held out."""
    llama = model.load(args.model, torch.float32, args.device)
    context, depth = min(1024, llama.config.context), llama.config.layers
    tokenizer = Tokenizer(args.model, llama.config)
    tokens = torch.tensor(tokenizer.encode(running.read_text(args.text)))
    windows = tokens[:len(tokens) // context * context].view(-1, context).to(args.device)
    args.layers = args.layers or sorted({0, depth // 2, depth - 1})
    X = hidden_states(llama, windows[:args.windows], args.layers)
    attentions = [llama.layers[i].attn for i in args.layers]
    W = [torch.stack((a.Wk.weight, a.Wv.weight)) for a in attentions]
    few = max(1, len(X) // 8)
    return torch.stack(W), X[:-few], X[-few:]


def main():
    args, begun = command_line().parse_args(), time.perf_counter()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    W, X, held = problem(args)
    C, d_c, curves = moments(X), max(1, round(args.kept * W.shape[2])), []
    A, B, best = closed_form(W, C, d_c)
    torch.testing.assert_close(loss_of(A, B, W, C)[0], best, rtol=1e-3, atol=1e-6)

    def each(step, *factors):
        loss = loss_of(*factors, W, C)
        curves.append({"step": step, "loss": dict(zip(STARTS, loss.tolist()))})
        over = zip(STARTS, (loss / best).mean((1, 2)).tolist())
        print(f"step {step:5d}  loss / closed form's: ", "  ".join(f"{n} {x:.4f}" for n, x in over),
              flush=True)
    descend(*starts(W, X, d_c, args.seed), W, X, lambda c: c, args, each)
    result = provenance(args.device, args.commit) | {
              "layers": args.layers, "d_c": d_c, "d_max": W.shape[2], "windows": len(X),
              "axes": "each loss is a list over layers of [keys, values]",
              "closed_form": best.tolist(), "curves": curves,
              "four_bits": fine_tune_4bit((A, B), W, X, held, args)}
    result["seconds"] = time.perf_counter() - begun
    print("closed form:", best.tolist())
    print("4 bits, held out:", json.dumps(result["four_bits"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except model.UserError as e:
        sys.exit(f"cskv_finetune: {e}")
