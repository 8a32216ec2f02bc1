"""The kernels of runtime/fused.py against the caches' own attention.

With an NVIDIA GPU the kernels run on it. Otherwise they run in Triton's interpreter on the CPU, if
Triton 3.7 or later is installed (pip install triton). The interpreter cannot multiply bfloat16
matrices, so bfloat16 is tested on a GPU only.
"""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
import model
import runtime.testing                                    # noqa: F401 (sets up the tests)
from cache import Basis, BiBranchCache, CompressedCache, LowRank
from runtime.compiled import CompiledCache, buffers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", minversion=None if DEVICE == "cuda" else "3.7")
from runtime import fused                                 # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32, torch.float16]


class Layer:
    """A cache of random tokens with random bases, and a query for the last of them."""

    def __init__(self, seed, dtype, kind, B, G, R, d, d_k, d_v, T, spare=0, sinks=4, window=8,
                 bits=16):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.d, self.T = dtype, d, T
        rope = {"type": "default", "theta": 1e4}
        self.rope = model.Rope(model.Config(9, 8, 1, G * R, G, d, 8, 4096, 1e-5, True, rope))
        K, V = (Basis(self.randn(rank, G * d) / (G * d)**0.5, self.randn(G * d, rank) / rank**0.5)
                for rank in (d_k, d_v))
        self.rope.reserve(T + spare, K.up)
        if kind == "compressed":
            self.cache = CompressedCache(B, T + spare, K, V, d)
        else:
            self.cache = BiBranchCache(B, T + spare, K, V, d, sinks, window, bits)
        self.q = 2 * self.randn(B, T, G * R, d)
        self.k, self.v = self.randn(B, T, G, d), self.randn(B, T, G, d)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def attend(self, start, stop):
        tokens = slice(start, stop)
        return self.cache.attend(self.q[:, tokens], self.k[:, tokens], self.v[:, tokens], self.rope)

    def poison(self):
        """Fill everything that is not stored yet with NaN."""
        for store in (self.cache.c_k, self.cache.c_v):
            if hasattr(store, "c"):
                store.c[:, store.length:] = torch.nan
            else:
                groups = store.length // cache.GROUP
                store.minimum[:, groups:] = store.scale[:, groups:] = torch.nan
                store.pending[:, store.length % cache.GROUP:] = torch.nan

    def fused(self):
        """Attention (B, 1, H, d) of the last token by the kernels."""
        self.poison()
        exact, sinks, window = [], 0, 0
        if isinstance(self.cache, BiBranchCache):
            sinks, window = self.cache.sinks, self.cache.window
            exact = [self.cache.sink_k, self.cache.sink_v, self.cache.ring_k, self.cache.ring_v]
        q, position = self.rope(self.q[:, -1:], slice(self.T - 1, self.T)), self.cache.length - 1
        latents, exact_sums = fused.attend_latents(
            q[:, 0], buffers(self.cache.c_k), buffers(self.cache.c_v), self.cache.K.up,
            self.rope.cos, self.rope.sin, torch.tensor([position], device=DEVICE), exact, sinks,
            window)
        o = self.cache.V.reconstruct_heads(latents[:, None], self.d)
        return o + exact_sums[:, None] if exact else o

    def exact(self):
        """The same in float64, from what the cache has stored."""
        wide = copy.deepcopy(self.cache)
        rope = copy.copy(self.rope)
        rope.cos, rope.sin = rope.cos.double(), rope.sin.double()
        for owner in (wide, wide.c_k, wide.c_v, wide.K, wide.V):
            for name, x in vars(owner).items():
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    setattr(owner, name, x.double())
        parts = [LowRank(wide.K, wide.V, wide.c_k, wide.c_v, rope, slice(0, self.T))]
        if isinstance(wide, BiBranchCache):
            parts = wide.parts(rope)
        return cache.attend(rope(self.q[:, -1:].double(), slice(self.T - 1, self.T)), parts)


def error(got, want):
    """Relative error of got in the Euclidean norm."""
    return ((got.double() - want).norm() / want.norm()).item()


SHAPES = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32), "dtype": st.sampled_from(DTYPES), "B": st.integers(1, 2),
    "G": st.integers(1, 3), "R": st.integers(1, 5), "d": st.sampled_from([32, 64, 128]),
    "d_k": st.integers(1, 10).map(lambda n: 8 * n), "d_v": st.integers(1, 70),
    "T": st.integers(1, 150), "spare": st.integers(0, 40)})


@settings(max_examples=10)
@given(SHAPES)
def test_the_kernels_compute_the_compressed_caches_attention(shape):
    """Grouped queries, ranks and lengths that are no multiple of a tile, room that is not filled.
    Kills: scores of the wrong group; tokens or channels after the end that count."""
    layer = Layer(kind="compressed", **shape)
    layer.attend(0, layer.T)
    want = layer.exact()
    assert error(layer.fused(), want) < TOLERANCE[layer.dtype]


@settings(max_examples=15)
@given(SHAPES, st.integers(0, 5), st.integers(0, 40), st.sampled_from([16, 4]))
def test_the_kernels_compute_the_two_branches_attention(shape, sinks, window, bits):
    """Sinks and window are exact, latents have 16 or 4 bits, and up to 31 of them are pending.
    Kills: the age of a slot of the ring; the two codes of a byte swapped; a wrong group's scale;
    a softmax that is not shared by both branches."""
    shape["T"] += sinks + window                          # the kernels need both to be full
    shape["spare"] += 32
    layer = Layer(kind="bibranch", sinks=sinks, window=window, bits=bits, **shape)
    layer.attend(0, layer.T - 1)
    layer.attend(layer.T - 1, layer.T)
    want = layer.exact()
    assert error(layer.fused(), want) < TOLERANCE[layer.dtype]


@pytest.mark.parametrize("kind, bits", [("compressed", 16), ("bibranch", 16), ("bibranch", 4)])
def test_a_compiled_step_with_the_kernels_equals_the_eager_one(kind, bits):
    """Step by step, over the edges of groups of 32 tokens, as runtime/compiled.py calls them."""
    options = {"seed": 1, "dtype": torch.float32, "B": 2, "G": 2, "R": 2, "d": 32, "d_k": 24,
               "d_v": 20, "T": 82, "kind": kind, "bits": bits, "spare": 32}
    eager, static = Layer(**options), Layer(**options)
    first = 70
    eager.attend(0, first)
    static.attend(0, first)
    for i in range(first, eager.T):
        want, one = eager.attend(i, i + 1), slice(i, i + 1)
        step = CompiledCache(static.cache, torch.tensor([i], device=DEVICE), static.cache.K.up)
        got = step.attend(static.q[:, one], static.k[:, one], static.v[:, one], static.rope)
        assert error(got, want.double()) < TOLERANCE[torch.float32]


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 132))
def test_parts_are_as_even_as_they_can_be(programs, tiles, slots):
    """No other number of parts lets all programs end earlier. Kills: a part without tiles."""
    def turns(parts):
        return -(-programs * parts // slots) * -(-tiles // parts)
    parts = fused.even_parts(programs, tiles, slots)
    assert 1 <= parts <= tiles and turns(parts) == min(map(turns, range(1, tiles + 1)))
