"""What the model remembers."""
import torch
import torch.nn.functional as F


def attention(q, k, v):
    """q (B, T, H, d) over k, v (B, S, G, d) -> (B, T, H, d)"""
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    return o.transpose(1, 2)


class FullCache:
    def __init__(self, B, capacity, G, d, dtype, device):
        self.k = torch.empty(B, capacity, G, d, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.capacity, self.n = capacity, 0

    def attend(self, q, k, v, rope):
        new = slice(self.n, self.n + k.shape[1])
        self.k[:, new], self.v[:, new], self.n = rope(k, new), v, new.stop
        return attention(rope(q, new), self.k[:, :self.n], self.v[:, :self.n])
