"""--compile: one decode step for every place, compiled once; on CUDA, one graph.

What cache.py does for one token, written again so that no shape tells the place: `at`, a tensor
(1,), does. Whole buffers are read, and a mask hides what is not filled yet. A test holds each of
these steps against the cache's own `attend`, at every place.
"""
from typing import NamedTuple

import torch
from torch import einsum

import cache
import model
from cache import GROUP, Latents, dequantize, quantize, scores, softmax, weighted_sum
from runtime.commuting import CommutingBasis


class Static(NamedTuple):
    """A cache that is asked for one token at place `at`."""

    cache: object
    at: torch.Tensor

    def attend(self, q, k, v, rope):
        step = {cache.FullCache: full, cache.CompressedCache: compressed,
                cache.BiBranchCache: bibranch}[type(self.cache)]
        return step(self.cache, q, k, v, rope, self.at)

    @property
    def capacity(self) -> int:
        return self.cache.capacity


def settled(cache) -> bool:
    """Whether these steps can take over: sinks and window, if there are any, are full."""
    return cache.length >= getattr(cache, "sinks", 0) + getattr(cache, "window", 0)


# One token, each cache ---------------------------------------------------------------------------

def full(self, q, k, v, rope, at):
    self.k[:, at], self.v[:, at] = rope(k, at), v
    seen = torch.arange(self.capacity, device=at.device) <= at[:, None]
    return cache.attention(rope(q, at), self.k, self.v, seen)


def compressed(self, q, k, v, rope, at):
    put(self.c_k, self.K.cached_latents(k, rope, at), at)
    put(self.c_v, self.V.project(v), at)
    s = latent_scores(rope(q, at), self.c_k.c, self.K, slice(0, self.capacity), rope)
    seen = torch.arange(self.capacity, device=at.device)[:, None] <= at
    p = softmax(s.where(seen, -torch.inf), 1)                                    # (B, S, H)
    return self.V.reconstruct_heads(einsum("bsh,bsc->bhc", p, self.c_v.c)[:, None], q.shape[-1])


def bibranch(self, q, k, v, rope, at):
    place = at - self.sinks
    slot, gone = place % max(1, self.window), place - self.window
    gone_k, gone_v = (self.ring_k[:, slot], self.ring_v[:, slot]) if self.window else (k, v)
    put(self.c_k, self.K.cached_latents(gone_k, rope, at - self.window), gone)
    put(self.c_v, self.V.project(gone_v), gone)
    if self.window:
        self.ring_k[:, slot], self.ring_v[:, slot] = k, v
    ring = at - (slot - torch.arange(self.window, device=at.device)) % max(1, self.window)
    (c_k, places, filled), (c_v, *_) = whole(self.c_k, gone), whole(self.c_v, gone)
    places = (self.sinks + places).clamp(max=self.capacity - 1)
    q, exact = rope(q, at), (rope(self.sink_k, slice(0, self.sinks)), rope(self.ring_k, ring))
    late = latent_scores(q, c_k, self.K, places, rope)
    first = scores(q, torch.cat(exact, 1))[:, 0].transpose(1, 2)
    p = softmax(torch.cat((first, late.where(filled[:, None], -torch.inf)), 1), 1)
    exact = torch.cat((self.sink_v, self.ring_v), 1)
    o = weighted_sum(p[:, :exact.shape[1]].transpose(1, 2)[:, None], exact)
    c = einsum("bsh,bsc->bhc", p[:, exact.shape[1]:], c_v)[:, None]
    return o + self.V.reconstruct_heads(c, self.d)


def latent_scores(q, c, K, places, rope):
    """K.scores of one query (B, 1, H, d), rotated, and latents c (B, S, d_c): (B, S, H).

    Written so that a compiler reads each rebuilt key once: it is turned and multiplied with all
    queries of its group in registers, and no rotated key is ever stored. Heads come last, as they
    lie in memory: softmax and product then pass over them in that order.
    """
    if isinstance(K, CommutingBasis):
        return einsum("bthc,bsc->bsh", K.absorb(q), c)
    d = q.shape[-1]
    first, second = halves(rope, K.reconstruct(c, d), places)                     # (B, S, G, d/2)
    q = q.unflatten(2, (first.shape[2], -1)) * d**-0.5                       # (B, 1, G, H/G, d)
    s = [(first * one[..., :d // 2] + second * one[..., d // 2:]).sum(-1) for one in q.unbind(3)]
    return torch.stack(s, -1).flatten(2)


def halves(rope, x, positions):
    """rope(x, positions), the halves of the last axis apart: a compiler need not store them."""
    (x, y), (cos, _), (minus, sin) = (t.chunk(2, -1) for t in
                                      (x, rope.cos[positions], rope.sin[positions]))
    return x * cos + y * minus, y * cos + x * sin


# Latents -----------------------------------------------------------------------------------------

def put(store, c, at):
    """Append c (B, 1, d_c) at place `at`; a group of 4 bits is written when it is full."""
    if isinstance(store, Latents):
        store.c[:, at] = c
        return
    store.pending[:, at % GROUP] = c
    if groups := store.minimum.shape[1]:
        complete, group = (at + 1) % GROUP == 0, (at // GROUP).clamp(max=groups - 1)
        packed, low, step = quantize(store.pending)
        half = group * GROUP // 2 + torch.arange(GROUP // 2, device=at.device)
        for buffer, i, x in ((store.packed, half, packed), (store.minimum, group, low),
                             (store.scale, group, step)):
            now = complete.view(-1, *[1] * (x.dim() - 2))
            buffer[:, i] = torch.where(now, x, buffer[:, i])


def whole(store, at):
    """All latents (B, S, d_c), their places (S,), and which of them are filled up to place `at`."""
    if isinstance(store, Latents):
        places = torch.arange(store.c.shape[1], device=at.device)
        return store.c, places, places <= at
    old, new = (torch.arange(n, device=at.device)
                for n in (2 * store.packed.shape[1], store.pending.shape[1]))
    done = (at + 1) // GROUP * GROUP
    c = torch.cat((dequantize(store.packed, store.minimum, store.scale), store.pending), 1)
    return c, torch.cat((old, done + new)), torch.cat((old < done, done + new <= at))


# The step ----------------------------------------------------------------------------------------

def compiled(llama, caches, B=1):
    """The decode step, tokens (B, 1) -> logits (B, V), for every place after what the caches hold.

    On CUDA the first call compiles, the second records all kernels as one graph, later ones launch
    it; the logits are then one buffer, written over by the next call.
    Raises UserError where there is no compiler.
    """
    assert all(map(settled, caches))
    device, graph, logits = llama.norm.weight.device, None, None
    fused = device.type == "cuda" and B == 1               # the compiler's own matrix times vector
    block = torch.compile(model.Block.forward, options={"coordinate_descent_tuning": fused})
    at = torch.tensor([caches[0].length], device=device)
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


def stepper(llama, caches, compile):
    """tokens (1, T) -> logits (1, V): eager until the caches are settled, then perhaps compiled."""
    def eager(tokens):
        return llama.head(llama.hidden(tokens, caches)[:, -1])
    fixed = None

    def step(tokens):
        nonlocal fixed
        if compile and fixed is None and caches[0].length and all(map(settled, caches)):
            fixed = compiled(llama, caches)
        return (fixed or eager)(tokens)
    return step
