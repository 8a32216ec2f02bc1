"""What the model remembers: three KV caches, and one attention over the parts they hold.

A cache serves one layer. It is made for B sequences of at most `capacity` tokens. Its method
`attend(q, k, v, rope)` takes queries q (B, T, H, d), keys and values k, v (B, T, G, d) of T new
tokens, before rotation, stores keys and values, and returns the queries' causal attention over
all tokens so far, (B, T, H, d). There are H query heads and G key-value heads of size d.

Stored tokens form parts, exact or low-rank. One softmax goes over all of them:

    cache             parts                                    stored per token
    FullCache         Exact                                    2 * G*d numbers
    CompressedCache   LowRank                                  d_k + d_v
    BiBranchCache     Exact sinks, Exact window, LowRank rest  d_k + d_v, or codes of 4 bits

In a low-rank part a key k and a value v are stored as latents c_k and c_v, of d_k and d_v numbers:

    k --- down ---> [ c_k ] --- up ---> k~ --- rope ---> q . k~ --- softmax ---> p
    v --- down ---> [ c_v ] ------------------- sum of p c_v, for each head ------ up ---> output
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import einsum

GROUP = 32                  # tokens that share one minimum and one scale when latents have 4 bits
REBUILT_BYTES = {"cpu": 2**22, "cuda": 2**26}    # of rebuilt keys in a block


# Eq. 1: attention --------------------------------------------------------------------------------

def attention(q, k, v, mask=None):
    """Causal attention, Eq. 1: q (B, T, H, d), k and v (B, S, G, d) -> (B, T, H, d).

    mask (T, S) is true where a query may see a key. Without it, the queries are the last T tokens.
    """
    T, S, G = q.shape[1], k.shape[1], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if T == 1 and q.device.type == "cpu":
        # The heads of a group are passed as queries, so that the kernel reads each key only once.
        q = q.unflatten(1, (G, -1)).squeeze(3)                                # (B, G, H/G, d)
        return F.scaled_dot_product_attention(q, k, v, mask).flatten(1, 2)[:, None]
    causal = mask is None and T == S > 1
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    return o.transpose(1, 2)


def scores(q, k):
    """Scaled dot products q . k / sqrt(d): q (B, T, H, d), k (B, S, G, d) -> (B, T, H, S)."""
    q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5               # (B, T, G, H/G, d)
    return einsum("btgrd,bsgd->btgrs", q, k).flatten(2, 3)


def weighted_sum(p, v):
    """Sum of values v (B, S, G, d) with weights p (B, T, H, S) -> (B, T, H, d)."""
    return einsum("btgrs,bsgd->btgrd", p.unflatten(2, (v.shape[2], -1)), v).flatten(2, 3)


def softmax(s, axis=-1):
    """Softmax computed in float32 or wider, returned in the dtype of s."""
    return s.softmax(axis, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


# Sec. 4.1: a low-rank map ------------------------------------------------------------------------

@dataclass(eq=False)
class Basis:
    """The low-rank map of one layer's keys or values: latent c = down k, approximation k~ = up c.

    In LoRC up = U has orthonormal columns and down = U^T; c is the paper's X(Sigma V^T)^T.
    """

    down: torch.Tensor                    # (d_c, G*d)
    up: torch.Tensor                      # (G*d, d_c); (B, G*d, d_c) in fisher_factors only

    @property
    def d_c(self) -> int:
        return self.down.shape[0]

    def project(self, x):
        """Keys or values x (B, T, G, d) -> latents (B, T, d_c)."""
        return F.linear(x.flatten(2), self.down)

    def reconstruct(self, c, d):
        """Latents c (B, S, d_c), shared by all heads [E3] -> keys or values (B, S, G, d)."""
        return (c @ self.up.mT).unflatten(-1, (-1, d))

    def reconstruct_heads(self, o, d):
        """Eq. 9: sums of latents (B, T, H, d_c) -> (B, T, H, d); a head uses its rows of U [E2]."""
        U = self.up.unflatten(0, (-1, d))                            # (G, d, d_c)
        o = o.unflatten(2, (U.shape[0], -1))                         # (B, T, G, H/G, d_c)
        return einsum("btgrc,gdc->btgrd", o, U).flatten(2, 3)

    def cached_latents(self, k, rope, positions):
        """Unrotated keys k (B, T, G, d) -> latents to store (B, T, d_c); a subclass may rotate."""
        return self.project(k)

    def rotated_keys(self, c, rope, positions, d):
        """Stored latents c (B, S, d_c) of tokens at `positions` -> rotated keys k~ (B, S, G, d)."""
        return rope(self.reconstruct(c, d), positions)

    def scores(self, q, c, rope, positions):
        """Rotated queries q (B, T, H, d) and stored latents (B, S, d_c) -> scores (B, T, H, S).

        A score is q^T R_n U c. The rotation R_n depends on the key's position n, so that U cannot
        be folded into q, as Eq. 7 and App. C do it, unless R_n U = U S_n for some S_n [E4]."""
        return scores(q, self.rotated_keys(c, rope, positions, q.shape[-1]))


# The parts of a cache, and one softmax over them --------------------------------------------------

class Exact(NamedTuple):
    """The rotated keys of some tokens, and their values: (B, S, G, d) each."""
    k: torch.Tensor
    v: torch.Tensor

    def scores(self, q):
        return scores(q, self.k)

    def weighted_values(self, p, d):
        return weighted_sum(p, self.v)

    def materialize(self, d):
        return self.k, self.v


class LowRank(NamedTuple):
    """Latents of the tokens at `positions`, in a store that can `read` spans of them.

    For one query, keys are rebuilt block by block, and the latents of the values are summed before
    the sum is expanded (Eq. 9). W_o is not multiplied by U, because the product would be larger
    than W_o if d_c > d [E5]. Multiplying q by R_n U costs H/G times as much as rebuilding k [E18].
    """

    K: Basis
    V: Basis
    c_k: "Latents | QuantizedLatents"
    c_v: "Latents | QuantizedLatents"
    rope: object
    positions: slice

    def blocks(self, B):
        """Yield (span within the store, positions) of blocks that start at multiples of GROUP."""
        limit = REBUILT_BYTES.get(self.K.up.device.type, 2**26)
        step = max(1, limit // (B * self.K.up[:, 0].nbytes) // GROUP) * GROUP
        start, stop = self.positions.start, self.positions.stop
        for i in range(start, max(stop, start + 1), step):           # an empty part is one block
            j = min(i + step, stop)
            yield slice(i - start, j - start), slice(i, j)

    def scores(self, q):
        return torch.cat([self.K.scores(q, self.c_k.read(span), self.rope, positions)
                          for span, positions in self.blocks(len(q))], -1)

    def weighted_values(self, p, d):
        sums = [einsum("bths,bsc->bthc", p[..., span], self.c_v.read(span))
                for span, _ in self.blocks(len(p))]
        return self.V.reconstruct_heads(sum(sums), d)

    def materialize(self, d):
        every = slice(0, self.positions.stop - self.positions.start)
        return (self.K.rotated_keys(self.c_k.read(every), self.rope, self.positions, d),
                self.V.reconstruct(self.c_v.read(every), d))


def attend(q, parts):
    """Attention of rotated queries q (B, T, H, d) over all parts, with one softmax: Eq. 1.

    With several queries, whose tokens come last, all keys and values are rebuilt once."""
    d = q.shape[-1]
    if q.shape[1] > 1:
        keys, values = zip(*(part.materialize(d) for part in parts))
        return attention(q, torch.cat(keys, 1), torch.cat(values, 1))
    s = [part.scores(q) for part in parts]
    p = softmax(torch.cat(s, -1)).split([x.shape[-1] for x in s], -1)
    return sum(part.weighted_values(weights, d) for part, weights in zip(parts, p))


# How latents are stored --------------------------------------------------------------------------

class Buffers:
    """`nbytes` is the size of all tensors and stores that an object holds as attributes."""
    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if hasattr(x, "nbytes"))


class Latents(Buffers):
    """A growing list of latents (B, S, d_c) in the dtype of the basis."""

    def __init__(self, B, capacity, d_c, like):
        self.length, self.c = 0, like.new_zeros(B, capacity, d_c)

    def append(self, c):
        self.c[:, self.length:self.length + c.shape[1]] = c
        self.length += c.shape[1]

    def read(self, span):
        return self.c[:, span]


def affine_codes(c, bits=4):
    """Round latents c (B, 32*j, d_c), which are j groups of 32 tokens, to `bits` bits.

    Returns codes (B, j, 32, d_c), minimum and scale (B, j, 1, d_c): c is about codes * scale +
    minimum. Each channel has its own minimum and scale in each group of 32 tokens, because channels
    differ in scale and tokens do not. CSKV's code clamps the zero point to [0, 15], which destroys
    groups far from zero; here the minimum is a floating-point number [E31].
    """
    groups = c.unflatten(1, (-1, GROUP))                                     # (B, j, 32, d_c)
    minimum = groups.amin(2, keepdim=True)
    scale = (groups.amax(2, keepdim=True) - minimum) / (2**bits - 1)
    codes = ((groups - minimum) / scale.where(scale > 0, 1)).round().clamp(0, 2**bits - 1)
    return codes, minimum, scale


def quantize(c):
    """Latents c (B, 32*j, d_c) as 4-bit codes, two tokens to a byte: packed (B, 16*j, d_c), uint8,
    minimum and scale (B, j, 1, d_c). The first of two tokens is in the low half of the byte."""
    codes, minimum, scale = affine_codes(c)
    codes = codes.flatten(1, 2).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, minimum, scale


def dequantize(packed, minimum, scale):
    """The latents (B, 32*j, d_c) that `quantize` packed, to within half a step of their codes."""
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1, 2)
    return (codes.unflatten(1, (-1, GROUP)) * scale + minimum).flatten(1, 2)


def round_trip(c, bits=4):
    """Latents c (B, S, d_c) as they are read back: complete groups of 32 rounded, the rest not."""
    complete = c.shape[1] // GROUP * GROUP
    codes, minimum, scale = affine_codes(c[:, :complete], bits)
    return torch.cat(((codes * scale + minimum).flatten(1, 2), c[:, complete:]), 1)


class QuantizedLatents(Buffers):
    """A growing list of latents in 4 bits. Up to 31 tokens wait unrounded until a group is full.

    `nbytes` counts minimum and scale, which CSKV's figure of 95 % saved leaves out [E32].
    """

    def __init__(self, B, capacity, d_c, like):
        groups = capacity // GROUP
        self.length, self.packed = 0, like.new_zeros(B, groups * GROUP // 2, d_c, dtype=torch.uint8)
        self.minimum, self.scale = like.new_zeros(2, B, groups, 1, d_c)
        self.pending = like.new_zeros(B, min(GROUP, capacity), d_c)

    def append(self, c):
        complete, pending = self.length // GROUP, self.length % GROUP
        self.length += c.shape[1]
        c = torch.cat((self.pending[:, :pending], c), 1)
        new = self.length // GROUP - complete                          # groups that are now full
        if new:
            groups = slice(complete, complete + new)
            rows = slice(groups.start * GROUP // 2, groups.stop * GROUP // 2)
            codes = quantize(c[:, :new * GROUP])
            self.packed[:, rows], self.minimum[:, groups], self.scale[:, groups] = codes
        self.pending[:, :self.length % GROUP] = c[:, new * GROUP:]

    def read(self, span):
        """Latents of the tokens in span, whose start is a multiple of 32."""
        complete = self.length // GROUP
        first, last = span.start // GROUP, min(complete, -(-span.stop // GROUP))
        old = dequantize(self.packed[:, first * GROUP // 2:last * GROUP // 2],
                         self.minimum[:, first:last], self.scale[:, first:last])
        pending = self.pending[:, :max(0, span.stop - complete * GROUP)]
        return torch.cat((old[:, :span.stop - span.start], pending), 1)


# The three caches --------------------------------------------------------------------------------

class Cache(Buffers):
    """What the three caches share: B sequences, `capacity` tokens, `length` of them stored."""

    def __init__(self, B, capacity, like):
        self.B, self.capacity, self.length = B, capacity, 0
        self.dtype, self.device = like.dtype, like.device

    def new_positions(self, k):
        """Positions (a slice) of new keys k (B, T, G, d). Raises ValueError if they do not fit."""
        new = slice(self.length, self.length + k.shape[1])
        if new.stop > self.capacity:
            raise ValueError(f"{new.stop} tokens do not fit into a capacity of {self.capacity}")
        given, own = (len(k), k.dtype, k.device), (self.B, self.dtype, self.device)
        if given != own:
            raise ValueError(f"keys have batch size, dtype, device {given}, the cache has {own}")
        return new


class FullCache(Cache):
    """Every key (rotated) and every value: the cache of Eq. 4."""

    def __init__(self, B, capacity, G, d, dtype=None, device=None):
        self.k, self.v = torch.zeros(2, B, capacity, G, d, dtype=dtype, device=device)
        super().__init__(B, capacity, self.k)

    def attend(self, q, k, v, rope):
        new = self.new_positions(k)
        self.k[:, new], self.v[:, new], self.length = rope(k, new), v, new.stop
        return attention(rope(q, new), self.k[:, :self.length], self.v[:, :self.length])


class CompressedCache(Cache):
    """LoRC's cache: the latents of every token, and nothing else (Secs. 4.1, 4.3)."""

    def __init__(self, B, capacity, K: Basis, V: Basis, d):
        super().__init__(B, capacity, K.down)
        self.K, self.V = K, V
        self.c_k, self.c_v = (Latents(B, capacity, basis.d_c, basis.down) for basis in (K, V))

    def attend(self, q, k, v, rope):
        new = self.new_positions(k)
        self.c_k.append(self.K.cached_latents(k, rope, new))
        self.c_v.append(self.V.project(v))
        self.length = new.stop
        every = slice(0, self.length)
        return attend(rope(q, new), [LowRank(self.K, self.V, self.c_k, self.c_v, rope, every)])


class BiBranchCache(Cache):
    """CSKV's cache with sinks: first `sinks` and last `window` tokens exact, latents in between.

    A token is compressed once, when it leaves the window, and its key is kept unrotated until then.
    A token that arrives alone counts among the last `window`. Tokens that arrive together, as a
    prompt does, see each other exactly, and see earlier tokens as they are stored then [E34].
    The window is a ring buffer: token i after the sinks is in slot i % window [E33].

    With `simulate_decoding`, attend computes in one call, without storing anything, what the
    queries of a whole text would read if its tokens arrived one by one. Texts are scored this way.
    """

    def __init__(self, B, capacity, K: Basis, V: Basis, d, sinks=4, window=32, bits=16,
                 simulate_decoding=False):
        if bits not in (16, 4) or sinks < 0 or window < 0:
            raise ValueError("bits must be 16 or 4, and sinks and window at least 0; "
                             f"they are {bits}, {sinks} and {window}")
        super().__init__(B, capacity, K.down)
        self.K, self.V, self.d, self.simulate_decoding = K, V, d, simulate_decoding
        self.sinks, self.window, self.bits = sinks, window, bits
        G, after_sinks = K.up.shape[-2] // d, max(0, capacity - sinks)
        self.sink_k, self.sink_v = K.down.new_zeros(2, B, min(sinks, capacity), G, d)
        self.ring_k, self.ring_v = K.down.new_zeros(2, B, min(window, after_sinks), G, d)
        between = max(0, after_sinks - window)
        between += -between % 8 if bits == 16 else 0             # fastest on GPUs
        store = Latents if bits == 16 else QuantizedLatents
        self.c_k, self.c_v = (store(B, between, basis.d_c, basis.down) for basis in (K, V))

    def attend(self, q, k, v, rope):
        new = self.new_positions(k)
        q = rope(q, new)
        if self.simulate_decoding:
            return self.attend_as_if_decoding(q, k, v, rope)
        if q.shape[1] == 1:
            self.append(k, v, rope)
            return attend(q, self.parts(rope))
        o = attend(q, [*self.parts(rope), Exact(rope(k, new), v)])
        self.append(k, v, rope)
        return o

    def positions(self):
        """Positions of the sinks (slice), of the latents (slice), and of the ring's slots."""
        after_sinks = max(self.length - self.sinks, 0)
        slot = torch.arange(min(after_sinks, self.window), device=self.ring_k.device)
        ring = self.length - 1 - (after_sinks - 1 - slot) % max(1, self.window)
        latents = slice(self.sinks, self.sinks + max(0, after_sinks - self.window))
        return slice(0, min(self.length, self.sinks)), latents, ring

    def parts(self, rope):
        """The exact branch, sinks and window, and the low-rank branch between them."""
        sinks, latents, ring = self.positions()
        return [Exact(rope(self.sink_k[:, sinks], sinks), self.sink_v[:, sinks]),
                Exact(rope(self.ring_k[:, :len(ring)], ring), self.ring_v[:, :len(ring)]),
                LowRank(self.K, self.V, self.c_k, self.c_v, rope, latents)]

    def append(self, k, v, rope):
        """Store k, v (B, T, G, d): in the sinks while they have room, then through the window."""
        room = min(max(self.sinks - self.length, 0), k.shape[1])
        sinks = slice(self.length, self.length + room)
        self.sink_k[:, sinks], self.sink_v[:, sinks] = k[:, :room], v[:, :room]
        before = max(self.length - self.sinks, 0)                    # tokens after the sinks so far
        self.length += k.shape[1]
        after = max(self.length - self.sinks, 0)
        ring = self.slots(before)                                    # from the oldest to the newest
        k = torch.cat((self.ring_k[:, ring], k[:, room:]), 1)
        v = torch.cat((self.ring_v[:, ring], v[:, room:]), 1)
        leaving = max(0, k.shape[1] - self.window)                   # these become latents
        if leaving:
            first = self.sinks + self.c_k.length
            positions = slice(first, first + leaving)
            self.c_k.append(self.K.cached_latents(k[:, :leaving], rope, positions))
            self.c_v.append(self.V.project(v[:, :leaving]))
        ring = self.slots(after)
        self.ring_k[:, ring], self.ring_v[:, ring] = k[:, leaving:], v[:, leaving:]

    def slots(self, n):
        """The slots of the tokens in the window after n tokens, from the oldest to the newest."""
        return torch.arange(max(0, n - self.window), n, device=self.device) % max(1, self.window)

    def attend_as_if_decoding(self, q, k, v, rope):
        """Attention of a whole text, each query reading what it would read in decoding.

        Exact keys and those rebuilt from latents and from rounded latents stand side by side. A
        mask lets a query see each token once, in the form in which it is stored at that step."""
        T = q.shape[1]
        rest = slice(min(self.sinks, T), T)
        c_k, c_v = self.K.cached_latents(k[:, rest], rope, rest), self.V.project(v[:, rest])
        forms = [(c_k, c_v)]
        if self.bits < 16:                               # the gradient ignores the rounding
            forms.append([c + (round_trip(c, self.bits) - c).detach() for c in (c_k, c_v)])
        keys = [self.K.rotated_keys(c, rope, rest, self.d) for c, _ in forms]
        values = [self.V.reconstruct(c, self.d) for _, c in forms]
        keys, values = torch.cat((rope(k, slice(0, T)), *keys), 1), torch.cat((v, *values), 1)
        form = self.form_at_each_step(T)                                          # (T, T)
        seen = torch.cat([form == 0, *((form == n + 1)[:, rest] for n in range(len(forms)))], 1)
        blocks = zip(q.split(512, 1), seen.split(512))                       # to bound the memory
        return torch.cat([attention(some, keys, values, mask) for some, mask in blocks], 1)

    def form_at_each_step(self, T):
        """Form (T, T) in which query i reads token j: 0 exact, 1 latent, 2 rounded, -1 unseen."""
        i, j = torch.arange(T, device=self.device)[:, None], torch.arange(T, device=self.device)
        form = ((j >= self.sinks) & (j <= i - self.window)).long()
        if self.bits < 16:                               # rounded once its group of 32 is complete
            group_end = self.sinks + ((j - self.sinks) // GROUP + 1) * GROUP
            form += (form == 1) & (group_end <= i + 1 - self.window)
        return form.where(j <= i, -1)
