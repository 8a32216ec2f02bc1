"""CSKV, where the fine-tuning starts and where it ends.

CSKV's appendix, at 80 % saved, after training: accuracy 0 from a random start, .87 from SVD, .92
from ASVD. The first picture shows the perplexity of each start before any training, and that of the
closed form [E30], in bi-branch caches (4 sinks, a window of 32). The second shows the loss curves
of `cskv_finetune.py`: which starts reach the closed form at CSKV's learning rate and at one 20
times larger.

    python experiments/cskv_starts.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import json
import sys

import study as shared

KEPT = (0.2, 0.4, 0.6)
STARTS = {"random": "random", "SVD": "svd", "SVD after the norm": "norm", "ASVD": "asvd",
          "closed form": "whitened"}
CURVES = {"5e-5": "CSKV's learning rate, 5e-5", "1e-3": "learning rate 1e-3"}


def measure(study):
    return [study.full()] + [row for name, basis in STARTS.items() for row in
                             study.sweep(name, KEPT, basis=basis, cache="bibranch")]


def plot(found):
    fig, axes = shared.panels(found, "fraction of the numbers kept",
                              "perplexity above full (%), untrained")
    for ax, result in zip(axes[0], found.values()):
        shared.losses(ax, result["rows"], "kept")
    shared.legend(fig, axes[0, -1])
    yield "cskv_starts", fig
    yield "cskv_curves", curves()


def curves():
    """Loss over the closed form's, geometric mean over all layers, keys and values."""
    import numpy as np
    fig, axes = shared.pyplot().subplots(1, len(CURVES), figsize=(5.6, 2.6), sharey=True,
                                         layout="constrained")
    for ax, (rate, title) in zip(axes, CURVES.items()):
        run = json.loads((shared.HERE / "results" / f"cskv-{rate}.json").read_text())
        best = np.array(run["closed_form"])
        rows = [{"label": {"svd": "SVD", "asvd": "ASVD"}.get(name, name), "step": point["step"],
                 "loss": np.exp(np.log(np.array(loss) / best).mean())}
                for point in run["curves"][::5] for name, loss in point["loss"].items()]
        ax.axhline(1, color="0.6", linewidth=2.5, zorder=0, label="closed form")
        shared.lines(ax, rows, "step", "loss")
        ax.set(title=title, xlabel="step of AdamW", yscale="log")
        shared.plain_numbers(ax.yaxis)
    axes[0].set_ylabel("loss / closed form's")
    shared.legend(fig, axes[0])
    return fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
