"""Attention of one query over latents in three Triton kernels that never write a rebuilt key.

One new token in each of B sequences attends to tokens whose keys and values are stored as latents
c_k and c_v, in 16 bits or as packed 4-bit codes, and to a few exact tokens (sinks and window):

    score_kernel    for each tile of T tokens, for each block of key heads:
                        C = latents of the tile (T, d_k); 4-bit codes are unpacked once per tile
                        K = C U^T (T, heads * d), rotated in registers to the tokens' positions
                        scores = K q / sqrt(d) (T, query heads)
    value_kernel    for each block of channels of c_v, for each tile of tokens:
                        m, l = running maximum and sum of a softmax over the scores
                        o = o * exp(old m - m) + exp(scores - m)^T C_v (query heads, channels)
    combine_kernel  for each key head: one more softmax step, over the exact tokens; then the
                        results of value_kernel for all parts of a sequence are added, divided by l

The results are sums of value latents, which Eq. 9 expands with U_v, and sums of exact values.
cache.py computes the same in plain PyTorch, and the tests compare the two. The position of the new
token is a tensor, so that one CUDA graph serves every step.

B sequences have room for S tokens. G key heads have R query heads each; H = G*R, of size d. The
ranks are d_k and d_v. Tile sizes are powers of two: T tokens, HEADS key heads, CHANNELS of a
latent, Q query heads (at least 16, as the matrix units want it), E exact tokens.
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from cache import GROUP

SIZE = tl.constexpr(GROUP)              # tokens that share a minimum and a scale in 4 bits


@triton.jit
def latent_count(position, exact):
    """How many tokens are stored as latents when the new token is at `position`, (1,)."""
    return (tl.load(position) + 1 - exact).to(tl.int32)


@triton.jit
def unpack(packed, minimum, scale, row, stop, channel, d_c: tl.constexpr, T: tl.constexpr):
    """Latents (T/2, CHANNELS) of tokens row, row + 2, ... and of tokens row + 1, row + 3, ...

    packed (S/2, d_c), minimum and scale (S/32, d_c) belong to one sequence. row and stop, where
    the codes end, are multiples of 32.
    """
    CHANNELS: tl.constexpr = channel.shape[0]
    pair, group = tl.arange(0, T // 2) + row // 2, tl.arange(0, T // SIZE) + row // SIZE
    inside = (group * SIZE < stop)[:, None] & (channel < d_c)[None, :]
    at = group[:, None] * d_c + channel[None, :]                            # (T/32, CHANNELS)
    low = tl.load(minimum + at, mask=inside, other=0.0)[:, None, :]
    step = tl.load(scale + at, mask=inside, other=0.0)[:, None, :]
    inside = (pair * 2 < stop)[:, None] & (channel < d_c)[None, :]
    byte = tl.load(packed + pair[:, None] * d_c + channel[None, :], mask=inside, other=0)
    byte = byte.reshape(T // SIZE, SIZE // 2, CHANNELS)                     # (T/32, 16, CHANNELS)
    even, odd = (byte & 15).to(step.dtype) * step + low, (byte >> 4).to(step.dtype) * step + low
    return even.reshape(T // 2, CHANNELS), odd.reshape(T // 2, CHANNELS)


# Scores -------------------------------------------------------------------------------------------

@triton.jit
def unpack_tile(rows, packed, minimum, scale, pending, row, length, d_k: tl.constexpr,
                T: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the latents of tokens row .. row + T - 1 to rows (T, d_k), from codes and pending."""
    stop = length // SIZE * SIZE
    pair, late = tl.arange(0, T // 2), tl.arange(0, SIZE)
    for start in range(0, d_k, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = (channel < d_k)[None, :]
        even, odd = unpack(packed, minimum, scale, row, stop, channel, d_k, T)
        out = rows + (2 * pair)[:, None] * d_k + channel[None, :]           # (T/2, CHANNELS)
        there = (row + 2 * pair < stop)[:, None] & inside
        tl.store(out, even, mask=there)
        tl.store(out + d_k, odd, mask=there)
        if stop < row + T:                                                  # the last tile
            new = (stop + late < length)[:, None] & inside
            at = late[:, None] * d_k + channel[None, :]                     # (32, CHANNELS)
            x = tl.load(pending + at, mask=new, other=0.0)
            tl.store(rows + (stop - row) * d_k + at, x, mask=new)


@triton.jit
def score_tile(scores, q, tiles_of_c, rows, row_of_c, tiles_of_up, cos, sin, block, row, length,
               first, G: tl.constexpr, R: tl.constexpr, d: tl.constexpr, d_k: tl.constexpr,
               T: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, Q: tl.constexpr,
               BITS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of T tokens and of one block of HEADS key heads of a sequence.

    The latents are loaded from row_of_c on as tiles (16 bits), or from rows (T, d_k) (4 bits).
    What the products meet is loaded before them, so that its latency is hidden.
    """
    half: tl.constexpr = d // 2
    N: tl.constexpr = HEADS * d
    n, j, h = row + tl.arange(0, T), tl.arange(0, N), block * HEADS * R + tl.arange(0, Q)
    at = (first + tl.minimum(n, length - 1))[:, None] * d + tl.arange(0, half)[None, :]
    c, s = tl.load(cos + at), tl.load(sin + at + half)                      # (T, d/2)
    heads = tl.minimum(G, block * HEADS + HEADS) * R                        # where the block ends
    own = (h[None, :] // R == block * HEADS + j[:, None] // d) & (h < heads)[None, :]
    query = tl.load(q + h[None, :] * d + (j % d)[:, None], mask=own, other=0.0)     # (N, Q)
    k = tl.zeros((T, N), tl.float32)
    for channel in range(0, d_k, CHANNELS):
        if BITS == 16:
            latents = tiles_of_c.load([row_of_c, channel])                  # (T, CHANNELS)
        else:
            columns = channel + tl.arange(0, CHANNELS)[None, :]
            t = tl.arange(0, T)[:, None]
            latents = tl.load(rows + t * d_k + columns, mask=columns < d_k, other=0.0)
        U = tiles_of_up.load([block * N, channel])                          # (N, CHANNELS)
        k = tl.dot(latents, U.T, k, input_precision=PRECISION)              # (T, N)
    x, y = tl.split(k.reshape(T, HEADS, 2, half).permute(0, 1, 3, 2))       # (T, HEADS, d/2)
    c, s = c.to(tl.float32)[:, None, :], s.to(tl.float32)[:, None, :]
    k = tl.join(x * c - y * s, y * c + x * s).permute(0, 1, 3, 2).reshape(T, N)
    result = tl.dot(k.to(query.dtype), query, input_precision=PRECISION) * d**-0.5
    out = scores + n[:, None] * (G * R) + h[None, :]                        # (T, Q)
    tl.store(out, result, mask=(n < length)[:, None] & (h < heads)[None, :])


@triton.jit
def score_kernel(scores, q, tiles_of_c, rows, tiles_of_up, cos, sin, position, packed, minimum,
                 scale, pending, S, first, exact, G: tl.constexpr, R: tl.constexpr,
                 d: tl.constexpr, d_k: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
                 CHANNELS: tl.constexpr, UNPACK: tl.constexpr, Q: tl.constexpr,
                 BITS: tl.constexpr, PRECISION: tl.constexpr):
    """scores (B, S, H) of q (B, H, d) and of latents c_k (B*S, d_k), or their codes.

    A program works on one part of a sequence. With 16 bits it computes one block of key heads, from
    tiles of c_k. With 4 bits it unpacks a tile and computes all blocks from it; rows (programs, T,
    d_k) is memory for one tile per program, which stays in the L2 cache. Latent 0 belongs to the
    token at position `first`; `exact` tokens are not latents.
    """
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = latent_count(position, exact)
    span = tl.cdiv(tl.cdiv(length, T), tl.num_programs(1)) * T
    start, stop = part * span, tl.minimum(length, part * span + span)
    scores, q = scores + b * S * (G * R), q + b * (G * R) * d
    if BITS == 16:
        for row in range(start, stop, T):
            score_tile(scores, q, tiles_of_c, rows, (b * S).to(tl.int32) + row, tiles_of_up, cos,
                       sin, tl.program_id(0), row, length, first, G, R, d, d_k, T, HEADS, CHANNELS,
                       Q, BITS, PRECISION)
    else:
        rows += (b * tl.num_programs(1) + part) * T * d_k
        packed, pending = packed + b * (S // 2) * d_k, pending + b * SIZE * d_k
        minimum, scale = minimum + b * (S // SIZE) * d_k, scale + b * (S // SIZE) * d_k
        for row in range(start, stop, T):
            tl.debug_barrier()                       # until all warps have read the last tile
            unpack_tile(rows, packed, minimum, scale, pending, row, length, d_k, T, UNPACK)
            tl.debug_barrier()                       # until all warps have written this one
            for block in range((G + HEADS - 1) // HEADS):
                score_tile(scores, q, tiles_of_c, rows, 0, tiles_of_up, cos, sin, block, row,
                           length, first, G, R, d, d_k, T, HEADS, CHANNELS, Q, BITS, PRECISION)


# Sums of value latents ----------------------------------------------------------------------------

@triton.jit
def softmax_step(m, l, o, scores, n, stop, c, H: tl.constexpr, PRECISION: tl.constexpr):
    """Add tokens n with latents c (T, CHANNELS) to m, l (Q,) and o (Q, CHANNELS)."""
    h, valid = tl.arange(0, m.shape[0]), (n < stop)[:, None]
    s = tl.load(scores + n[:, None] * H + h[None, :], mask=valid & (h < H)[None, :], other=0.0)
    s = tl.where(valid, s, float("-inf"))                                   # (T, Q)
    new = tl.maximum(m, tl.max(s, 0))
    p, shrink = tl.exp(s - new[None, :]), tl.exp(m - new)
    o = tl.dot(p.to(c.dtype).T, c, o * shrink[:, None], input_precision=PRECISION)
    return new, l * shrink + tl.sum(p, 0), o


@triton.jit
def value_kernel(sums, maxima, totals, scores, c_v, position, packed, minimum, scale, pending, S,
                 exact, H: tl.constexpr, d_v: tl.constexpr, T: tl.constexpr, Q: tl.constexpr,
                 CHANNELS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
                 STAGES: tl.constexpr):
    """sums (B, parts, H, d_v) of latents c_v (B, S, d_v) or their codes, with weights from scores.

    A sequence is cut into parts. maxima and totals (B, parts, H) are the softmax's m and l.
    """
    part, parts, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    length = latent_count(position, exact)
    span = tl.cdiv(tl.cdiv(length, parts), T) * T
    start, stop = part * span, tl.minimum(length, part * span + span)
    scores += b * S * H
    channel, h = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, Q)
    inside = (channel < d_v)[None, :]
    m, l = tl.full((Q,), float("-inf"), tl.float32), tl.zeros((Q,), tl.float32)
    o = tl.zeros((Q, CHANNELS), tl.float32)
    if BITS == 16:
        for row in tl.range(start, stop, T, num_stages=STAGES):
            n = row + tl.arange(0, T)
            at = (b * S + n)[:, None] * d_v + channel[None, :]
            c = tl.load(c_v + at, mask=(n < stop)[:, None] & inside, other=0.0)  # (T, CHANNELS)
            m, l, o = softmax_step(m, l, o, scores, n, stop, c, H, PRECISION)
    else:
        full = tl.minimum(stop, length // SIZE * SIZE)
        packed, pending = packed + b * (S // 2) * d_v, pending + b * SIZE * d_v
        minimum, scale = minimum + b * (S // SIZE) * d_v, scale + b * (S // SIZE) * d_v
        for row in tl.range(start, full, T, num_stages=STAGES):
            even, odd = unpack(packed, minimum, scale, row, full, channel, d_v, T)
            n = row + 2 * tl.arange(0, T // 2)
            m, l, o = softmax_step(m, l, o, scores, n, full, even, H, PRECISION)
            m, l, o = softmax_step(m, l, o, scores, n + 1, full, odd, H, PRECISION)
        if (stop == length) & (full < stop) & (start < stop):
            late = tl.arange(0, SIZE)
            new = (full + late < stop)[:, None] & inside
            c = tl.load(pending + late[:, None] * d_v + channel[None, :], mask=new, other=0.0)
            m, l, o = softmax_step(m, l, o, scores, full + late, stop, c, H, PRECISION)
    out = (b * parts + part) * H + h
    tl.store(sums + out[:, None] * d_v + channel[None, :], o, mask=(h < H)[:, None] & inside)
    tl.store(maxima + out, m, mask=h < H)
    tl.store(totals + out, l, mask=h < H)


# Exact tokens, and all parts together -------------------------------------------------------------

@triton.jit
def exact_step(m, l, o, q1, q2, keys, values, at, valid, cos, sin, d: tl.constexpr,
               PRECISION: tl.constexpr):
    """Add exact tokens at positions `at` to m, l (Q,) and o (Q, d).

    keys and values are pointers (E, 1), q1 and q2 the halves (Q, d/2) of the rotated queries.
    """
    half: tl.constexpr = d // 2
    j, there = tl.arange(0, half)[None, :], valid[:, None]
    x = tl.load(keys + j, mask=there, other=0.0).to(tl.float32)             # (E, d/2)
    y = tl.load(keys + half + j, mask=there, other=0.0).to(tl.float32)
    v = tl.load(values + tl.arange(0, d)[None, :], mask=there, other=0.0)   # (E, d)
    at = tl.where(valid, at, 0)[:, None] * d + j
    c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at + half).to(tl.float32)
    k1, k2 = (x * c - y * s).to(q1.dtype), (y * c + x * s).to(q1.dtype)
    s = tl.dot(q1, k1.T, input_precision=PRECISION)
    s = tl.dot(q2, k2.T, s, input_precision=PRECISION) * d**-0.5            # (Q, E)
    s = tl.where(valid[None, :], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p, shrink = tl.exp(s - new[:, None]), tl.exp(m - new)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return new, l * shrink + tl.sum(p, 1), o


@triton.jit
def combine_kernel(latent_sums, exact_sums, sums, maxima, totals, q, cos, sin, position, sink_k,
                   sink_v, ring_k, ring_v, sinks, window, parts, G: tl.constexpr, R: tl.constexpr,
                   d: tl.constexpr, d_v: tl.constexpr, Q: tl.constexpr, E: tl.constexpr,
                   PARTS: tl.constexpr, CHANNELS: tl.constexpr, EXACT: tl.constexpr,
                   PRECISION: tl.constexpr):
    """latent_sums (B, H, d_v) and exact_sums (B, H, d), both divided by the softmax's total.

    sink_k, sink_v (B, sinks, G, d) and ring_k, ring_v (B, window, G, d) are not rotated.
    """
    g, b, r = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, Q)
    head, mine, part = b * G * R + g * R + r, r < R, tl.arange(0, PARTS)
    first = b * parts * G * R + g * R                                       # of maxima and totals
    at = first + part[:, None] * (G * R) + r[None, :]                       # (PARTS, Q)
    there = (part < parts)[:, None] & mine[None, :]
    old_m = tl.load(maxima + at, mask=there, other=float("-inf"))
    m, l = tl.where(mine, tl.max(old_m, 0), 0.0), tl.zeros((Q,), tl.float32)
    if EXACT:
        o, half = tl.zeros((Q, d), tl.float32), tl.arange(0, d // 2)[None, :]
        q1 = tl.load(q + head[:, None] * d + half, mask=mine[:, None], other=0.0)
        q2 = tl.load(q + head[:, None] * d + half + d // 2, mask=mine[:, None], other=0.0)
        now = tl.load(position).to(tl.int32)
        for start in range(0, sinks + window, E):
            i = start + tl.arange(0, E)
            slot = i - sinks                                 # written `age` tokens ago
            age = (now - i) % tl.maximum(window, 1)
            sink, ring = ((b * sinks + i) * G + g) * d, ((b * window + slot) * G + g) * d
            keys = tl.where(i < sinks, sink_k + sink, ring_k + ring)
            values = tl.where(i < sinks, sink_v + sink, ring_v + ring)
            m, l, o = exact_step(m, l, o, q1, q2, keys[:, None], values[:, None],
                                 tl.where(i < sinks, i, now - age), i < sinks + window, cos, sin,
                                 d, PRECISION)
    old_l = tl.load(totals + at, mask=there, other=0.0)
    l += tl.sum(old_l * tl.exp(old_m - m[None, :]), 0)
    if EXACT:
        out = exact_sums + head[:, None] * d + tl.arange(0, d)[None, :]
        tl.store(out, o / l[:, None], mask=mine[:, None])
    for start in range(0, d_v, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        inside = mine[:, None] & (channel < d_v)
        total = tl.zeros((Q, CHANNELS), tl.float32)
        for i in tl.range(parts, num_stages=4):
            row = first + i * G * R + r
            weight = tl.exp(tl.load(maxima + row, mask=mine, other=float("-inf")) - m) / l
            total += weight[:, None] * tl.load(sums + row[:, None] * d_v + channel, mask=inside,
                                               other=0.0)
        tl.store(latent_sums + head[:, None] * d_v + channel, total, mask=inside)


# The three kernels together -----------------------------------------------------------------------

FEWEST_TOKENS = 2**14                   # in all sequences; with fewer, the plain step is used


def supports(up, d, latents) -> bool:
    """Whether a compiled step should use attend_latents: up (G*d, d_k), heads of size d, and the
    buffer of latents c_k or of their codes.

    The kernels divide a head into halves and into tiles whose sizes are powers of two, and the
    hardware's loads of tiles need rows of a multiple of 16 bytes. A few tokens do not fill the
    tiles and the multiprocessors.
    """
    tokens = latents.shape[0] * latents.shape[1] * (2 if latents.dtype == torch.uint8 else 1)
    return (up.dtype in (torch.float16, torch.bfloat16) and d in (32, 64, 128, 256)
            and up.shape[1] % 8 == 0 and tokens >= FEWEST_TOKENS)


def power(n, least=1):
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, triton.next_power_of_2(n))


def processors(x):
    """Multiprocessors of the device; a few programs in Triton's interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def tile_options(q, tokens):
    """Tile sizes and launch options of score_kernel and of value_kernel for queries q (B, H, d).

    With few `tokens` in all sequences, smaller tiles are needed to occupy the device. Measured on
    an H100 (scores) and an H200 (values, unpacking).
    """
    dtype, d = q.dtype, q.shape[-1]
    if dtype.itemsize > 2:                             # float32, for tests
        return ({"T": 32, "HEADS": max(1, 64 // d), "CHANNELS": 32, "UNPACK": 32, "num_warps": 4,
                 "num_stages": 2, "PRECISION": "ieee"},
                {"T": 32, "CHANNELS": 32, "num_warps": 4, "STAGES": 2, "PRECISION": "ieee"})
    scores = {"T": 128, "HEADS": max(1, 256 // d), "CHANNELS": 64, "UNPACK": 512, "num_warps": 8,
              "num_stages": 3, "PRECISION": "tf32"}
    values = {"T": 64, "CHANNELS": 256, "num_warps": 4, "STAGES": 3, "PRECISION": "tf32"}
    if tokens < 32 * processors(q):
        scores |= {"T": 64, "HEADS": max(1, 128 // d), "UNPACK": 128, "num_warps": 4}
        values |= {"CHANNELS": 128, "STAGES": 2}
    return scores, values


def even_parts(programs, tiles, slots):
    """Into how many parts to cut each of `programs` loops over tiles, so that all end together.

    At most `slots` programs run at a time; the result needs the fewest tiles one after another.
    """
    def tiles_in_turn(parts):
        return triton.cdiv(programs * parts, slots) * triton.cdiv(tiles, parts)
    return min(range(1, tiles + 1), key=tiles_in_turn)


def latent_scores(q, keys, up, cos, sin, position, sinks, window, tiles):
    """Scores (B, S, H) in float32 of rotated queries q (B, H, d) and all latents of keys."""
    (B, H, d), (N, d_k), bits = q.shape, up.shape, 16 if len(keys) == 1 else 4
    G, S, T = N // d, keys[0].shape[1] * (1 if bits == 16 else 2), tiles["T"]
    tiles = tiles | {"HEADS": min(tiles["HEADS"], power(G)),
                     "UNPACK": min(tiles["UNPACK"], power(d_k))}
    blocks = triton.cdiv(G, tiles["HEADS"]) if bits == 16 else 1
    parts = even_parts(B * blocks, triton.cdiv(S, T), processors(q))
    rows = keys[0] if bits == 16 else q.new_empty(B * parts * T, d_k)
    scores = q.new_empty(B, S, H, dtype=torch.float32)
    tiles_of_c = TensorDescriptor(rows, [rows.numel() // d_k, d_k], [d_k, 1],
                                  [T, tiles["CHANNELS"]])
    tiles_of_up = TensorDescriptor(up, [N, d_k], [up.stride(0), 1],
                                   [tiles["HEADS"] * d, tiles["CHANNELS"]])
    score_kernel[(blocks, parts, B)](
        scores, q, tiles_of_c, rows, tiles_of_up, cos, sin, position, *(keys * 4)[:4], S, sinks,
        sinks + window, G=G, R=H // G, d=d, d_k=d_k, Q=power(tiles["HEADS"] * (H // G), 16),
        BITS=bits, **tiles)
    return scores


def sum_latents(q, scores, values, position, exact, tiles):
    """sums (B, parts, H, d_v), maxima and totals (B, parts, H) of value_kernel."""
    (B, S, H), d_v = scores.shape, values[0].shape[-1]
    channels = min(tiles["CHANNELS"], power(d_v, 16))
    blocks, bits = triton.cdiv(d_v, channels), 16 if len(values) == 1 else 4
    parts = max(1, min(2 * processors(q) // (B * blocks), triton.cdiv(S, 2 * tiles["T"])))
    sums = q.new_empty(B, parts, H, d_v, dtype=torch.float32)
    maxima, totals = q.new_empty(2, B, parts, H, dtype=torch.float32)
    value_kernel[(blocks, parts, B)](
        sums, maxima, totals, scores, values[0], position, *(values * 4)[:4], S, exact, H=H,
        d_v=d_v,
        Q=power(H, 16), BITS=bits, **tiles | {"CHANNELS": channels})
    return sums, maxima, totals


def combine(q, sums, maxima, totals, G, cos, sin, position, exact, sinks, window):
    """Normalized sums of latents (B, H, d_v) and of exact values (B, H, d), or (B, H, 0)."""
    (B, H, d), parts, d_v = q.shape, sums.shape[1], sums.shape[-1]
    latent_sums, exact_sums = q.new_empty(B, H, d_v), q.new_empty(B, H, d if exact else 0)
    combine_kernel[(G, B)](
        latent_sums, exact_sums, sums, maxima, totals, q, cos, sin, position, *(exact or [q] * 4),
        sinks, window, parts, G=G, R=H // G, d=d, d_v=d_v, Q=power(H // G, 16),
        E=min(64, power(sinks + window, 16)), PARTS=power(parts),
        CHANNELS=min(128, power(d_v, 16)), EXACT=bool(exact),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_stages=1)
    return latent_sums, exact_sums


@torch.library.custom_op("lorc::attend_latents", mutates_args=())
def attend_latents(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor],
                   up: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor,
                   exact: list[torch.Tensor], sinks: int, window: int) -> tuple[torch.Tensor,
                                                                               torch.Tensor]:
    """Attention of rotated queries q (B, H, d) of the token at `position`, which is stored already.

    keys and values are the buffers of one store each: [c] of (B, S, d_c), or [packed, minimum,
    scale, pending] of QuantizedLatents. up (G*d, d_k) rebuilds keys. cos and sin are Rope's tables.
    exact is empty, or [sink_k, sink_v, ring_k, ring_v] of a BiBranchCache that is full.
    Returns normalized sums of value latents (B, H, d_v) and of exact values (B, H, d or 0).
    """
    q = q.contiguous()
    tokens = len(q) * keys[0].shape[1] * (1 if len(keys) == 1 else 2)
    score_tiles, value_tiles = tile_options(q, tokens)
    scores = latent_scores(q, keys, up, cos, sin, position, sinks, window, score_tiles)
    parts = sum_latents(q, scores, values, position, sinks + window, value_tiles)
    return combine(q, *parts, up.shape[0] // q.shape[-1], cos, sin, position, exact, sinks, window)


@attend_latents.register_fake
def _(q, keys, values, up, cos, sin, position, exact, sinks, window):
    B, H, d = q.shape
    return q.new_empty(B, H, values[0].shape[-1]), q.new_empty(B, H, d if exact else 0)
