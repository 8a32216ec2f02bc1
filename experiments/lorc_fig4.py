"""LoRC, Fig. 4: the relative reconstruction error of keys and values, layer by layer.

The paper measures the error of the weights (Eq. 19) and finds it similar in all layers and lower in
shallow ones. The cache loses something else: ||k - k~|| / ||k|| over the activations of a text that
was not calibrated on. The picture shows both, Theorem 1's bound on the second
(sigma_{d_c+1} ||x|| / ||k||), and the error with the calibrated basis. All are root mean squares,
computed exactly from the inputs' second moment.

    python experiments/lorc_fig4.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

KEPT = 0.5
LABELS = {"bound": "Theorem 1's bound", "activations": "activations", "weights": "weights, Eq. 19",
          "calibrated": "activations, calibrated basis"}


def errors(W, C, d_c, lam, U, U_calibrated):
    """The four errors of one matrix W whose inputs have the second moment C."""
    W, d_c = W.double(), min(d_c, len(lam))
    K = W @ C.double() @ W.T                                   # E[k k^T]

    def lost(U):
        return max(0.0, 1 - ((U[:, :d_c].T @ K @ U[:, :d_c]).trace() / K.trace()).item()) ** 0.5
    bound = lam[d_c] * C.double().trace() / K.trace() if d_c < len(lam) else lam.sum() * 0
    return {"bound": bound.sqrt().item(), "activations": lost(U), "calibrated": lost(U_calibrated),
            "weights": (lam[d_c:].sum() / lam.sum()).sqrt().item()}


def measure(study):
    rows, d_c = [], round(KEPT * study.config.kv_width)
    for layer, C in enumerate(study.moments("whitened", held_out=True)):
        plain, calibrated = study.spectra("svd")[layer], study.spectra("whitened")[layer]
        for which, W, (lam, U), (_, best) in zip("KV", study.weights[layer], plain, calibrated):
            rows.append({"layer": layer, "of": which, "d_c": d_c} | errors(W, C, d_c, lam, U, best))
            study.say(f"layer {layer} {which}: weights {rows[-1]['weights']:.3f}  "
                      f"activations {rows[-1]['activations']:.3f}")
    return rows


def plot(found):
    fig, axes = shared.panels(found, "layer", "", rows=2, height=2.1, sharey="row")
    for i, name in enumerate(("keys", "values")):
        axes[i, 0].set_ylabel(f"relative error of {name}")
        for ax, result in zip(axes[i], found.values()):
            shared.lines(ax, [{"label": label, "layer": row["layer"], "error": row[key]}
                              for key, label in LABELS.items() for row in result["rows"]
                              if row["of"] == name[0].upper()], "layer", "error")
            ax.set_yscale("log")
            shared.plain_numbers(ax.yaxis)
    shared.legend(fig, axes[0, -1])
    yield "lorc_fig4", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
