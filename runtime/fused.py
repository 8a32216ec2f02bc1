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

Letters: B sequences, S tokens that fit into the cache, G key heads, R query heads per key head,
H = G*R, d the size of a head, d_k and d_v the ranks. All sizes in capitals are powers of two where
they are tile sizes: T, HEADS (key heads per block), CHANNELS, Q (query heads, padded), E.
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

    packed (S/2, d_c), minimum and scale (S/32, d_c) belong to one sequence; row and stop, where
    the codes end, are multiples of 32.
    """
    pair, group = tl.arange(0, T // 2) + row // 2, tl.arange(0, T // SIZE) + row // SIZE
    inside = (channel < d_c)[None, :]
    at = group[:, None] * d_c + channel[None, :]                            # (T/32, CHANNELS)
    there = (group * SIZE < stop)[:, None] & inside
    low = tl.load(minimum + at, mask=there, other=0.0).to(tl.float32)[:, None, :]
    step = tl.load(scale + at, mask=there, other=0.0)
    there = (pair * 2 < stop)[:, None] & inside
    byte = tl.load(packed + pair[:, None] * d_c + channel[None, :], mask=there, other=0)
    byte = byte.reshape(T // SIZE, SIZE // 2, channel.shape[0])
    wide = step.to(tl.float32)[:, None, :]
    even = (byte & 15).to(tl.float32) * wide + low                          # (T/32, 16, CHANNELS)
    odd = (byte >> 4).to(tl.float32) * wide + low
    return (even.reshape(T // 2, channel.shape[0]).to(step.dtype),
            odd.reshape(T // 2, channel.shape[0]).to(step.dtype))


# Scores -------------------------------------------------------------------------------------------

@triton.jit
def unpack_tile(rows, packed, minimum, scale, pending, row, length, d_k: tl.constexpr,
                T: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the latents of tokens row .. row + T - 1 to rows (T, d_k), from codes and pending."""
    stop = length // SIZE * SIZE
    pair, late = tl.arange(0, T // 2), tl.arange(0, SIZE)
    for first in range(0, d_k, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
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
def score_tile(scores, q, c_tiles, c_row, up, cos, sin, b, block, row, length, S, first,
               G: tl.constexpr, R: tl.constexpr, d: tl.constexpr, d_k: tl.constexpr,
               T: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, Q: tl.constexpr,
               FROM_ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of T tokens and a block of HEADS key heads.

    c_tiles yields tiles of latents: a descriptor of (rows, d_k), or pointers (T, 1) if FROM_ROWS.
    What the products meet is loaded before them, so that its latency is hidden.
    """
    half: tl.constexpr = d // 2
    N: tl.constexpr = HEADS * d
    n, j, h = row + tl.arange(0, T), tl.arange(0, N), block * HEADS * R + tl.arange(0, Q)
    at = first + tl.minimum(n, length - 1)                                  # positions
    at = at[:, None] * d + tl.arange(0, half)[None, :]
    c, s = tl.load(cos + at), tl.load(sin + at + half)                      # (T, d/2)
    heads = tl.minimum(G, block * HEADS + HEADS) * R                        # where the block ends
    own = (h[None, :] // R == block * HEADS + j[:, None] // d) & (h < heads)[None, :]
    query = tl.load(q + (b * G * R + h)[None, :] * d + (j % d)[:, None], mask=own, other=0.0)
    k = tl.zeros((T, N), tl.float32)
    for channel in range(0, d_k, CHANNELS):
        if FROM_ROWS:
            columns = channel + tl.arange(0, CHANNELS)
            inside = (columns < d_k)[None, :]
            latents = tl.load(c_tiles + columns[None, :], mask=inside, other=0.0)
        else:
            latents = c_tiles.load([c_row, channel])                        # (T, CHANNELS)
        U = up.load([block * N, channel])                                   # (N, CHANNELS)
        k = tl.dot(latents, U.T, k, input_precision=PRECISION)              # (T, N)
    x, y = tl.split(k.reshape(T, HEADS, 2, half).permute(0, 1, 3, 2))       # (T, HEADS, d/2)
    c, s = c.to(tl.float32)[:, None, :], s.to(tl.float32)[:, None, :]
    k = tl.join(x * c - y * s, y * c + x * s).permute(0, 1, 3, 2).reshape(T, N)
    result = tl.dot(k.to(query.dtype), query, input_precision=PRECISION) * d**-0.5
    out = scores + (b.to(tl.int64) * S + n)[:, None] * (G * R) + h[None, :]  # (T, Q)
    tl.store(out, result, mask=(n < length)[:, None] & (h < heads)[None, :])


@triton.jit
def score_kernel(scores, q, c_k, tiles_of_c, up, cos, sin, position, packed, minimum, scale,
                 pending, B, S, first, exact, G: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
                 d_k: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
                 UNPACK: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
                 PRECISION: tl.constexpr):
    """scores (B, S, H) of q (B, H, d) and of latents c_k (B, S, d_k) or their codes.

    A program works on one tile after another. With 4 bits, c_k (programs, T, d_k) is where it
    unpacks a tile; such a small buffer stays in the L2 cache.
    """
    length = latent_count(position, exact)
    tiles = tl.cdiv(length, T)
    blocks: tl.constexpr = (G + HEADS - 1) // HEADS
    program, programs = tl.program_id(0), tl.num_programs(0)
    if BITS == 16:
        for i in range(program, B * tiles * blocks, programs):
            block, tile, b = i % blocks, i // blocks % tiles, i // blocks // tiles
            score_tile(scores, q, tiles_of_c, b * S + tile * T, up, cos, sin, b, block, tile * T,
                       length, S, first, G, R, d, d_k, T, HEADS, CHANNELS, Q, False, PRECISION)
    else:
        rows = c_k + program * T * d_k
        for i in range(program, B * tiles, programs):
            tile, b = i % tiles, i // tiles
            codes, group = packed + b.to(tl.int64) * (S // 2) * d_k, b * (S // SIZE) * d_k
            tl.debug_barrier()                       # until all warps have read the last tile
            unpack_tile(rows, codes, minimum + group, scale + group, pending + b * SIZE * d_k,
                        tile * T, length, d_k, T, UNPACK)
            tl.debug_barrier()                       # until all warps have written this one
            pointers = rows + tl.arange(0, T)[:, None] * d_k
            for block in range(blocks):
                score_tile(scores, q, pointers, 0, up, cos, sin, b, block, tile * T, length, S,
                           first, G, R, d, d_k, T, HEADS, CHANNELS, Q, True, PRECISION)


# Sums of value latents ----------------------------------------------------------------------------

@triton.jit
def softmax_step(m, l, o, scores, n, stop, c, H: tl.constexpr, PRECISION: tl.constexpr):
    """Add tokens n with latents c (N, CHANNELS) to m, l (Q,) and o (Q, CHANNELS)."""
    h = tl.arange(0, m.shape[0])
    valid = (n < stop)[:, None]
    s = tl.load(scores + n[:, None] * H + h[None, :], mask=valid & (h < H)[None, :], other=0.0)
    s = tl.where(valid, s, float("-inf"))                                   # (N, Q)
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
        packed += b * (S // 2) * d_v
        group = b * (S // SIZE) * d_v
        for row in tl.range(start, full, T, num_stages=STAGES):
            n = row + 2 * tl.arange(0, T // 2)
            even, odd = unpack(packed, minimum + group, scale + group, row, full, channel, d_v, T)
            m, l, o = softmax_step(m, l, o, scores, n, full, even, H, PRECISION)
            m, l, o = softmax_step(m, l, o, scores, n + 1, full, odd, H, PRECISION)
        if (stop == length) & (full < stop) & (start < stop):
            late = tl.arange(0, SIZE)
            at = (b * SIZE + late)[:, None] * d_v + channel[None, :]        # (32, CHANNELS)
            c = tl.load(pending + at, mask=(full + late < stop)[:, None] & inside, other=0.0)
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
        for i in range(parts):
            row = first + i * G * R + r
            weight = tl.exp(tl.load(maxima + row, mask=mine, other=float("-inf")) - m) / l
            total += weight[:, None] * tl.load(sums + row[:, None] * d_v + channel, mask=inside,
                                               other=0.0)
        tl.store(latent_sums + head[:, None] * d_v + channel, total, mask=inside)


# The three kernels together -----------------------------------------------------------------------

def supports(up, d, latents) -> bool:
    """Whether a compiled step can use attend_latents: up (G*d, d_k), heads of size d, and the
    buffer of latents c_k or of their codes.

    The kernels divide a head into halves and into tiles whose sizes are powers of two. The
    hardware's loads of tiles need rows of a multiple of 16 bytes.
    """
    return (up.dtype in (torch.float16, torch.bfloat16) and d in (32, 64, 128, 256)
            and up.shape[1] % 8 == 0 and latents.numel() > 0)


def power(n, least=1):
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, triton.next_power_of_2(n))


def processors(x):
    """Multiprocessors of the device; a few programs in Triton's interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def tile_options(dtype, d):
    """Tile sizes and launch options of score_kernel and of value_kernel, measured on an H100."""
    if dtype.itemsize > 2:                             # float32, for tests
        return ({"T": 32, "HEADS": max(1, 64 // d), "CHANNELS": 32, "UNPACK": 32, "num_warps": 4,
                 "num_stages": 2, "PRECISION": "ieee"},
                {"T": 32, "CHANNELS": 32, "num_warps": 4, "STAGES": 2, "PRECISION": "ieee"})
    return ({"T": 128, "HEADS": max(1, 256 // d), "CHANNELS": 64, "UNPACK": 256, "num_warps": 8,
             "num_stages": 4, "PRECISION": "tf32"},
            {"T": 64, "CHANNELS": 128, "num_warps": 4, "STAGES": 4, "PRECISION": "tf32"})


def latent_scores(q, keys, up, cos, sin, position, sinks, window, tiles):
    """Scores (B, S, H) in float32 of rotated queries q (B, H, d) and all latents of keys."""
    (B, H, d), (N, d_k), bits = q.shape, up.shape, 16 if len(keys) == 1 else 4
    G, S, T = N // d, keys[0].shape[1] * (16 // bits if bits == 16 else 2), tiles["T"]
    tiles = tiles | {"HEADS": min(tiles["HEADS"], power(G))}
    programs = processors(q)
    scores = q.new_empty(B, S, H, dtype=torch.float32)
    c_k, codes = (keys[0], keys * 4) if bits == 16 else (q.new_empty(programs * T, d_k), keys)
    tiles_of_c = TensorDescriptor(c_k, [c_k.numel() // d_k, d_k], [d_k, 1], [T, tiles["CHANNELS"]])
    tiles_of_up = TensorDescriptor(up, [N, d_k], [up.stride(0), 1],
                                   [tiles["HEADS"] * d, tiles["CHANNELS"]])
    score_kernel[(programs,)](
        scores, q, c_k, tiles_of_c, tiles_of_up, cos, sin, position, *codes, B, S, sinks,
        sinks + window, G=G, R=H // G, d=d, d_k=d_k, Q=power(tiles["HEADS"] * (H // G), 16),
        BITS=bits, **tiles)
    return scores


def sum_latents(q, scores, values, position, exact, tiles):
    """sums (B, parts, H, d_v), maxima and totals (B, parts, H) of value_kernel."""
    (B, S, H), d_v = scores.shape, values[0].shape[-1]
    channels = min(tiles["CHANNELS"], power(d_v, 16))
    blocks, bits = triton.cdiv(d_v, channels), 16 if len(values) == 1 else 4
    parts = max(1, min(2 * processors(q) // (B * blocks), S // (4 * tiles["T"])))
    sums = q.new_empty(B, parts, H, d_v, dtype=torch.float32)
    maxima, totals = q.new_empty(2, B, parts, H, dtype=torch.float32)
    codes = values * 4 if bits == 16 else values
    value_kernel[(blocks, parts, B)](
        sums, maxima, totals, scores, values[0], position, *codes, S, exact, H=H, d_v=d_v,
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
    score_tiles, value_tiles = tile_options(q.dtype, q.shape[-1])
    scores = latent_scores(q, keys, up, cos, sin, position, sinks, window, score_tiles)
    parts = sum_latents(q, scores, values, position, sinks + window, value_tiles)
    return combine(q, *parts, up.shape[0] // q.shape[-1], cos, sin, position, exact, sinks, window)


@attend_latents.register_fake
def _(q, keys, values, up, cos, sin, position, exact, sinks, window):
    B, H, d = q.shape
    return q.new_empty(B, H, values[0].shape[-1]), q.new_empty(B, H, d if exact else 0)
