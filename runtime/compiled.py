"""The decode step of --compile: all shapes are fixed, so that one compilation serves every step.

Each function here computes what a cache's own `attend` computes for one new token. It reads whole
buffers, takes the token's position as a tensor, and masks the tokens that are not stored yet. On
CUDA, a CUDA graph launches all kernels of a step together. The tests compare every function with
cache.py at every position.

Where runtime/fused.py is faster, its kernels compute the attention over latents.
"""
from typing import NamedTuple

import torch
from torch import einsum

import cache
import model
from cache import GROUP, Latents, dequantize, quantize, scores, softmax, weighted_sum
from runtime.commuting import CommutingBasis


class CompiledCache(NamedTuple):
    """A cache whose `attend` takes one token, whose position is a tensor (1,).

    `up` is the K basis's up with contiguous rows if runtime/fused.py is used, and None otherwise.
    """

    cache: object
    position: torch.Tensor
    up: torch.Tensor | None = None

    def attend(self, q, k, v, rope):
        functions = {cache.FullCache: attend_full, cache.CompressedCache: attend_compressed,
                     cache.BiBranchCache: attend_bibranch}
        return functions[type(self.cache)](self.cache, q, k, v, rope, self.position, self.up)

    @property
    def capacity(self) -> int:
        return self.cache.capacity


def ready(cache) -> bool:
    """Whether a cache can be used here: its sinks and its window, if it has any, are full."""
    return cache.length >= getattr(cache, "sinks", 0) + getattr(cache, "window", 0)


# One token, for each cache -----------------------------------------------------------------------

def attend_full(self, q, k, v, rope, position, up=None):
    self.k[:, position], self.v[:, position] = rope(k, position), v
    seen = torch.arange(self.capacity, device=position.device) <= position[:, None]
    return cache.attention(rope(q, position), self.k, self.v, seen)


def attend_compressed(self, q, k, v, rope, position, up=None):
    write_latent(self.c_k, self.K.cached_latents(k, rope, position), position)
    write_latent(self.c_v, self.V.project(v), position)
    q = rope(q, position)
    if up is not None:
        return attend_fused(self, q, rope, position, up)
    s = latent_scores(q, self.c_k.c, self.K, slice(0, self.capacity), rope)
    seen = torch.arange(self.capacity, device=position.device)[:, None] <= position
    p = softmax(s.where(seen, -torch.inf), 1)                                    # (B, S, H)
    return self.V.reconstruct_heads(einsum("bsh,bsc->bhc", p, self.c_v.c)[:, None], q.shape[-1])


def attend_bibranch(self, q, k, v, rope, position, up=None):
    newest = position - self.window - self.sinks         # index of the latent that is written now
    replace_in_window(self, k, v, rope, position, newest)
    q = rope(q, position)
    if up is not None:
        return attend_fused(self, q, rope, position, up)
    (c_k, index, stored), (c_v, *_) = (all_latents(store, newest) for store in (self.c_k, self.c_v))
    age = (position - self.sinks - torch.arange(self.window, device=q.device)) % max(1, self.window)
    keys = rope(self.sink_k, slice(0, self.sinks)), rope(self.ring_k, position - age)
    exact = scores(q, torch.cat(keys, 1))[:, 0].transpose(1, 2)                  # (B, E, H)
    positions = (self.sinks + index).clamp(max=self.capacity - 1)
    latent = latent_scores(q, c_k, self.K, positions, rope)                      # (B, S, H)
    s = torch.cat((exact, latent.where(stored[:, None], -torch.inf)), 1)
    p, E = softmax(s, 1), exact.shape[1]
    o = weighted_sum(p[:, :E].transpose(1, 2)[:, None], torch.cat((self.sink_v, self.ring_v), 1))
    return o + self.V.reconstruct_heads(einsum("bsh,bsc->bhc", p[:, E:], c_v)[:, None], self.d)


def replace_in_window(self, k, v, rope, position, newest):
    """Put k, v into the window of a BiBranchCache; what leaves it becomes latent `newest`."""
    slot = (position - self.sinks) % max(1, self.window)
    old_k, old_v = (self.ring_k[:, slot], self.ring_v[:, slot]) if self.window else (k, v)
    write_latent(self.c_k, self.K.cached_latents(old_k, rope, position - self.window), newest)
    write_latent(self.c_v, self.V.project(old_v), newest)
    if self.window:
        self.ring_k[:, slot], self.ring_v[:, slot] = k, v


def attend_fused(self, q, rope, position, up):
    """Attention over what is stored, q (B, 1, H, d) being rotated, by runtime/fused.py."""
    exact, sinks, window = [], 0, 0
    if isinstance(self, cache.BiBranchCache):
        exact = [self.sink_k, self.sink_v, self.ring_k, self.ring_v]
        sinks, window = self.sinks, self.window
    latents, exact_sums = torch.ops.lorc.attend_latents(
        q[:, 0], buffers(self.c_k), buffers(self.c_v), up, rope.cos, rope.sin, position, exact,
        sinks, window)
    o = self.V.reconstruct_heads(latents[:, None], q.shape[-1])
    return o + exact_sums[:, None] if exact else o


def latent_scores(q, c, K, positions, rope):
    """K.scores of rotated queries q (B, 1, H, d) and latents c (B, S, d_c), as (B, S, H).

    The compiler fuses the rotation of a rebuilt key with the products with all queries of its
    group, so that no rotated key is stored. Heads come last because the softmax and the sum that
    follow then read memory in order.
    """
    if isinstance(K, CommutingBasis):
        return einsum("bthc,bsc->bsh", K.absorb(q), c)
    d = q.shape[-1]
    first, second = rotated_halves(rope, K.reconstruct(c, d), positions)     # (B, S, G, d/2)
    q = q.unflatten(2, (first.shape[2], -1)) * d**-0.5                       # (B, 1, G, H/G, d)
    s = [(first * one[..., :d // 2] + second * one[..., d // 2:]).sum(-1) for one in q.unbind(3)]
    return torch.stack(s, -1).flatten(2)


def rotated_halves(rope, x, positions):
    """The two halves of rope(x, positions) along its last axis, (..., d/2) each."""
    x, y = x.chunk(2, -1)
    cos, _ = rope.cos[positions].chunk(2, -1)
    minus_sin, sin = rope.sin[positions].chunk(2, -1)
    return x * cos + y * minus_sin, y * cos + x * sin


# Latents -----------------------------------------------------------------------------------------

def write_latent(store, c, index):
    """Store c (B, 1, d_c) as latent `index`, (1,). In 4 bits, a group is packed when it is full."""
    if isinstance(store, Latents):
        store.c[:, index] = c
        return
    store.pending[:, index % GROUP] = c
    groups = store.minimum.shape[1]
    if groups == 0:
        return
    full, group = (index + 1) % GROUP == 0, (index // GROUP).clamp(max=groups - 1)
    rows = group * GROUP // 2 + torch.arange(GROUP // 2, device=index.device)
    packed, minimum, scale = quantize(store.pending)
    for buffer, at, x in ((store.packed, rows, packed), (store.minimum, group, minimum),
                          (store.scale, group, scale)):
        buffer[:, at] = torch.where(full.view(-1, *[1] * (x.dim() - 2)), x, buffer[:, at])


def all_latents(store, newest):
    """All latents (B, S, d_c) of a store, their indices (S,), and whether each of them is stored.

    `newest` (1,) is the index of the latent that was stored last.
    """
    if isinstance(store, Latents):
        index = torch.arange(store.c.shape[1], device=newest.device)
        return store.c, index, index <= newest
    old = torch.arange(2 * store.packed.shape[1], device=newest.device)
    new = torch.arange(store.pending.shape[1], device=newest.device)
    packed = (newest + 1) // GROUP * GROUP                       # tokens in full groups
    old_c = dequantize(store.packed, store.minimum, store.scale)
    return (torch.cat((old_c, store.pending), 1), torch.cat((old, packed + new)),
            torch.cat((old < packed, packed + new <= newest)))


def buffers(store):
    """The tensors of a store: [c], or [packed, minimum, scale, pending]."""
    if isinstance(store, Latents):
        return [store.c]
    return [store.packed, store.minimum, store.scale, store.pending]


# The step ----------------------------------------------------------------------------------------

def fused_kernels(device):
    """runtime/fused.py if this device can run it: NVIDIA's Hopper or newer, with Triton."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    try:
        from runtime import fused
    except ImportError:                                          # Triton is not installed
        return None
    return fused


def contiguous_up(cache, d, kernels):
    """The `up` of CompiledCache: with contiguous rows if the kernels serve this cache, or None."""
    if kernels is None or not hasattr(cache, "c_k") or isinstance(cache.K, CommutingBasis):
        return None
    up = cache.K.up
    return up.contiguous() if kernels.supports(up, d, buffers(cache.c_k)[0]) else None


def compile_step(llama, caches, B=1, fused=True):
    """The decode step, tokens (B, 1) -> logits (B, V), from the caches' present length on.

    On CUDA, the first call compiles, the second records a CUDA graph, and later calls launch it.
    They return the same tensor each time, overwritten. `fused=False` does without runtime/fused.py.
    Raises UserError where there is no compiler.
    """
    assert all(map(ready, caches))
    device, graph, logits = llama.norm.weight.device, None, None
    tuned = device.type == "cuda" and B == 1     # the compiler's own product of matrix and vector
    block = torch.compile(model.Block.forward, options={"coordinate_descent_tuning": tuned})
    position = torch.tensor([caches[0].length], device=device)
    kernels = fused_kernels(device) if fused else None
    wrapped = [CompiledCache(c, position, contiguous_up(c, llama.config.head_dim, kernels))
               for c in caches]
    tokens = None

    def step():
        h = llama.hidden(tokens, wrapped, block)
        position.add_(1)
        return llama.head(h[:, -1])

    def decode(new):
        nonlocal graph, logits, tokens
        if tokens is None:
            tokens = new.clone()
            return first_step(step)
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


def first_step(step):
    """step(), which compiles. Raises UserError with the compiler's reason if it cannot."""
    try:
        return step()
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = " ".join(str(e).split("\n\n")[0].split())       # PyTorch's hints come after it
        raise model.UserError(f"--compile: {reason:.160}; install a C++ compiler, or leave "
                              "out --compile") from None


def make_step(llama, caches, compile):
    """A step, tokens (B, T) -> logits (B, V). With `compile`, it is compiled as soon as all caches
    are ready; until then, and without `compile`, it is the eager one."""
    compiled = None

    def step(tokens):
        nonlocal compiled
        if compile and compiled is None and caches[0].length and all(map(ready, caches)):
            compiled = compile_step(llama, caches, len(tokens))
        if compiled:
            return compiled(tokens)
        return llama.head(llama.hidden(tokens, caches)[:, -1])
    return step
