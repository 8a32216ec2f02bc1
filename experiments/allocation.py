"""Which allocation: how the same number of latents is shared among layers, keys and values.

    label                 d_c of each matrix
    uniform               one rank for all
    Eq. 13                LoRC: from d_max to d_min along ln kappa~, which falls with depth [E9]
    Eq. 13, reversed      the same ranks with the layers in reverse order: a control
    first eighth full     the first eighth of the layers full, one rank for the others [E16]
    own kappa             first eighth full; the others between d_max and d_min along their own
                          ln kappa (Eq. 10) instead of its sum over the later layers
    Fisher                Palu (arXiv 2407.21118): in proportion to the root mean square gradient of
                          each matrix
    loss, one sort        the largest eigenvalues of all matrices in the metric of the loss

Each allocation is measured with three bases: LoRC's SVD in the cache of the paper, where every
token is compressed; and the calibrated basis and that of the loss in a bi-branch cache (4 sinks, a
window of 32). An allocation that cannot keep the fraction is left out: Eq. 13 keeps at
least about half.

Verdict: with calibrated bases one sort in the metric of the loss is the best allocation on SmolLM2,
and on tiny and stories15M it is the best or within 0.1 points of it. With them, Eq. 13 is the worst
at 0.6 kept, worse than its own reverse. With plain SVD no allocation is the best everywhere.

    python experiments/allocation.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import torch
import torch.nn.functional as F

import study as shared
from study import lorc, model

KEPT = (0.4, 0.6)
BASES = {"svd": {"basis": "svd"}, "whitened": {"basis": "whitened", "cache": "bibranch"},
         "loss": {"basis": "loss", "cache": "bibranch"}}
WINDOWS = 32        # of --calibrate for the Fisher information


def by_own_kappa(study, kept, full):
    """Ranks along each layer's own ln kappa; the first `full` layers stay full."""
    d_max, kappas = study.config.kv_width, [k + v for k, v in study.log_kappas()]

    def ranks_of(d_min):
        d_c = lorc.compressed_dimension(kappas, d_max, d_min)
        return lorc.round_ranks(d_c, [i < full for i in range(len(kappas))], d_max)
    return ranks_of(lorc.solve_d_min(kept, ranks_of, d_max))


def fisher_information(study):
    """The mean over entries of sqrt(E[(dL/dW)^2]) of each Wk and Wv, as Palu's code has it: (L, 2).

    L is the mean negative log-likelihood of the text in one window. The caches are bi-branch ones
    whose window holds everything, because gradients can pass through them.
    """
    weights = [W for pair in study.weights for W in pair]
    sums = [torch.zeros_like(W) for W in weights]
    windows = [x for x in study.calibration.split(study.context)[:WINDOWS] if len(x) > 1]
    exact = study.full_rank("identity")
    for W in weights:
        W.requires_grad_(True)
    with torch.enable_grad():
        for x in windows:
            logits = study.llama(x[None], study.caches("bibranch", exact, len(x), window=len(x)))[0]
            loss = F.cross_entropy(logits[:-1], x[1:])
            for total, g in zip(sums, torch.autograd.grad(loss, weights)):
                total += g.square()
    for W in weights:
        W.requires_grad_(False)
    return [(total / len(windows)).sqrt().mean().item() for total in sums]


def in_proportion(information, total, d_max):
    """Integer ranks from 1 to d_max whose sum is `total`: 1, and the rest in proportion.

    What d_max cuts off goes to the others, one each in turn, as in Palu's code.
    """
    share = [(total - len(information)) * x / sum(information) for x in information]
    ranks = [1 + min(d_max - 1, int(x)) for x in share]
    order = sorted(range(len(share)), key=lambda i: share[i] - ranks[i])
    while sum(ranks) < total:
        for i in order:
            if ranks[i] < d_max and sum(ranks) < total:
                ranks[i] += 1
    return ranks


def by_fisher(study, kept, information):
    d_max = study.config.kv_width
    ranks = in_proportion(information, round(kept * len(information) * d_max), d_max)
    return list(zip(ranks[::2], ranks[1::2]))


def allocations(study, kept, information):
    """{label: a function that returns the ranks, or raises UserError}."""
    eighth = max(1, round(study.config.layers / 8))
    return {"uniform": lambda: study.plan(kept),
            "Eq. 13": lambda: study.plan(kept, "progressive"),
            "Eq. 13, reversed": lambda: study.plan(kept, "progressive")[::-1],
            "first eighth full": lambda: study.plan(kept, skip=eighth),
            "own kappa": lambda: by_own_kappa(study, kept, eighth),
            "Fisher": lambda: by_fisher(study, kept, information),
            "loss, one sort": lambda: study.loss_ranks(kept)}


def measure(study):
    rows, information = [study.full()], fisher_information(study)
    for kept in KEPT:
        for label, choose in allocations(study, kept, information).items():
            try:
                ranks = choose()
            except model.UserError:
                study.say(f"{label:34s} kept {kept:.3f}  cannot be reached")
                continue
            rows += [study.row(label, kept, ranks=ranks, **setting) | {"ranks": ranks}
                     for setting in BASES.values()]
    return rows


def plot(found):
    """One table a model: perplexity above the full cache's, in percent."""
    for name, result in found.items():
        full, rows = shared.split_full(result["rows"])
        of = {(row["label"], row["wanted"], row["basis"]): row["perplexity"] for row in rows}
        columns = [(kept, basis) for kept in sorted({row["wanted"] for row in rows})
                   for basis in BASES]
        most = max(kept for kept, _ in columns)                  # here every allocation is possible
        yield f"allocation-{name}", shared.markdown(
            ["ranks", *(f"{kept} kept, {basis}" for kept, basis in columns)],
            [[label, *(shared.percent_above(of.get((label, *column)), full) for column in columns)]
             for label in dict.fromkeys(row["label"] for row in rows if row["wanted"] == most)])


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
