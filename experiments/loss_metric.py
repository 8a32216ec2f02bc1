"""The loss metric in detail: seeds, windows, the bundled text, and the divergence that it predicts.

    label                   what is measured
    seed 0, 1, 2            bases from --calibrate; the labels are drawn with this seed
    8, 16, 32, 64 windows   seed 0, with so few windows of text; seed 0 has those of --loss-tokens
    bundled text            32 windows of runtime/calibration.txt instead of --calibrate
    asvd, whitened          these bases with one rank for all layers, for comparison
    no exact tokens, BASIS  neither sinks nor window: all keys and values that a query reads are
                            compressed, as in most other papers; `loss` beside `svd`, `asvd` and
                            `whitened` with one rank for all layers

Rows of seed 0 also have the divergence that theory.predicted_divergence expects and the one that is
measured: KL(full cache || compressed cache) of the next token, in nats, the mean over --text.
`seconds` is the time that the factors of the Fisher information took.

    python experiments/loss_metric.py --model PATH --text FILE --second OTHER --calibrate THIRD
"""
import sys
import time

import torch
import torch.nn.functional as F

import study as shared
import theory
from runtime.cli import BUNDLED_TEXT
from study import lorc

KEPT = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
KEPT_WINDOWS = (0.4, 0.2)
KEPT_EXACT = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)      # without exact tokens
SEEDS, WINDOWS = (0, 1, 2), (8, 16, 32, 64)
EXACT = {"sinks": shared.SINKS, "window": 32}


def fisher_factors(study, tokens, seed=0, windows=None, exact=EXACT):
    """The factors, and the seconds that they took."""
    begun, windows = time.perf_counter(), windows or study.windows(study.args.loss_tokens)
    factors = lorc.fisher_factors(study.llama, tokens, context=study.context, windows=windows,
                                  seed=seed, **exact)
    return factors, round(time.perf_counter() - begun, 1)


def divergence(study, bases, exact):
    """KL(full cache || compressed cache) of the next token: the mean in nats over the text."""
    total = 0.0
    for x in study.text.split(study.context):
        hidden = [study.llama.hidden(x[None], study.caches(kind, pairs, len(x), **options))[0]
                  for kind, pairs, options in (("full", None, {}), ("bibranch", bases, exact))]
        for full, ours in zip(*(h.split(256) for h in hidden)):
            p, q = (study.llama.head(h).log_softmax(-1) for h in (full, ours))
            total += F.kl_div(q, p, log_target=True, reduction="sum").item()
    return total / len(study.text)


def rows_of(study, label, measured, kepts, bits=(16,), exact=EXACT, predict=False, second=False):
    """One row for each fraction kept and each number of bits, from (factors, seconds)."""
    factors, seconds = measured
    rows, eye = [], torch.eye(study.config.kv_width).to(study.llama.norm.weight)
    for kept in kepts:
        ranks = lorc.sort_ranks(factors, kept)
        bases = [None if d_k == d_v == len(eye) else
                 (lorc.basis(eye, d_k, *K), lorc.basis(eye, d_v, *V))
                 for (d_k, d_v), (K, V) in zip(ranks, factors)]
        for n in bits:
            row = {"label": label, "wanted": kept, "cache": "bibranch", "bits": n,
                   "seconds": seconds} | exact
            row |= study.score(ranks, bases, "bibranch", second=second, bits=n, **exact)
            if predict and n == 16:
                row |= {"predicted_divergence": theory.predicted_divergence(factors, ranks),
                        "divergence": divergence(study, bases, exact)}
            study.say(f"{label:24s} kept {kept}, {n} bits: perplexity {row['perplexity']:.4f}")
            rows.append(row)
    return rows


def without_exact_tokens(study):
    """Rows for four bases when there are neither sinks nor a window."""
    exact, label = {"sinks": 0, "window": 0}, "no exact tokens, "
    rows = rows_of(study, label + "loss", fisher_factors(study, study.calibration, exact=exact),
                   KEPT_EXACT, exact=exact)
    for kind in ("svd", "asvd", "whitened"):
        moments = None if kind == "svd" else lorc.calibrated_moments(
            study.llama, study.calibration, kind, 0, study.context,
            study.windows(shared.CALIBRATION))
        for kept in KEPT_EXACT:
            ranks = study.plan(kept)
            bases = lorc.make_bases(study.llama, ranks, moments)
            row = {"label": label + kind, "wanted": kept, "cache": "bibranch", "bits": 16} | exact
            rows.append(row | study.score(ranks, bases, "bibranch", **exact))
            study.say(f"{row['label']:24s} kept {kept}: perplexity {rows[-1]['perplexity']:.4f}")
    return rows


def measure(study):
    rows = [study.row("full", cache="full", second=True)]
    for seed in SEEDS:
        measured, first = fisher_factors(study, study.calibration, seed), seed == SEEDS[0]
        rows += rows_of(study, f"seed {seed}", measured, KEPT, (16, 4) if first else (16,),
                        predict=first, second=first)
    for n in WINDOWS:
        measured = fisher_factors(study, study.calibration, windows=n)
        rows += rows_of(study, f"{n} windows", measured, KEPT_WINDOWS)
    measured = fisher_factors(study, study.encode(BUNDLED_TEXT), windows=32)
    rows += rows_of(study, "bundled text", measured, KEPT, (16, 4), second=True)
    rows += [study.row(basis, kept, basis, "bibranch") for basis in ("asvd", "whitened")
             for kept in KEPT]
    return rows + without_exact_tokens(study)


def plot(found):
    """Two tables a model: perplexity above the full cache's, in percent, and divergences."""
    for name, result in found.items():
        full, rows = shared.split_full(result["rows"])
        kepts = sorted({row["wanted"] for row in rows}, reverse=True)
        cells, lines = {}, {}
        for row in rows:
            for key, text in (("perplexity", ""), ("second_perplexity", ", second text")):
                line = row["label"] + (", 4 bits" if row["bits"] == 4 else "") + text
                if key in row:
                    cells[line, row["wanted"]] = shared.percent_above(row[key], full, key)
                    lines[line] = None                               # a set that keeps its order
        yield f"loss_metric-{name}", shared.markdown(
            ["increase in perplexity (%)", *(f"{kept} kept" for kept in kepts)],
            [[line, *(cells.get((line, kept), "–") for kept in kepts)] for line in lines])
        yield f"loss_metric-divergence-{name}", shared.markdown(
            ["kept", "predicted (nats per token)", "measured", "measured / predicted"],
            [[row["wanted"], f"{row['predicted_divergence']:.4f}", f"{row['divergence']:.4f}",
              f"{row['divergence'] / row['predicted_divergence']:.2f}"]
             for row in rows if "divergence" in row])


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
