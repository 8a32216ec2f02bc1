"""What the model remembers: three caches with one contract (Secs. 3, 4.1 and App. C; CSKV).

A cache serves one layer. It is made for B sequences of at most `capacity` tokens, and its buffers
are allocated then, once. `attend(q, k, v, rope)` takes T new tokens, not yet rotated,

    q (B, T, H, d),  k and v (B, T, G, d)  ->  (B, T, H, d)

stores their keys and values, and answers with causal attention over everything stored. What is
stored comes in parts, exact or low-rank, and `attend` below puts one softmax over all of them:

    FullCache         [Exact]                              2 * G*d numbers a token
    CompressedCache   [LowRank]                            d_k + d_v
    BiBranchCache     [Exact sinks, Exact window, LowRank] d_k + d_v, or 4 bits each, and the exact

    k --- down ---> [ c_k ] --- up ---> k~ --- rope ---> q . k~ --- softmax ---> p
    v --- down ---> [ c_v ] ------------- p . c_v, one latent for each head ------------ up ---> o

A basis is a pair: `down` (d_c, G*d) makes the latent, `up` (G*d, d_c) expands it. In the papers'
closed forms up = U has orthonormal columns and down = U^T.

Does NOT include: eviction of tokens, paging, sequences of different lengths in one batch, or the
fixed-shape step that --compile compiles (runtime/fast.py, tested equal to these).
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import einsum

BLOCK = {"cpu": 2**22, "cuda": 2**26}      # bytes of keys that are rebuilt at a time
GROUP = 32                                 # tokens that share one scale and minimum in 4 bits


# Eq. 1 -------------------------------------------------------------------------------------------

def attention(q, k, v, mask=None):
    """Eq. 1: q (B, T, H, d), k and v (B, S, G, d) -> (B, T, H, d).

    Query t sees the keys in mask (T, S); without one, the queries are the last T of S tokens.
    """
    T, S, G = q.shape[1], k.shape[1], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if T == 1 and q.device.type == "cpu":       # a group's heads as queries: each key is read once
        q = q.unflatten(1, (G, -1)).squeeze(3)                                # (B, G, H/G, d)
        return F.scaled_dot_product_attention(q, k, v, mask).flatten(1, 2)[:, None]
    causal = mask is None and T == S > 1
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    return o.transpose(1, 2)


def scores(q, k):
    """q . k / sqrt(d): q (B, T, H, d), k (B, S, G, d) -> (B, T, H, S)."""
    q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5               # (B, T, G, H/G, d)
    return einsum("btgrd,bsgd->btgrs", q, k).flatten(2, 3)


def mix(p, v):
    """p (B, T, H, S) over values v (B, S, G, d) -> (B, T, H, d)."""
    return einsum("btgrs,bsgd->btgrd", p.unflatten(2, (v.shape[2], -1)), v).flatten(2, 3)


def softmax(s, axis=-1):
    """In float32 at least."""
    return s.softmax(axis, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


# Sec. 4.1, App. C: a low-rank map ----------------------------------------------------------------

class Basis(NamedTuple):
    """The low-rank map of keys or of values in one layer: c = down k, k~ = up c.

    `turns` is for a map that commutes with the rotation: the component of a head that each number
    of a latent turns with. Then latents are cached rotated and no key is rebuilt.
    """

    down: torch.Tensor                    # (d_c, G*d)
    up: torch.Tensor                      # (G*d, d_c)
    turns: torch.Tensor | None = None     # (d_c,), each in 0 .. d-1

    @property
    def d_c(self) -> int:
        return self.down.shape[0]

    def shrink(self, x):
        """x (B, T, G, d) -> latents (B, T, d_c): U^T k, the paper's X(Sigma V^T)^T."""
        return F.linear(x.flatten(2), self.down)

    def expand(self, c, d):
        """Latents (B, S, d_c) -> k~ (B, S, G, d): all KV heads first, then the groups [E3]."""
        return F.linear(c, self.up).unflatten(-1, (-1, d))

    def latents(self, k, rope, at):
        """What is cached of keys k (B, T, G, d), not rotated, at places `at`: (B, T, d_c)."""
        c = self.shrink(k)
        return c if self.turns is None else rope(c[:, :, None], at, self.turns)[:, :, 0]

    def keys(self, c, rope, at, d):
        """k~ (B, S, G, d), rotated, of the cached latents of places `at`."""
        return self.expand(c, d) if self.turns is not None else rope(self.expand(c, d), at)

    def scores(self, q, c, rope, at):
        """q . k~ / sqrt(d): q (B, T, H, d), rotated, and cached c (B, S, d_c) -> (B, T, H, S).

        In a basis that commutes U goes to the query, as App. C wants; otherwise k~ is rebuilt.
        """
        if self.turns is None:
            return scores(q, self.keys(c, rope, at, q.shape[-1]))
        return einsum("bthc,bsc->bths", self.fold(q), c)

    def fold(self, q):
        """U^T q / sqrt(d): q (B, T, H, d), rotated -> (B, T, H, d_c). App. C, where it is right."""
        d = q.shape[-1]
        U = self.up.unflatten(0, (-1, d))                            # (G, d, d_c)
        q = q.unflatten(2, (len(U), -1)) * d**-0.5
        return einsum("btgrd,gdc->btgrc", q, U).flatten(2, 3)

    def heads(self, o, d):
        """Mixed latents (B, T, H, d_c) -> (B, T, H, d): Eq. 9, head i with its rows of U [E2]."""
        U = self.up.unflatten(0, (-1, d))                            # (G, d, d_c)
        o = o.unflatten(2, (U.shape[0], -1))                         # (B, T, G, H/G, d_c)
        return einsum("btgrc,gdc->btgrd", o, U).flatten(2, 3)

    def block(self, B):
        """How many tokens' keys are rebuilt at a time, a multiple of GROUP: on a CPU so few that
        they stay in its cache until they have met the query."""
        size = BLOCK.get(self.up.device.type, BLOCK["cuda"]) // (B * self.up[:, 0].nbytes)
        return max(1, size // GROUP) * GROUP


# Parts of a cache, and one softmax over them -----------------------------------------------------

class Exact(NamedTuple):
    """Keys, rotated, and values as they came, (B, S, G, d)."""

    k: torch.Tensor
    v: torch.Tensor

    def scores(self, q):
        return scores(q, self.k)

    @property
    def size(self) -> int:
        return self.k.shape[1]

    def mix(self, p, d):
        return mix(p, self.v)

    def whole(self, d):
        return self.k, self.v


class LowRank(NamedTuple):
    """Latents of the tokens at places `at`, in any store that can `read` a span of them.

    The rotation stands between U_k and the cached key and depends on that key's position, so U_k
    cannot be folded into the query (Eq. 7 fails, [E4]) unless it commutes with the rotation: keys
    are rebuilt, then rotated. Nothing stands between U_v and the values: latents are mixed, the
    mixture expanded (Eq. 9, [E5], [E18]).
    """

    K: Basis
    V: Basis
    c_k: "Latents | Latents4"
    c_v: "Latents | Latents4"
    rope: object
    at: slice

    @property
    def size(self) -> int:
        return self.at.stop - self.at.start

    def blocks(self, B):
        """(span in the store, its places) of every block of tokens."""
        start, step = self.at.start, self.K.block(B)
        for i in range(0, self.size, step):
            j = min(i + step, self.size)
            yield slice(i, j), slice(start + i, start + j)

    def scores(self, q):
        return torch.cat([self.K.scores(q, self.c_k.read(span), self.rope, at)
                          for span, at in self.blocks(len(q))], -1)

    def mix(self, p, d):
        mixed = sum(einsum("bths,bsc->bthc", p[..., span], self.c_v.read(span))
                    for span, _ in self.blocks(len(p)))
        return self.V.heads(mixed, d)

    def whole(self, d):
        span = slice(0, self.size)
        return (self.K.keys(self.c_k.read(span), self.rope, self.at, d),
                self.V.expand(self.c_v.read(span), d))


def attend(q, parts):
    """Attention of q (B, T, H, d), rotated, over all parts together: one softmax.

    A single query meets latents as Eq. 9 has it, and nothing of full width outlives a block. For
    many queries it is cheaper to rebuild everything once; the last T keys are then their own.
    """
    d, parts = q.shape[-1], [part for part in parts if part.size]
    if q.shape[1] > 1:
        return attention(q, *(torch.cat(x, 1) for x in zip(*(part.whole(d) for part in parts))))
    p = softmax(torch.cat([part.scores(q) for part in parts], -1))
    shares = p.split([part.size for part in parts], -1)
    return sum(part.mix(share, d) for part, share in zip(parts, shares))


# What parts are stored in ------------------------------------------------------------------------

class Latents:
    """A growing list of latents (B, S, d_c), kept as they come."""

    def __init__(self, B, capacity, d_c, like):
        self.n, self.c = 0, like.new_zeros(B, capacity, d_c)

    def append(self, c):
        self.c[:, self.n:self.n + c.shape[1]] = c
        self.n += c.shape[1]

    def read(self, span):
        return self.c[:, span]

    @property
    def nbytes(self) -> int:
        return self.c.nbytes


def quantize(c):
    """Latents (B, 32*j, d_c) -> codes (B, 16*j, d_c), two to a byte, minimum, step (B, j, 1, d_c).

    Per channel, in groups of 32 tokens: channels differ in scale, tokens do not. The minimum is a
    number like any other; CSKV's code clamps it so that a group away from zero is lost [E31].
    """
    groups = c.unflatten(1, (-1, GROUP))                                     # (B, j, 32, d_c)
    low = groups.amin(2, keepdim=True)
    step = (groups.amax(2, keepdim=True) - low) / 15
    codes = ((groups - low) / step.where(step > 0, 1)).round().clamp(0, 15)
    codes = codes.flatten(1, 2).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, low, step


def dequantize(packed, low, step):
    """The inverse of quantize, to half a step."""
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1, 2)
    return (codes.unflatten(1, (-1, GROUP)) * step + low).flatten(1, 2)


def round_trip(c):
    """Latents (B, S, d_c) as they are read back: full groups of 32 tokens rounded, the rest not."""
    full = c.shape[1] // GROUP * GROUP
    return torch.cat((dequantize(*quantize(c[:, :full])), c[:, full:]), 1)


class Latents4:
    """A growing list of latents in 4 bits, two to a byte; tokens wait unrounded for 32.

    `nbytes` counts minimum and step: CSKV's "95 %" leaves them out [E32].
    """

    def __init__(self, B, capacity, d_c, like):
        groups = capacity // GROUP
        self.packed = like.new_zeros(B, groups * GROUP // 2, d_c, dtype=torch.uint8)
        self.low, self.step = like.new_zeros(2, B, groups, 1, d_c)
        self.waiting, self.n = like.new_zeros(B, min(GROUP, capacity), d_c), 0

    def append(self, c):
        done, held = self.n // GROUP, self.n % GROUP
        self.n += c.shape[1]
        c = torch.cat((self.waiting[:, :held], c), 1)
        new = self.n // GROUP - done
        if new:
            at, half = slice(done, done + new), slice(done * GROUP // 2, (done + new) * GROUP // 2)
            self.packed[:, half], self.low[:, at], self.step[:, at] = quantize(c[:, :new * GROUP])
        self.waiting[:, :self.n % GROUP] = c[:, new * GROUP:]

    def read(self, span):
        """Latents of the tokens in span, whose start is a multiple of 32."""
        done = self.n // GROUP
        at = slice(span.start // GROUP, min(done, -(-span.stop // GROUP)))
        packed = self.packed[:, at.start * GROUP // 2:at.stop * GROUP // 2]
        old = dequantize(packed, self.low[:, at], self.step[:, at])
        late = self.waiting[:, :max(0, span.stop - done * GROUP)]
        return torch.cat((old[:, :span.stop - span.start], late), 1)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.low.nbytes + self.step.nbytes + self.waiting.nbytes


# The three caches --------------------------------------------------------------------------------

class FullCache:
    """Every key, rotated, and every value: Eq. 4."""

    def __init__(self, B, capacity, G, d, dtype=None, device=None):
        self.k = torch.zeros(B, capacity, G, d, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.capacity, self.n = capacity, 0

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        self.k[:, new], self.v[:, new], self.n = rope(k, new), v, new.stop
        return attention(rope(q, new), self.k[:, :self.n], self.v[:, :self.n])

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class CompressedCache:
    """LoRC: latents of every token, and nothing else (Secs. 4.1, 4.3)."""

    def __init__(self, B, capacity, K: Basis, V: Basis, d):
        self.K, self.V, self.capacity, self.n = K, V, capacity, 0
        self.c_k, self.c_v = (Latents(B, capacity, b.d_c, b.down) for b in (K, V))

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        self.c_k.append(self.K.latents(k, rope, new))
        self.c_v.append(self.V.shrink(v))
        self.n = new.stop
        every = slice(0, self.n)
        return attend(rope(q, new), [LowRank(self.K, self.V, self.c_k, self.c_v, rope, every)])

    @property
    def nbytes(self) -> int:
        return self.c_k.nbytes + self.c_v.nbytes


class BiBranchCache:
    """CSKV's two branches: the first `sinks` and last `window` tokens exact, latents of the others.

    The rule [E34]: tokens that come several at once (a prompt) see each other exactly, and what
    came before them as it is stored. A token that comes alone counts itself among the last
    `window`. A token is compressed, once, at the moment it leaves the window. `strict` answers for
    a whole text, in one call that keeps nothing, as if its tokens had come one by one.

    The window is a ring: place p after the sinks lives in slot p % window [E33].
    """

    def __init__(self, B, capacity, K: Basis, V: Basis, d, sinks=4, window=32, bits=16,
                 strict=False):
        self.K, self.V, self.d, self.bits, self.strict = K, V, d, bits, strict
        self.sinks, self.window, self.capacity, self.n = sinks, window, capacity, 0
        after = max(0, capacity - sinks)                         # tokens that sinks have no room for
        self.sink_k, self.sink_v, self.ring_k, self.ring_v = (
            K.down.new_zeros(B, size, K.up.shape[0] // d, d)
            for size in 2 * [min(sinks, capacity)] + 2 * [min(window, after)])
        store, between = {16: Latents, 4: Latents4}[bits], max(0, after - window)
        if bits == 16:
            between = -(-between // 8) * 8                       # matrix units want multiples of 8
        self.c_k, self.c_v = (store(B, between, b.d_c, b.down) for b in (K, V))

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        q = rope(q, new)
        if self.strict:
            return self.score(q, k, v, rope)
        if q.shape[1] == 1:
            self.remember(k, v, rope)
            return attend(q, self.parts(rope))
        o = attend(q, [*self.parts(rope), Exact(rope(k, new), v)])
        self.remember(k, v, rope)
        return o

    def places(self):
        """Positions of what is held: sinks, between, and the ring's slots in the order they lie."""
        places = max(self.n - self.sinks, 0)
        slot = torch.arange(min(places, self.window), device=self.ring_k.device)
        ring = self.sinks + places - 1 - (places - 1 - slot) % max(1, self.window)
        between = slice(self.sinks, self.sinks + max(0, places - self.window))
        return slice(0, min(self.n, self.sinks)), between, ring

    def parts(self, rope):
        """Both branches: sinks and window, exact, and the latents between."""
        first, between, ring = self.places()
        return [Exact(rope(self.sink_k[:, first], first), self.sink_v[:, first]),
                Exact(rope(self.ring_k[:, :len(ring)], ring), self.ring_v[:, :len(ring)]),
                LowRank(self.K, self.V, self.c_k, self.c_v, rope, between)]

    def remember(self, k, v, rope):
        """Append k, v (B, T, G, d): to the sinks, then through the window into the latents."""
        first = min(max(self.sinks - self.n, 0), k.shape[1])
        at = slice(self.n, self.n + first)
        self.sink_k[:, at], self.sink_v[:, at] = k[:, :first], v[:, :first]
        before = max(self.n - self.sinks, 0)                         # places taken after the sinks
        self.n += k.shape[1]
        T, held = k.shape[1] - first, min(before, self.window)
        out, keep = max(0, held + T - self.window), min(T, self.window)      # leave and enter it

        def slots(start, stop):
            return torch.arange(start, stop, device=k.device) % max(1, self.window)
        old = slots(before - held, before - held + min(out, held))
        new = slots(before + T - keep, before + T)
        if out:
            gone = slice(self.sinks + self.c_k.n, self.sinks + self.c_k.n + out)
            gone_k, gone_v = (torch.cat((ring[:, old], x[:, first:first + out - len(old)]), 1)
                              for ring, x in ((self.ring_k, k), (self.ring_v, v)))
            self.c_k.append(self.K.latents(gone_k, rope, gone))
            self.c_v.append(self.V.shrink(gone_v))
        self.ring_k[:, new], self.ring_v[:, new] = k[:, first + T - keep:], v[:, first + T - keep:]

    def score(self, q, k, v, rope):
        """The decode regime for a whole text in one pass, by masks: q rotated, k and v not.

        All keys stand side by side, exact, as latents, and as latents in 4 bits; each query sees
        each token once, in the kind in which that token is held when the query comes.
        """
        T, at = q.shape[1], slice(0, q.shape[1])
        late = slice(min(self.sinks, T), T)
        c_k, c_v = self.K.latents(k[:, late], rope, late), self.V.shrink(v[:, late])
        stored = [(c_k, c_v)]
        if self.bits == 4:                                         # gradients pass straight through
            stored.append(tuple(c + (round_trip(c) - c).detach() for c in (c_k, c_v)))
        keys = [rope(k, at)] + [self.K.keys(c, rope, late, self.d) for c, _ in stored]
        values = [v] + [self.V.expand(c, self.d) for _, c in stored]
        keys, values = torch.cat(keys, 1), torch.cat(values, 1)
        i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
        kind = ((j >= self.sinks) & (j <= i - self.window)).long()                # (T, T)
        if self.bits == 4:
            group_end = self.sinks + ((j - self.sinks) // GROUP + 1) * GROUP
            kind += (kind == 1) & (group_end <= i + 1 - self.window)
        seen = torch.cat([(kind == 0) & (j <= i)]
                         + [(kind == n + 1)[:, late] for n in range(len(stored))], 1)
        parts = [attention(q[:, rows], keys, values, seen[rows]) for rows in i[:, 0].split(512)]
        return torch.cat(parts, 1)

    @property
    def nbytes(self) -> int:
        exact = self.sink_k, self.sink_v, self.ring_k, self.ring_v
        return sum(x.nbytes for x in (*exact, self.c_k, self.c_v))
