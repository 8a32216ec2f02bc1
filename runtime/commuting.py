"""A basis of keys that commutes with RoPE, so that U can be folded into the query. In no paper here.

App. C of LoRC folds U into the query, which fails because the rotation stands between U and the
cached key [E4]. It does not fail if the map commutes with the rotation. The same basis was
published before by the repositories PseudoHunt/rope-kv-compression and PriyanshBhatnagar/PhasorKV;
TransMLA (arXiv 2502.07864) has a real-valued relative.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import einsum

from cache import Basis


@dataclass(eq=False)
class CommutingBasis(Basis):
    """A map of keys that commutes with RoPE (`commuting_basis`).

    Latents are rotated once, when they are stored, and U is folded into the query as in App. C.
    components[i] is the component of a head whose rotation latent i follows.
    """

    components: torch.Tensor              # (d_c,), integers in 0 .. d-1

    def cached_latents(self, k, rope, positions):
        return rope(self.project(k)[:, :, None], positions, self.components)[:, :, 0]

    def rotated_keys(self, c, rope, positions, d):
        return self.reconstruct(c, d)

    def scores(self, q, c, rope, positions):
        return einsum("bthc,bsc->bths", self.absorb(q), c)

    def absorb(self, q):
        """U^T q / sqrt(d) for each head: rotated queries q (B, T, H, d) -> (B, T, H, d_c)."""
        d = q.shape[-1]
        U = self.up.unflatten(0, (-1, d))                            # (G, d, d_c)
        q = q.unflatten(2, (len(U), -1)) * d**-0.5
        return einsum("btgrd,gdc->btgrc", q, U).flatten(2, 3)


def commuting_basis(Wk, d_c, d, C=None, Wq=None):
    """The best basis with d_c (even) latents for keys Wk x among those that commute with RoPE.

    RoPE multiplies the complex number z_j made of components (j, j + d/2) of a head by a phase that
    is the same for all heads. A complex linear map that mixes heads at one frequency j therefore
    commutes with it. At each j the map takes eigenvectors of the heads' second moment, and one sort
    over all j distributes the d_c latents. With Wq (H*d, D) and C (D, D), rows are weighted by the
    mean query energy E |q_j|^2 of their group.
    """
    Z = Wk.double().unflatten(0, (-1, 2, d // 2))                    # (G, 2, d/2, D)
    Z = torch.complex(Z[:, 0], Z[:, 1]).transpose(0, 1)              # (d/2, G, D): z_j = Z_j x
    energy = torch.ones_like(Z[..., 0].real)                         # (d/2, G)
    if Wq is not None and C is not None:
        q = (Wq.double() @ C.double() * Wq.double()).sum(1)          # (H*d,): E |q|^2
        energy = q.unflatten(0, (len(Z[0]), -1, 2, d // 2)).mean(1).sum(1).T
        energy = (energy / energy.max()).clamp(min=1e-6)
    root = energy.sqrt()[..., None]                                  # (d/2, G, 1)
    ZC = Z if C is None else Z @ C.to(Z)
    lam, Q = torch.linalg.eigh(root * (ZC @ Z.mH) * root.mT)         # (d/2, G), (d/2, G, G)
    kept = lam.flatten().argsort(descending=True)[:d_c // 2]
    j, column = kept // lam.shape[1], kept % lam.shape[1]
    Q, root = Q[j, :, column].T, root[j, :, 0].T                     # (G, d_c/2)
    down, up = as_real(Q * root, j, d).T, as_real(Q / root, j, d)
    return CommutingBasis(down.to(Wk.dtype).contiguous(), up.to(Wk.dtype),
                          torch.cat((j, j + d // 2)))


def as_real(U, j, d):
    """The complex map z += U c at frequencies j (n,), U (G, n), as a real matrix (G*d, 2*n)."""
    out = U.real.new_zeros(len(U), 2, d // 2, 2, len(j))
    i = torch.arange(len(j), device=j.device)
    out[:, 0, j, 0, i], out[:, 0, j, 1, i] = U.real, -U.imag
    out[:, 1, j, 0, i], out[:, 1, j, 1, i] = U.imag, U.real
    return out.flatten(3).flatten(0, 2)


def key_basis(layer, d_k, C=None):
    """The commuting basis of one layer's keys, as lorc.make_bases asks for it."""
    attn = layer.attn
    return commuting_basis(attn.Wk.weight, d_k, attn.d, C, attn.Wq.weight)


def theorem_1_commuting(Wk, d_c, d):
    """Bounds (d/2,) on ||k_j - k~_j|| / ||x|| at each frequency j: Thm. 1 for `commuting_basis`.

    The bound at j is the largest singular value dropped at j. The largest bound holds for every
    frequency but not for the whole key: several frequencies can lose the same direction of x, and
    the squares of their errors add up.
    """
    kept = commuting_basis(Wk, d_c, d).components[:d_c // 2]
    Z = torch.complex(*Wk.double().unflatten(0, (-1, 2, d // 2)).unbind(1)).transpose(0, 1)
    values = torch.linalg.svdvals(Z)                                 # (d/2, min(G, D)), falling
    values = F.pad(values, (0, 1 + Z.shape[1] - values.shape[1]))
    return values.gather(1, kept.bincount(minlength=d // 2)[:, None])[:, 0]
