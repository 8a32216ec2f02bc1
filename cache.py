"""What the model remembers: three caches with one contract (Secs. 3, 4.1 and App. C; CSKV).

A cache serves one layer. It is made for B sequences of at most `capacity` tokens, and its buffers
are allocated then, once. `attend(q, k, v, rope)` takes T new tokens, not yet rotated,

    q (B, T, H, d),  k and v (B, T, G, d)  ->  (B, T, H, d)

remembers their keys and values, and answers with causal attention over all that it remembers.
`nbytes` is the sum of the buffers it holds. `decode` is the same for one token, with shapes that do
not depend on its place, so that one compiled step serves every place (--compile).

    FullCache         k rotated, and v                                 2 * G*d numbers a token
    CompressedCache   latents c_k = U_k^T k and c_v = U_v^T v          d_k + d_v
    BiBranchCache     first and last tokens exact, latents between     d_k + d_v, or 4 bits each

    k --- down ---> [ c_k ] --- up ---> k~ --- rope ---> q . k~ --- softmax ---> p
    v --- down ---> [ c_v ] ------------- p . c_v, one latent for each head ------------ up ---> o

A basis is a pair: `down` (d_c, G*d) makes the latent, `up` (G*d, d_c) expands it. In the papers'
closed forms up = U has orthonormal columns and down = U^T.

Does NOT include: eviction of tokens, paging, or sequences of different lengths in one batch.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import einsum

BLOCK = {"cpu": 2**22, "cuda": 2**26}      # bytes of keys that an eager step rebuilds at a time
GROUP = 32                                 # tokens that share one scale and minimum in 4 bits


class Basis(NamedTuple):
    """The low-rank map of keys or of values in one layer: c = down k, k~ = up c.

    Where the map commutes with the rotation, `turns` says which component of a head's frequencies
    each number of a latent turns with; then latents are cached rotated and no key is rebuilt.
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

    def block(self, B):
        """Tokens of B sequences that an eager step rebuilds at a time: full GROUPs, one at least.

        On a CPU, so few that they stay in its cache until they have met the query.
        """
        size = BLOCK.get(self.up.device.type, BLOCK["cuda"]) // (B * self.up[:, 0].nbytes)
        return max(1, size // GROUP) * GROUP

    def heads(self, o, d):
        """Mixed latents (B, T, H, d_c) -> (B, T, H, d): Eq. 9, head i with its rows of U [E2]."""
        U = self.up.unflatten(0, (-1, d))                            # (G, d, d_c)
        o = o.unflatten(2, (U.shape[0], -1))                         # (B, T, G, H/G, d_c)
        return einsum("btgrc,gdc->btgrd", o, U).flatten(2, 3)


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


def static_scores(q, c, K, places, rope):
    """K.scores of one query (B, 1, H, d), rotated, and latents c (B, S, d_c): (B, S, H).

    Written so that a compiler reads each rebuilt key once: it is turned and multiplied with all
    queries of its group in registers, and no rotated key is ever stored. Heads come last, as they
    lie in memory: softmax and product then pass over them in that order.
    """
    if K.turns is not None:
        return einsum("bthc,bsc->bsh", K.fold(q), c)
    d = q.shape[-1]
    first, second = rope.halves(K.expand(c, d), places)                      # (B, S, G, d/2)
    q = q.unflatten(2, (first.shape[2], -1)) * d**-0.5                       # (B, 1, G, H/G, d)
    s = [(first * one[..., :d // 2] + second * one[..., d // 2:]).sum(-1) for one in q.unbind(3)]
    return torch.stack(s, -1).flatten(2)


def mix(p, v):
    """p (B, T, H, S) over values v (B, S, G, d) -> (B, T, H, d)."""
    return einsum("btgrs,bsgd->btgrd", p.unflatten(2, (v.shape[2], -1)), v).flatten(2, 3)


def softmax(s, axis=-1):
    """In float32 at least."""
    return s.softmax(axis, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


class FullCache:
    """Every key, rotated, and every value: Eq. 4."""

    settled = True

    def __init__(self, B, capacity, G, d, dtype=None, device=None):
        self.k = torch.zeros(B, capacity, G, d, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.capacity, self.n = capacity, 0

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        self.k[:, new], self.v[:, new], self.n = rope(k, new), v, new.stop
        return attention(rope(q, new), self.k[:, :self.n], self.v[:, :self.n])

    def decode(self, q, k, v, rope, at):
        self.k[:, at], self.v[:, at] = rope(k, at), v
        seen = torch.arange(self.capacity, device=at.device) <= at[:, None]
        return attention(rope(q, at), self.k, self.v, seen)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class CompressedCache:
    """Latents only (Secs. 4.1, 4.3, App. C). Nothing of full width outlives a call.

    The rotation stands between U_k and the cached key and depends on that key's position, so U_k
    cannot be folded into the query (Eq. 7 fails, [E4]) unless it commutes with the rotation: keys
    are rebuilt, then rotated. Nothing stands between U_v and the values: latents are mixed, the
    mixture expanded (Eq. 9, [E5], [E18]).
    """

    settled = True

    def __init__(self, B, capacity, K: Basis, V: Basis, d):
        self.K, self.V, self.d = K, V, d
        self.c_k = K.down.new_zeros(B, capacity, K.d_c)
        self.c_v = V.down.new_zeros(B, capacity, V.d_c)
        self.capacity, self.n = capacity, 0

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        self.c_k[:, new] = self.K.latents(k, rope, new)
        self.c_v[:, new], self.n = self.V.shrink(v), new.stop
        c_k, c_v, q = self.c_k[:, :self.n], self.c_v[:, :self.n], rope(q, new)
        if q.shape[1] > 1:                           # many queries: rebuild once, attend fused
            keys = self.K.keys(c_k, rope, slice(0, self.n), self.d)
            return attention(q, keys, self.V.expand(c_v, self.d))
        step = self.K.block(len(q))
        blocks = [slice(i, min(i + step, self.n)) for i in range(0, self.n, step)]
        p = softmax(torch.cat([self.K.scores(q, c_k[:, b], rope, b) for b in blocks], -1))
        return self.V.heads(einsum("bths,bsc->bthc", p, c_v), self.d)

    def decode(self, q, k, v, rope, at):
        self.c_k[:, at], self.c_v[:, at] = self.K.latents(k, rope, at), self.V.shrink(v)
        s = static_scores(rope(q, at), self.c_k, self.K, slice(0, self.capacity), rope)
        seen = torch.arange(self.capacity, device=at.device)[:, None] <= at
        p = softmax(s.where(seen, -torch.inf), 1)                                # (B, S, H)
        return self.V.heads(einsum("bsh,bsc->bhc", p, self.c_v)[:, None], self.d)

    @property
    def nbytes(self) -> int:
        return self.c_k.nbytes + self.c_v.nbytes


class Static(NamedTuple):
    """A cache that is asked for one token at place `at`, a tensor (1,): no shape tells where."""

    cache: "FullCache | CompressedCache | BiBranchCache"
    at: torch.Tensor

    def attend(self, q, k, v, rope):
        return self.cache.decode(q, k, v, rope, self.at)

    @property
    def capacity(self) -> int:
        return self.cache.capacity


class Latents:
    """A growing list of latents (B, S, d_c), kept as they come."""

    def __init__(self, B, capacity, d_c, like):
        self.capacity, self.n = capacity, 0
        self.c = like.new_zeros(B, -(-capacity // 8) * 8, d_c)   # matrix units want multiples of 8

    def append(self, c):
        self.c[:, self.n:self.n + c.shape[1]] = c
        self.n += c.shape[1]

    def read(self, span):
        return self.c[:, span]

    def put(self, c, at):
        """Append c (B, 1, d_c) at place `at`, a tensor (1,)."""
        self.c[:, at] = c

    def whole(self, at):
        """The whole buffer (B, S, d_c), its places (S,), and which are filled up to place `at`."""
        places = torch.arange(self.c.shape[1], device=at.device)
        return self.c, places.clamp(max=self.capacity - 1), places <= at

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
        self.capacity, groups = capacity, capacity // GROUP
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

    def put(self, c, at):
        """Append c (B, 1, d_c) at place `at`; the group it is in is written when it is full."""
        self.waiting[:, at % GROUP] = c
        if groups := self.low.shape[1]:
            full, group = (at + 1) % GROUP == 0, (at // GROUP).clamp(max=groups - 1)
            packed, low, step = quantize(self.waiting)
            half = group * GROUP // 2 + torch.arange(GROUP // 2, device=at.device)
            for store, i, x in ((self.packed, half, packed),
                                (self.low, group, low), (self.step, group, step)):
                store[:, i] = torch.where(full.view(-1, *[1] * (x.dim() - 2)), x, store[:, i])

    def whole(self, at):
        """All groups and the waiting tokens (B, S, d_c), their places, which are filled [0, at]."""
        old, new = (torch.arange(n, device=at.device)
                    for n in (2 * self.packed.shape[1], self.waiting.shape[1]))
        done = (at + 1) // GROUP * GROUP
        c = torch.cat((dequantize(self.packed, self.low, self.step), self.waiting), 1)
        places = torch.cat((old, (done + new).clamp(max=self.capacity - 1)))
        return c, places, torch.cat((old < done, done + new <= at))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.low.nbytes + self.step.nbytes + self.waiting.nbytes


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
        G, store = K.up.shape[0] // d, {16: Latents, 4: Latents4}[bits]
        self.K, self.V, self.d, self.bits, self.strict = K, V, d, bits, strict
        self.sinks, self.window, self.capacity, self.n = sinks, window, capacity, 0
        self.sink_k, self.sink_v = K.down.new_zeros(2, B, min(sinks, capacity), G, d)
        slots, between = min(window, max(0, capacity - sinks)), max(0, capacity - sinks - window)
        self.ring_k, self.ring_v = K.down.new_zeros(2, B, slots, G, d)
        self.c_k, self.c_v = store(B, between, K.d_c, K.down), store(B, between, V.d_c, V.down)

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + q.shape[1])
        q = rope(q, new)
        if self.strict:
            return self.score(q, k, v, rope)
        if q.shape[1] == 1:
            self.remember(k, v, rope)
            return self.step(q, rope)
        keys, values = self.everything(rope)
        o = attention(q, torch.cat((*keys, rope(k, new)), 1), torch.cat((*values, v), 1))
        self.remember(k, v, rope)
        return o

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

    def branches(self):
        """Positions of what is held: sinks, between, and the ring's slots in the order they lie."""
        places = max(self.n - self.sinks, 0)
        slot = torch.arange(min(places, self.window), device=self.ring_k.device)
        ring = self.sinks + places - 1 - (places - 1 - slot) % max(1, self.window)
        between = slice(self.sinks, self.sinks + max(0, places - self.window))
        return slice(0, min(self.n, self.sinks)), between, ring

    def step(self, q, rope):
        """One query over both branches, one softmax: q (B, 1, H, d), rotated -> (B, 1, H, d)."""
        first, between, ring = self.branches()
        a, m = first.stop, between.stop - between.start
        size = self.K.block(len(q))
        blocks = [slice(i, min(i + size, m)) for i in range(0, m, size)]
        keys = [rope(self.sink_k[:, :a], first), rope(self.ring_k[:, :len(ring)], ring)]
        s = [scores(q, k) for k in keys]
        s += [self.K.scores(q, self.c_k.read(b), rope, slice(a + b.start, a + b.stop))
              for b in blocks]
        p = softmax(torch.cat(s, -1))                                # sinks, window, between
        exact = torch.cat((self.sink_v[:, :a], self.ring_v[:, :len(ring)]), 1)
        o = mix(p[..., :exact.shape[1]], exact)
        if m:
            late = p[..., exact.shape[1]:]
            c = sum(einsum("bths,bsc->bthc", late[..., b], self.c_v.read(b)) for b in blocks)
            o = o + self.V.heads(c, self.d)
        return o

    def decode(self, q, k, v, rope, at):
        place = at - self.sinks
        slot, gone = place % max(1, self.window), place - self.window
        gone_k, gone_v = (self.ring_k[:, slot], self.ring_v[:, slot]) if self.window else (k, v)
        self.c_k.put(self.K.latents(gone_k, rope, at - self.window), gone)
        self.c_v.put(self.V.shrink(gone_v), gone)
        if self.window:
            self.ring_k[:, slot], self.ring_v[:, slot] = k, v
        ring = at - (slot - torch.arange(self.window, device=at.device)) % max(1, self.window)
        (c_k, places, filled), (c_v, *_) = self.c_k.whole(gone), self.c_v.whole(gone)
        q, exact = rope(q, at), (rope(self.sink_k, slice(0, self.sinks)), rope(self.ring_k, ring))
        late = static_scores(q, c_k, self.K, self.sinks + places, rope)
        first = scores(q, torch.cat(exact, 1))[:, 0].transpose(1, 2)
        p = softmax(torch.cat((first, late.where(filled[:, None], -torch.inf)), 1), 1)
        exact = torch.cat((self.sink_v, self.ring_v), 1)
        o = mix(p[:, :exact.shape[1]].transpose(1, 2)[:, None], exact)
        c = einsum("bsh,bsc->bhc", p[:, exact.shape[1]:], c_v)[:, None]
        return o + self.V.heads(c, self.d)

    @property
    def settled(self) -> bool:
        """Whether decode can take over: sinks and window are full."""
        return self.n >= self.sinks + self.window

    def everything(self, rope):
        """Keys, rotated, and values of all that is held, at full width, branch by branch."""
        first, between, ring = self.branches()
        every = slice(0, between.stop - between.start)
        keys = (rope(self.sink_k[:, :first.stop], first),
                self.K.keys(self.c_k.read(every), rope, between, self.d),
                rope(self.ring_k[:, :len(ring)], ring))
        values = (self.sink_v[:, :first.stop], self.V.expand(self.c_v.read(every), self.d),
                  self.ring_v[:, :len(ring)])
        return keys, values

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
