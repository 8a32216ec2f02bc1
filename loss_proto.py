"""Prototype of the loss metric (issue 17) against today's names. Not to be kept."""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import lorc
from cache import Basis
from model import UserError


def roots(M):
    """M^(1/2) and M^(-1/2) of a symmetric positive definite matrix."""
    lam, Q = torch.linalg.eigh(M.double())
    return Q * lam.sqrt() @ Q.T, Q / lam.sqrt() @ Q.T


def spectrum(W, C=None, M=None):
    W = W.double() if M is None else roots(M)[0] @ W.double()
    WC = W if C is None else W * C.double() if C.dim() == 1 else W @ C.double()
    lam, U = torch.linalg.eigh(WC @ W.T)
    return lam.flip(0).clamp(min=0), U.flip(1)


def basis(W, d_c, C=None, M=None):
    U = spectrum(W, C, M)[1][:, :d_c]
    if M is None:
        down, up = U.T, U
    else:
        root, inverse = roots(M)
        down, up = U.T @ root, inverse @ U
    return Basis(down.to(W.dtype).contiguous(), up.to(W.dtype).contiguous())


class Watched(Basis):
    """A basis that calls watch(gradient) for the gradient of each key or value it expands."""

    def expand(self, c, d):
        x = super().expand(c, d).requires_grad_()
        x.register_hook(self.watch)
        return x


def watched(pair, add, layer):
    out = []
    for i, b in enumerate(pair):
        w = Watched(*b)
        w.watch = lambda g, i=i: add(layer, i, g)
        out.append(w)
    return tuple(out)


def loss_metrics(llama, tokens, bases=None, sinks=4, window=32, context=1024, windows=64, seed=0,
                 clip=1.0, floor=0.01, labels="own", ckpt=True, first=0):
    """M = E[g g^T] of each layer's keys and values."""
    c, like = llama.config, llama.norm.weight
    M = torch.zeros(c.layers, 2, c.kv_width, c.kv_width, dtype=torch.float32, device=like.device)
    seen = 0

    def add(layer, which, g):
        g = g[:, :max(0, g.shape[1] - window)].flatten(2).flatten(0, 1).float()
        size = g.square().sum(-1, keepdim=True)
        if clip:
            g = g * (clip * size.mean() / size).clamp(max=1).nan_to_num(0).sqrt()
        M[layer, which] += g.T @ g
    eye = torch.eye(c.kv_width, dtype=like.dtype, device=like.device)
    pairs = [watched(pair or (Basis(eye, eye),) * 2, add, layer)
             for layer, pair in enumerate(bases or [None] * c.layers)]
    generator = torch.Generator(like.device).manual_seed(seed)

    def block(layer, x, cache, rope):
        if not ckpt:
            return layer(x, cache, rope)
        return checkpoint(layer, x, cache, rope, use_reentrant=False)
    with torch.enable_grad():
        for x in tqdm(tokens[first * context:(first + windows) * context].split(context), "metric",
                      unit=" windows", leave=False, disable=None):
            if len(x) <= sinks + window:
                continue
            caches = lorc.new_caches(llama, "bibranch", len(x), pairs, sinks=sinks, window=window,
                                     strict=True)
            h = llama.hidden(x[None], caches, block)[0]
            logits = llama.head(h).float()
            if labels == "full":
                with torch.no_grad():
                    p = llama.head(llama.hidden(x[None], lorc.new_caches(llama, "full", len(x)))[0]
                                   ).float().softmax(-1)
            else:
                p = logits.detach().softmax(-1)
            y = torch.multinomial(p, 1, generator=generator)[:, 0]
            if labels == "text":
                logits, y = logits[:-1], x[1:]
            F.cross_entropy(logits, y, reduction="sum").backward()
            seen += len(x) - sinks - window
    M /= seen
    scale = M.diagonal(dim1=-2, dim2=-1).mean(-1)
    M.diagonal(dim1=-2, dim2=-1).add_(floor * scale[..., None])
    return list(M)


def sort_ranks(spectra, kept):
    """(d_k, d_v) of each layer."""
    lam = torch.stack([torch.stack(tuple(pair)) for pair in spectra])        # (L, 2, d_max)
    d_max = lam.shape[-1]
    step = lorc.rank_step(d_max)
    worth = lam.unflatten(-1, (-1, step)).sum(-1)
    worth[..., 0] = math.inf
    count = round(kept * worth.numel())
    chosen = torch.zeros_like(worth).flatten()
    chosen[worth.flatten().argsort(descending=True)[:count]] = step
    ranks = chosen.view_as(worth).sum(-1).int().tolist()
    return [tuple(pair) for pair in ranks]


def spectra_of(llama, moments, metrics):
    return [(spectrum(layer.attn.Wk.weight, C, M[0])[0], spectrum(layer.attn.Wv.weight, C, M[1])[0])
            for layer, C, M in zip(llama.layers, moments, metrics)]


def make_bases(llama, ranks, moments, metrics):
    return [None if d_k == d_v == llama.config.kv_width else
            (basis(layer.attn.Wk.weight, d_k, C, M[0]), basis(layer.attn.Wv.weight, d_v, C, M[1]))
            for layer, (d_k, d_v), C, M in zip(llama.layers, ranks, moments, metrics)]


def compress_for_loss(llama, tokens, kept, sinks=4, window=32, context=1024, windows=(64, 32),
                      seed=0, moments=None, **options):
    moments = moments or lorc.calibrated_moments(llama, tokens, "whitened", sinks, context,
                                                 windows[0])
    bases = None
    for i, n in enumerate(windows):
        metrics = loss_metrics(llama, tokens, bases, sinks, window, context, n, seed + i, **options)
        ranks = sort_ranks(spectra_of(llama, moments, metrics), kept)
        bases = make_bases(llama, ranks, moments, metrics)
    return ranks, bases
