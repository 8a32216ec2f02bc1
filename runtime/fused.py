"""Attention of one query over latents, in three Triton kernels: no rebuilt key reaches memory.

One token of each of B sequences attends to S cached tokens whose keys and values are stored as
latents c_k and c_v, with 16 bits a number or with packed 4-bit codes, and to a few exact tokens:

    for each tile of T tokens, for each block of key heads:              score_kernel
        C = latents of the tile                         (T, d_k)         4 bits: unpacked once
        K = C U^T                                       (T, heads * d)   on the matrix units
        K = K rotated to the positions of its tokens                     in registers
        scores = K q / sqrt(d)                          (T, query heads)
    for each block of channels of c_v, for each tile:                    value_kernel
        m, l, o = running softmax of the tile's scores, o += exp(scores - m)^T C_v
    for each key head:                                                   combine_kernel
        the exact tokens are one more tile; parts of long sequences are put together; o / l

The result is the sum of value latents that Eq. 9 expands with U_v, and the sum of exact values.
cache.py computes the same in plain PyTorch; the tests compare the two. Lengths are not shapes: the
position of the token is a tensor, so that one CUDA graph serves every step.
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from cache import GROUP


# Latents in 4 bits --------------------------------------------------------------------------------

@triton.jit
def unpack(packed, minimum, scale, row, channel, mask, T: tl.constexpr, BC: tl.constexpr,
           d_c: tl.constexpr, SIZE: tl.constexpr):
    """Latents (T, BC) of tokens row, row + 1, ...: row is a multiple of SIZE = 32, so is T."""
    n, group = row + tl.arange(0, T), row // SIZE + tl.arange(0, T // SIZE)
    byte = tl.load(packed + (n // 2)[:, None] * d_c + channel[None, :], mask=mask, other=0)
    code = (byte >> (n % 2 * 4).to(tl.uint8)[:, None]) & 15                          # (T, BC)
    group = group[:, None] * d_c + channel[None, :]                                  # (T/32, BC)
    inside = (channel < d_c)[None, :]
    low = tl.load(minimum + group, mask=inside, other=0.0)
    step = tl.load(scale + group, mask=inside, other=0.0)
    code = code.to(tl.float32).reshape(T // SIZE, SIZE, BC)
    c = code * step.to(tl.float32)[:, None, :] + low.to(tl.float32)[:, None, :]
    return c.reshape(T, BC).to(step.dtype)


# Kernel 1: scores ---------------------------------------------------------------------------------

@triton.jit
def store_scores(scores, k, q, cos, sin, b, S, row, length, first, head, G: tl.constexpr,
                 R: tl.constexpr, d: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
                 Q: tl.constexpr, PRECISION: tl.constexpr):
    half: tl.constexpr = d // 2
    N: tl.constexpr = HEADS * d
    n = row + tl.arange(0, T)
    at = (first + tl.minimum(n, length - 1))[:, None] * d + tl.arange(0, half)[None, :]
    c = tl.load(cos + at).to(tl.float32)[:, None, :]                                 # (T, 1, d/2)
    s = tl.load(sin + at + half).to(tl.float32)[:, None, :]
    x, y = tl.split(k.reshape(T, HEADS, 2, half).permute(0, 1, 3, 2))                # (T, HEADS, d/2)
    k = tl.join(x * c - y * s, y * c + x * s).permute(0, 1, 3, 2).reshape(T, N)
    j, h = tl.arange(0, N), head * R + tl.arange(0, Q)
    own = (h[None, :] // R == head + j[:, None] // d) & (h < min(G, head + HEADS) * R)[None, :]
    one = tl.load(q + (b * G * R + h)[None, :] * d + (j % d)[:, None], mask=own, other=0.0)
    s = tl.dot(k.to(one.dtype), one, input_precision=PRECISION) * d**-0.5            # (T, Q)
    out = scores + (b.to(tl.int64) * S + n)[:, None] * (G * R) + h[None, :]
    valid = (n < length)[:, None] & (h < min(G, head + HEADS) * R)[None, :]
    tl.store(out, s, mask=valid)


@triton.jit
def score_items(first_item, step, items, scores, q, c_rows, c_desc, u_desc, cos, sin, b0, tile0, tiles, S, length, first,
                G: tl.constexpr, R: tl.constexpr, d: tl.constexpr, d_k: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
                BC: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    blocks: tl.constexpr = (G + HEADS - 1) // HEADS
    N: tl.constexpr = HEADS * d
    chunks: tl.constexpr = (d_k + BC - 1) // BC
    t = tl.arange(0, T)
    k = tl.zeros((T, N), tl.float32)
    for i in tl.range(0, items * chunks):
        item = first_item + i // chunks * step
        channel = i % chunks * BC
        block = item % blocks
        if BITS == 16:
            tile, b = item // blocks % tiles, item // (blocks * tiles)
        else:
            tile, b = tile0, b0
        if TMA:
            c = c_desc.load([b * S + tile * T, channel])
        else:
            ch = channel + tl.arange(0, BC)
            if BITS == 16:
                rows = c_rows + (b.to(tl.int64) * S + tile * T + t)[:, None] * d_k
            else:
                rows = c_rows + t[:, None] * d_k
            if d_k % BC == 0:
                c = tl.load(rows + ch[None, :])
            else:
                c = tl.load(rows + ch[None, :], mask=(ch < d_k)[None, :], other=0.0)
        u = u_desc.load([block * N, channel])
        k = tl.dot(c, u.T, k, input_precision=PRECISION)
        if channel + BC >= d_k:
            store_scores(scores, k, q, cos, sin, b, S, tile * T, length, first, block * HEADS, G, R, d, T, HEADS, Q, PRECISION)
            k = tl.zeros((T, N), tl.float32)


@triton.jit
def score_kernel(scores, q, c_k, c_desc, u_desc, cos, sin, position, packed, minimum, scale, pending,
                 B, S, first, exact, G: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
                 d_k: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr,
                 Q: tl.constexpr, UC: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    length = (tl.load(position) + 1 - exact).to(tl.int32)
    tiles = tl.cdiv(length, T)
    blocks: tl.constexpr = (G + HEADS - 1) // HEADS
    program, programs = tl.program_id(0), tl.num_programs(0)
    t = tl.arange(0, T)
    if BITS == 16:
        items = tl.cdiv(B * tiles * blocks - program, programs)
        score_items(program, programs, items, scores, q, c_k, c_desc, u_desc, cos, sin, 0, 0, tiles, S, length, first, G, R, d, d_k, T, HEADS, BC, Q, BITS, PRECISION, TMA)
    else:
        done = length // SIZE * SIZE
        c_rows = c_k + program * T * d_k
        for i in tl.range(program, B * tiles, programs):
            tile, b = i % tiles, i // tiles
            n = tile * T + t
            tl.debug_barrier()
            codes = packed + b.to(tl.int64) * (S // 2) * d_k
            group = b.to(tl.int64) * (S // SIZE) * d_k
            for channel in tl.range(0, d_k, UC):
                ch = channel + tl.arange(0, UC)
                inside = (n < done)[:, None] & (ch < d_k)[None, :]
                c = unpack(codes, minimum + group, scale + group, tile * T, ch, inside, T, UC, d_k, SIZE)
                late = (n >= done)[:, None] & (n < length)[:, None] & (ch < d_k)[None, :]
                x = tl.load(pending + (b * SIZE + n - done)[:, None] * d_k + ch[None, :], mask=late, other=0.0)
                tl.store(c_rows + t[:, None] * d_k + ch[None, :], tl.where(late, x, c), mask=(ch < d_k)[None, :])
            tl.debug_barrier()
            score_items(0, 1, blocks, scores, q, c_rows, c_desc, u_desc, cos, sin, b, tile, tiles, S, length, first, G, R, d, d_k, T, HEADS, BC, Q, BITS, PRECISION, False)


# Kernel 2: sums of value latents ------------------------------------------------------------------

@triton.jit
def accumulate(m, l, o, scores, c, n, stop, H: tl.constexpr, HP: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the running softmax: m, l (HP,), o (HP, BC), scores of tokens n, c (T, BC)."""
    h = tl.arange(0, HP)
    s = tl.load(scores + n[:, None] * H + h[None, :], mask=(n < stop)[:, None] & (h < H)[None, :], other=0.0)
    s = tl.where((n < stop)[:, None], s, float("-inf"))                              # (T, HP)
    new = tl.maximum(m, tl.max(s, 0))
    p, shrink = tl.exp(s - new[None, :]), tl.exp(m - new)
    o = tl.dot(tl.trans(p.to(c.dtype)), c, o * shrink[:, None], input_precision=PRECISION)
    return new, l * shrink + tl.sum(p, 0), o


@triton.jit
def value_kernel(sums, maxima, totals, scores, c_v, position, packed, minimum, scale, pending,
                 S, exact, H: tl.constexpr, d_v: tl.constexpr, T: tl.constexpr, HP: tl.constexpr,
                 BC: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    channel, part, parts, b = tl.program_id(0) * BC, tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    length = (tl.load(position) + 1 - exact).to(tl.int32)
    span = tl.cdiv(tl.cdiv(length, parts), T) * T
    start, stop = part * span, tl.minimum(length, part * span + span)
    scores += b.to(tl.int64) * S * H
    ch, t, h = channel + tl.arange(0, BC), tl.arange(0, T), tl.arange(0, HP)
    inside = (ch < d_v)[None, :]
    m, l = tl.full((HP,), float("-inf"), tl.float32), tl.zeros((HP,), tl.float32)
    o = tl.zeros((HP, BC), tl.float32)
    if BITS == 16:
        rows = c_v + b.to(tl.int64) * S * d_v
        for row in tl.range(start, stop, T, num_stages=STAGES):
            n = row + t
            c = tl.load(rows + n[:, None] * d_v + ch[None, :], mask=(n < stop)[:, None] & inside, other=0.0)
            m, l, o = accumulate(m, l, o, scores, c, n, stop, H, HP, PRECISION)
    else:
        done = tl.minimum(stop, length // SIZE * SIZE)
        packed += b.to(tl.int64) * (S // 2) * d_v
        minimum += b.to(tl.int64) * (S // SIZE) * d_v
        scale += b.to(tl.int64) * (S // SIZE) * d_v
        for row in tl.range(start, done, T, num_stages=STAGES):
            n = row + t
            c = unpack(packed, minimum, scale, row, ch, (n < done)[:, None] & inside, T, BC, d_v, SIZE)
            m, l, o = accumulate(m, l, o, scores, c, n, done, H, HP, PRECISION)
        if (stop == length) & (done < stop) & (start < stop):
            n = done + tl.arange(0, SIZE)
            c = tl.load(pending + (b * SIZE + tl.arange(0, SIZE))[:, None] * d_v + ch[None, :], mask=(n < stop)[:, None] & inside, other=0.0)
            m, l, o = accumulate(m, l, o, scores, c, n, stop, H, HP, PRECISION)
    out = (b * parts + part) * H + h
    tl.store(sums + out[:, None] * d_v + ch[None, :], o, mask=(h < H)[:, None] & inside)
    tl.store(maxima + out, m, mask=h < H)
    tl.store(totals + out, l, mask=h < H)


# Kernel 3: exact tokens, and all parts together ----------------------------------------------------

@triton.jit
def attend_exact(m, l, o, q1, q2, keys, values, cos, sin, positions, index, count, g, G: tl.constexpr, d: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of exact tokens: m, l (Q,), o (Q, d), queries (Q, d/2) twice, keys (count, G, d)."""
    half: tl.constexpr = d // 2
    j, valid = tl.arange(0, half), index < count
    row = keys + (index * G + g)[:, None] * d
    x = tl.load(row + j[None, :], mask=valid[:, None], other=0.0).to(tl.float32)         # (E, d/2)
    y = tl.load(row + half + j[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    at = tl.where(valid, positions, 0)[:, None] * d + j[None, :]
    c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at + half).to(tl.float32)
    k1, k2 = (x * c - y * s).to(q1.dtype), (y * c + x * s).to(q1.dtype)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION) * d**-0.5                 # (Q, E)
    s = tl.where(valid[None, :], s, float("-inf"))
    v = tl.load(values + (index * G + g)[:, None] * d + tl.arange(0, d)[None, :], mask=valid[:, None], other=0.0)
    new = tl.maximum(m, tl.max(s, 1))
    p, shrink = tl.exp(s - new[:, None]), tl.exp(m - new)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return new, l * shrink + tl.sum(p, 1), o


@triton.jit
def combine_kernel(latent_out, exact_out, sums, maxima, totals, q, cos, sin, position,
                   sink_k, sink_v, ring_k, ring_v, sinks, window, parts, G: tl.constexpr,
                   R: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr, Q: tl.constexpr,
                   E: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H: tl.constexpr = G * R
    r, part = tl.arange(0, Q), tl.arange(0, P)
    mine = r < R
    at = (b * parts + part)[:, None] * H + g * R + r[None, :]                            # (P, Q)
    inside = (part < parts)[:, None] & mine[None, :]
    m_parts = tl.load(maxima + at, mask=inside, other=float("-inf"))
    l_parts = tl.load(totals + at, mask=inside, other=0.0)
    m = tl.where(mine, tl.max(m_parts, 0), 0.0)
    if EXACT:
        half: tl.constexpr = d // 2
        now = tl.load(position).to(tl.int32)
        q_row = q + (b * H + g * R + r)[:, None] * d + tl.arange(0, half)[None, :]
        q1 = tl.load(q_row, mask=mine[:, None], other=0.0)
        q2 = tl.load(q_row + half, mask=mine[:, None], other=0.0)
        l_exact, o = tl.zeros((Q,), tl.float32), tl.zeros((Q, d), tl.float32)
        for start in range(0, sinks, E):
            index = start + tl.arange(0, E)
            m, l_exact, o = attend_exact(m, l_exact, o, q1, q2, sink_k + b * sinks * G * d,
                                         sink_v + b * sinks * G * d, cos, sin, index, index, sinks, g, G, d, PRECISION)
        for start in range(0, window, E):
            index = start + tl.arange(0, E)
            age = (now - sinks - index) % window                # tokens since slot `index` was written
            m, l_exact, o = attend_exact(m, l_exact, o, q1, q2, ring_k + b * window * G * d,
                                         ring_v + b * window * G * d, cos, sin, now - age, index, window, g, G, d, PRECISION)
    weight = tl.exp(m_parts - m[None, :])                                                # (P, Q)
    l = tl.sum(l_parts * weight, 0)
    if EXACT:
        l += l_exact
        out = exact_out + (b * H + g * R + r)[:, None] * d + tl.arange(0, d)[None, :]
        tl.store(out, o / l[:, None], mask=mine[:, None])
    for channel in range(0, d_v, BC):
        ch = channel + tl.arange(0, BC)
        c = tl.zeros((Q, BC), tl.float32)
        for i in range(0, parts):
            row = (b * parts + i) * H + g * R + r
            w = tl.exp(tl.load(maxima + row, mask=mine, other=float("-inf")) - m) / l
            x = tl.load(sums + row[:, None] * d_v + ch[None, :], mask=mine[:, None] & (ch < d_v)[None, :], other=0.0)
            c += w[:, None] * x
        out = latent_out + (b * H + g * R + r)[:, None] * d_v + ch[None, :]
        tl.store(out, c, mask=mine[:, None] & (ch < d_v)[None, :])


# The three together -------------------------------------------------------------------------------

def power(n, least=1):
    return max(least, triton.next_power_of_2(n))


def default_options(q):
    wide = q.dtype == torch.float32
    d = q.shape[-1]
    return {"T": 64 if wide else 128, "N": 64 if wide else 256, "BC": 32 if wide else 64, "UC": 256, "warps": 8 if not wide else 4, "stages": 2 if wide else 4, "TMA": True,
            "VT": 64, "VBC": 128, "vwarps": 4, "vstages": 4, "programs": None, "parts": None}


def score(q, keys, up, cos, sin, position, sinks, window, o):
    (B, H, d), G, d_k, bits = q.shape, up.shape[0] // q.shape[-1], keys[0].shape[-1], 16 if len(keys) == 1 else 4
    S, R, T, heads = keys[0].shape[1] * (1 if bits == 16 else 2), H // G, o["T"], min(power(G), max(1, o["N"] // d))
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    programs = o["programs"] or processors
    scores = q.new_empty(B, S, H, dtype=torch.float32)
    if bits == 16:
        c_k = keys[0]
        packed = minimum = scale = pending = c_k
    else:
        c_k = q.new_empty(programs * T, d_k)
        packed, minimum, scale, pending = keys
    c_desc = TensorDescriptor(c_k, [c_k.numel() // d_k, d_k], [d_k, 1], [T, o["BC"]])
    u_desc = TensorDescriptor(up, [G * d, d_k], [d_k, 1], [heads * d, o["BC"]])
    score_kernel[(programs,)](
        scores, q, c_k, c_desc, u_desc, cos, sin, position, packed, minimum, scale, pending, B, S, sinks, sinks + window,
        G=G, R=R, d=d, d_k=d_k, T=T, HEADS=heads, BC=o["BC"], Q=power(heads * R, 16), UC=o["UC"], BITS=bits, SIZE=GROUP,
        PRECISION=precision(q), TMA=o["TMA"], num_warps=o["warps"], num_stages=o["stages"], **({"maxnreg": o["maxnreg"]} if o.get("maxnreg") else {}))
    return scores


def precision(q):
    return "ieee" if q.dtype == torch.float32 else "tf32"


def sum_values(q, scores, values, position, sinks, window, o):
    (B, H, d), d_v, bits, S = q.shape, values[0].shape[-1], 16 if len(values) == 1 else 4, scores.shape[1]
    packed, minimum, scale, pending = values if bits == 4 else values * 4
    channels = min(o["VBC"], power(d_v, 16))
    blocks = triton.cdiv(d_v, channels)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    parts = o["parts"] or max(1, 2 * processors // (B * blocks))
    sums = q.new_empty(B, parts, H, d_v, dtype=torch.float32)
    maxima, totals = q.new_empty(2, B, parts, H, dtype=torch.float32)
    value_kernel[(blocks, parts, B)](
        sums, maxima, totals, scores, values[0], position, packed, minimum, scale, pending, S, sinks + window,
        H=H, d_v=d_v, T=o["VT"], HP=power(H, 16), BC=channels, BITS=bits, SIZE=GROUP, PRECISION=precision(q), STAGES=o["vstages"],
        num_warps=o["vwarps"])
    return sums, maxima, totals


def combine(q, sums, maxima, totals, G, cos, sin, position, exact, sinks, window):
    (B, H, d), parts, d_v = q.shape, sums.shape[1], sums.shape[-1]
    latent_out, exact_out = q.new_empty(B, H, d_v), q.new_empty(B, H, d if exact else 0)
    sink_k, sink_v, ring_k, ring_v = exact or [q] * 4
    combine_kernel[(G, B)](
        latent_out, exact_out, sums, maxima, totals, q, cos, sin, position, sink_k, sink_v, ring_k, ring_v, sinks, window, parts,
        G=G, R=H // G, d=d, d_v=d_v, Q=power(H // G, 16), E=32, P=power(parts), BC=min(128, power(d_v, 16)), EXACT=bool(exact), PRECISION=precision(q), num_warps=4)
    return latent_out, exact_out


def attend(q, keys, values, up, cos, sin, position, exact, sinks=0, window=0, **options):
    o = default_options(q) | options
    scores = score(q, keys, up, cos, sin, position, sinks, window, o)
    sums, maxima, totals = sum_values(q, scores, values, position, sinks, window, o)
    return combine(q, sums, maxima, totals, up.shape[0] // q.shape[-1], cos, sin, position, exact, sinks, window)
