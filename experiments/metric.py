"""Which metric: bases that minimize different errors, at the same ranks.

A basis of rank d_c minimizes E (k - k~)^T M (k - k~) for keys k = W x with E[x x^T] = C, or for
values. This script keeps the ranks fixed and changes C and M:

    label        C                  M
    svd          I                  I
    norm         diag(gamma^2)      I                  gamma is the RMSNorm weight before W
    asvd         diag(mean |x|)     I
    whitened     E[x x^T]           I
    query, W_o   E[x x^T]           keys: errors of the scores; values: errors after W_o
    loss         lorc.fisher_factors: the Fisher information of a linear map of the keys or values

"query, W_o" is the objective of KQ-SVD (arXiv 2512.05916), averaged over the rotations of RoPE
(`query_metrics`). Two sets of ranks are used, one rank for all layers and those of one sort in the
metric of the loss, so that the effect of the basis can be told from that of the ranks. The metric
of the loss is measured on four times as much text as C; "whitened, more text" has as much. All
caches are bi-branch (4 sinks, a window of 32).

Verdict: at equal ranks the metric of the loss costs least on all three models, and its ranks help
all other bases on SmolLM2, too. There, more text hardly helps `whitened`.

    python experiments/metric.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import torch

import study as shared

KEPT = (0.2, 0.4)
BASES = {"svd": "svd", "norm": "norm", "asvd": "asvd", "whitened": "whitened",
         "whitened, more text": "whitened, more text", "query, W_o": "query", "loss": "loss"}
FLOOR = 0.01        # of M's mean eigenvalue, added to its diagonal as in the loss metric


def query_energy(Wq, C, kv_heads, d):
    """E |q|^2 per component of a key: the sum over the queries that read its head, (G*d,).

    The score of query q and key error e at a distance of n positions is q^T R_n e. Averaged over
    rotations whose angles are independent and uniform, the mean of R_n^T q q^T R_n is diagonal:
    components j and j + d/2 of a head each get (q_j^2 + q_{j + d/2}^2) / 2.
    """
    q = (Wq.double() @ C.double() * Wq.double()).sum(1)                      # (H*d,): E q_i^2
    pairs = q.unflatten(0, (kv_heads, -1, 2, d // 2)).sum(1).mean(1, keepdim=True)
    return pairs.expand(-1, 2, -1).flatten()                                 # (G, 2, d/2)


def output_metric(Wo, kv_heads, d):
    """Block-diagonal M (G*d, G*d) with sum_h W_o,h^T W_o,h for the heads h that read each value."""
    Wo = Wo.double().unflatten(1, (kv_heads, -1, d))                         # (D, G, H/G, d)
    return torch.block_diag(*torch.einsum("Dghi,Dghj->gij", Wo, Wo))


def query_metrics(llama, moments):
    """(M_k, M_v) of each layer: errors of attention scores, and errors after W_o."""
    c, metrics = llama.config, []
    for layer, C in zip(llama.layers, moments):
        pair = (query_energy(layer.attn.Wq.weight, C, c.kv_heads, c.head_dim).diag(),
                output_metric(layer.attn.Wo.weight, c.kv_heads, c.head_dim))
        metrics.append(tuple(M + FLOOR * M.trace() / len(M) * torch.eye(len(M)).to(M)
                             for M in pair))
    return metrics


def measure(study):
    rows = [study.full()]
    for kept in KEPT:
        sets = {"uniform": study.plan(kept), "one sort": study.loss_ranks(kept)}
        for name, ranks in sets.items():
            rows += [study.row(label, kept, basis, "bibranch", ranks=ranks) | {"ranks": name}
                     for label, basis in BASES.items()]
    return rows


def plot(found):
    """One table a model: perplexity above the full cache's, in percent."""
    for name, result in found.items():
        full, rows = shared.split_full(result["rows"])
        of = {(row["label"], row["wanted"], row["ranks"]): row["perplexity"] for row in rows}
        columns = list(dict.fromkeys((row["wanted"], row["ranks"]) for row in rows))
        yield f"metric-{name}", shared.markdown(
            ["basis", *(f"{kept} kept, {ranks}" for kept, ranks in columns)],
            [[label, *(shared.percent_above(of.get((label, *column)), full) for column in columns)]
             for label in dict.fromkeys(row["label"] for row in rows)])


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
