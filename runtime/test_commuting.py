"""The basis that commutes with RoPE (runtime/commuting.py): with it App. C's folding is right."""
import json
import math

import torch
from hypothesis import assume, given, settings, target
from hypothesis import strategies as st
from safetensors.torch import load_file

import lorc
from cache import Basis
from runtime import commuting
from runtime.testing import Text, cli, close, small_model, texts

TIGHT = 1 + 1e-9               # rounding of float64 in a bound that is attained


class Layer:
    """Random Wk (G*d, D), Wq (H*d, D), and C (D, D) or None; an even rank; the commuting basis."""

    def __init__(self, seed, G, R, d, D, rank, with_C):
        g = torch.Generator().manual_seed(seed)
        self.G, self.R, self.d, self.d_c = G, R, d, 2 * max(1, int(rank * (G * d // 2)))
        self.Wk, self.Wq, A = (torch.randn(n, D, generator=g, dtype=torch.float64)
                               for n in (G * d, G * R * d, D))
        self.C, self.generator = A @ A.T if with_C else None, g
        self.basis = commuting.commuting_basis(self.Wk, self.d_c, d, self.C, self.Wq)

    def per_frequency(self, x):
        """x (G*d, ...) -> (G, 2, d/2, ...): head, real or imaginary part, frequency."""
        return x.unflatten(0, (self.G, 2, self.d // 2))

    def complex_rows(self):
        """Wk as the complex numbers that RoPE rotates: (d/2, G, D)."""
        real, imaginary = self.per_frequency(self.Wk).unbind(1)
        return torch.complex(real, imaginary).transpose(0, 1)


layers = st.builds(Layer, st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 2),
                   st.sampled_from([2, 4, 6, 8]), st.integers(2, 12), st.floats(0, 1),
                   st.booleans())


def rotated(text, c, positions, basis):
    """Latents c (B, T, d_c), each rotated as the component of a head that it follows."""
    return text.rope(c[:, :, None], positions, basis.components)[:, :, 0]


@given(layers, st.integers(0, 30), st.integers(1, 5))
def test_the_basis_commutes_with_the_rotation(layer, n, T):
    """R_n up c = up R'_n c and down R_n k = R'_n down k, for any k, c, n, rank and weights.
    Kills: the conjugate forgotten; real and imaginary parts exchanged; a wrong component."""
    text, b, positions = Text(n, [n + T], G=layer.G, d=layer.d), layer.basis, slice(n, n + T)
    k, c = text.k[:, positions], text.randn(1, T, layer.d_c)
    up_after = b.reconstruct(rotated(text, c, positions, b), layer.d)
    assert close(up_after, text.rope(b.reconstruct(c, layer.d), positions))
    assert close(b.project(text.rope(k, positions)), b.cached_latents(k, text.rope, positions))


@given(layers)
def test_the_basis_is_exact_at_full_rank_and_the_svds_does_not_commute(layer):
    """up down = 1 at full rank, down up = 1 below. The SVD's basis with the same components does
    not commute with R_3 [E4]."""
    d, b, n = layer.d, layer.basis, len(layer.Wk)
    whole = commuting.commuting_basis(layer.Wk, n, d, layer.C, layer.Wq)
    assert close(whole.up @ whole.down, torch.eye(n, dtype=torch.float64), 1e3)
    assert close(b.down @ b.up, torch.eye(layer.d_c, dtype=torch.float64), 1e3)
    assume(layer.G > 1 and d > 2 and layer.Wk.shape[1] > 2)
    text, svd, positions = Text(0, [4], d=d), lorc.basis(layer.Wk, n), slice(3, 4)
    svd = commuting.CommutingBasis(svd.down, svd.up, whole.components)
    c = torch.ones(1, 1, n, dtype=torch.float64)
    up_after = svd.reconstruct(rotated(text, c, positions, svd), d)
    up_before = text.rope(svd.reconstruct(c, d), positions)
    assert not torch.allclose(up_after, up_before, atol=1e-3)


@settings(max_examples=12)
@given(texts(max_chunks=4), st.integers(0, 2), st.integers(0, 4))
def test_folding_u_into_the_query_equals_rebuilding_keys_in_every_cache(text, sinks, window):
    """Token by token, in chunks and in one prefill; also in the bi-branch cache, whose latents are
    rotated when they leave the window, and in its simulated decoding."""
    Wk, V = text.randn(text.G * text.d, 7), text.basis()
    K = commuting.commuting_basis(Wk, 2 * text.randint(1, text.G * text.d // 2), text.d)
    ordinary = Basis(K.down, K.up)                  # the same map, without what makes it commute
    options = {"sinks": sinks, "window": window}
    for split in text.splits:
        want = text.attend(text.compressed_cache(ordinary, V), split)
        assert close(text.attend(text.compressed_cache(K, V), split), want)
        want = text.attend(text.bibranch_cache(ordinary, V, **options), split)
        assert close(text.attend(text.bibranch_cache(K, V, **options), split), want)
    for bits in (16, 4):
        decoded = text.bibranch_cache(K, V, bits=bits, **options)
        one_pass = text.bibranch_cache(K, V, bits=bits, **options, simulate_decoding=True)
        assert close(text.attend(one_pass, [text.T]), text.attend(decoded, [1] * text.T))


@given(layers)
def test_theorem_1_holds_at_each_frequency(layer):
    """||k_j - k~_j|| <= the largest singular value dropped at j, times ||x||. Kills: the second
    singular value dropped instead of the first."""
    b = commuting.commuting_basis(layer.Wk, layer.d_c, layer.d)
    x = torch.randn(layer.Wk.shape[1], 5, generator=layer.generator, dtype=torch.float64)
    lost = layer.per_frequency(layer.Wk @ x - b.up @ (b.down @ (layer.Wk @ x)))
    error = lost.square().sum((0, 1)).sqrt()                                           # (d/2, 5)
    bound = commuting.theorem_1_commuting(layer.Wk, layer.d_c, layer.d)[:, None] * x.norm(dim=0)
    target((error / bound.clamp(min=1e-12)).max().item())
    assert (error <= bound * TIGHT + 1e-9).all()


def test_the_largest_dropped_singular_value_does_not_bound_a_whole_key():
    """One head, three frequencies of gains 2, 1, 1, one input, rank 2: the error is sqrt(2), not 1,
    and the bound is attained at each frequency. Kills: the largest kept instead of dropped."""
    Wk = torch.tensor([2.0, 1, 1, 0, 0, 0], dtype=torch.float64)[:, None]
    b, bounds = commuting.commuting_basis(Wk, 2, 6), commuting.theorem_1_commuting(Wk, 2, 6)
    assert torch.allclose(bounds.sort().values, torch.tensor([0, 1, 1], dtype=torch.float64))
    error = (Wk - b.up @ (b.down @ Wk)).norm()
    assert math.isclose(error, math.sqrt(2), rel_tol=1e-12)
    assert math.isclose(bounds.norm(), math.sqrt(2))


def weighted_error(layer, basis, weights):
    """E||k - k~||^2 with weights (G, d/2) on each head and frequency."""
    lost = layer.Wk - basis.up @ (basis.down @ layer.Wk)
    return (layer.per_frequency((lost @ layer.C @ lost.T).diagonal()).sum(1) * weights).sum()


def query_energy(layer):
    """E|q_j|^2 of each group and frequency (G, d/2), mean over the group's query heads."""
    energy = (layer.Wq @ layer.C @ layer.Wq.T).diagonal()
    return energy.unflatten(0, (layer.G, layer.R, 2, layer.d // 2)).mean(1).sum(1)


@given(layers)
def test_the_mean_error_is_the_sum_of_the_dropped_eigenvalues(layer):
    """E||k - k~||^2 = the sum of the dropped eigenvalues over all j; and in the error weighted by
    the queries' energy, the basis made with these weights is at least as good."""
    assume(layer.C is not None)
    plain = commuting.commuting_basis(layer.Wk, layer.d_c, layer.d, layer.C)
    Z = layer.complex_rows()
    lam = torch.linalg.eigvalsh(Z @ layer.C.to(Z) @ Z.mH).flatten().sort().values
    dropped, scale = lam[:len(lam) - layer.d_c // 2].sum(), lam.sum()
    assert abs(weighted_error(layer, plain, 1) - dropped) <= 1e-9 * scale
    energy = query_energy(layer)
    best, other = (weighted_error(layer, b, energy) for b in (layer.basis, plain))
    assert best <= other + 1e-9 * scale * energy.max()


def test_the_queries_energy_matters():
    """Where one group's queries are 30 times as large, weights lower the weighted error by a tenth
    or more. Kills: the energy ignored, inverted, or taken from another group."""
    layer = Layer(0, 2, 1, 4, 6, 0.5, True)
    layer.Wq[:4] *= 30
    weighted = commuting.commuting_basis(layer.Wk, 4, 4, layer.C, layer.Wq)
    plain, energy = commuting.commuting_basis(layer.Wk, 4, 4, layer.C), query_energy(layer)
    assert weighted_error(layer, weighted, energy) < 0.9 * weighted_error(layer, plain, energy)


def test_bases_of_a_model_commute_and_have_even_ranks():
    """make_bases with key_basis: keys have a commuting basis of each layer's own Wk and Wq."""
    llama = small_model()
    plan, bases = lorc.compress(llama, key_basis=commuting.key_basis, pairs=True, kept=0.55)
    for layer, (d_k, _), pair in zip(llama.layers, plan.ranks, bases):
        if pair:
            Wq, Wk = layer.attn.Wq.weight, layer.attn.Wk.weight
            want = commuting.commuting_basis(Wk, d_k, 8, None, Wq)
            assert d_k % 2 == 0 and torch.equal(pair[0].up, want.up)
            assert torch.equal(pair[0].components, want.components)


def test_the_command_line_generates_with_a_commuting_basis(capsys, tmp_path):
    """--basis commuting: even d_k; saved with its components and loaded; near full rank the text is
    the full cache's."""
    flags = ["--prompt", "Once upon a time", "--max-new-tokens", 12, "--json"]
    options = ["--basis", "commuting", "--kept", 0.98, "--save", tmp_path]
    first = json.loads(cli(capsys, *flags, *options)[1])
    assert "layers.7.k.turns" in load_file(tmp_path / "bases.safetensors")
    assert first["text"] == json.loads(cli(capsys, *flags, "--cache", "full")[1])["text"]
    assert all(row["d_k"] % 2 == 0 for row in first["plan"])
    again = json.loads(cli(capsys, *flags, "--bases", tmp_path)[1])
    assert first["text"] == again["text"] and first["cache"] == again["cache"]
