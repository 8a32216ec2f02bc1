"""CSKV, four bits: rounding after training (PTQ) against training with rounding (QAT).

CSKV's Table 5: at 80 % saved, 4 bits need QAT (accuracy .90), and PTQ gives 0. The first picture
shows the perplexity of the closed form's latents, untrained: with 16 bits, with this project's
quantizer, and with the published one, whose zero point is clamped [E31]. The second picture is made
from `cskv_finetune.py`'s results: the error of held-out keys and values in four layers, rounded,
and trained with rounding.

Verdict: PTQ fails because of the clamp and not because of the rounding.

    python experiments/cskv_bits.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import json
import sys

import study as shared
from cskv_finetune import published

KEPT = (0.2, 0.4, 0.6)
ROUNDED = {"16 bits": (16, None), "4 bits, ours": (4, None),
           "4 bits, as published": (4, published)}
RUN = "cskv-5e-5.json"          # CSKV's learning rate


def measure(study):
    return [study.full()] + [
        study.row(name, kept, "whitened", "bibranch", bits=bits, rounding=rounding)
        for name, (bits, rounding) in ROUNDED.items() for kept in KEPT]


def plot(found):
    fig, axes = shared.panels(found, "fraction of the numbers kept", "perplexity, untrained")
    for ax, result in zip(axes[0], found.values()):
        shared.scores(ax, result["rows"], "kept")
    shared.legend(fig, axes[0, -1])
    yield "cskv_bits", fig
    yield "cskv_qat", qat()


def qat():
    """Relative error of keys and values in each layer that cskv_finetune.py trained."""
    run = json.loads((shared.HERE / "results" / RUN).read_text())
    bits = run["four_bits"]
    losses = {"not rounded": bits["not rounded"], "ours, rounded": bits["ours"]["rounded"],
              "published, rounded (PTQ)": bits["published"]["rounded"],
              "published, trained (QAT)": bits["published"]["trained"]}
    fig, axes = shared.pyplot().subplots(1, 2, figsize=(5.6, 2.6), sharey=True,
                                         layout="constrained")
    for i, (ax, of) in enumerate(zip(axes, ("keys", "values"))):
        shared.lines(ax, [{"label": label, "layer": n, "loss": loss[n][i] ** 0.5}
                          for label, loss in losses.items() for n in range(len(loss))],
                     "layer", "loss")
        ax.set(title=of, xlabel="layer", yscale="log",
               xticks=range(len(run["layers"])), xticklabels=run["layers"])
        shared.plain_numbers(ax.yaxis)
    axes[0].set_ylabel("relative error, held-out text")
    shared.legend(fig, axes[0], 2)
    return fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
