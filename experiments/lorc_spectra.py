"""LoRC, Sec. 4.1 and App. B: are the matrices low-rank? And Eqs. 10, 12, 13: kappa and kappa~.

The paper says that the weights of keys and values are low-rank, and that ln kappa~, which falls
with depth by construction, shows which layers are sensitive. The pictures show the singular values
of the weights, those of the keys and values themselves (square roots of the eigenvalues of
W E[x x^T] W^T), and each layer's kappa. Weights that were quantized to 4 bits, as SmolLM2's were
here, have a higher tail in every spectrum and so a smaller kappa than the original ones.

    python experiments/lorc_spectra.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys
from statistics import median

import study as shared
from study import lorc

POINTS = 33           # of each spectrum, evenly spaced
KINDS = {"svd": "weights", "whitened": "activations"}


def measure(study):
    kappas = study.log_kappas()
    tilde = lorc.log_kappa_tilde(kappas)
    rows, d_max = [], study.config.kv_width
    at = sorted({round(i * (d_max - 1) / (POINTS - 1)) for i in range(POINTS)})
    for layer in range(study.config.layers):
        row = {"layer": layer, "log_kappa_k": kappas[layer][0], "log_kappa_v": kappas[layer][1],
               "log_kappa_tilde": tilde[layer], "at": [round((i + 1) / d_max, 4) for i in at]}
        for basis, name in KINDS.items():
            for which, (lam, _) in zip("kv", study.spectra(basis)[layer]):
                sigma = (lam / lam[0]).sqrt()[at]
                row[f"{name}_{which}"] = [float(f"{x:.4g}") for x in sigma.tolist()]
        rows.append(row)
    return rows


def plot(found):
    yield "lorc_spectra", spectra(found)
    yield "lorc_kappa", kappa(found)


def spectra(found):
    """The median of all layers, their range as a band, and layer 0 alone."""
    fig, axes = shared.panels(found, "index i / width", "", rows=2, height=2.1, sharey="row")
    for i, of in enumerate(KINDS.values()):
        axes[i, 0].set_ylabel(rf"$\sigma_i / \sigma_1$ of {of}")
        for ax, result in zip(axes[i], found.values()):
            for kind, name, color in (("k", "keys", "#1f5fa8"), ("v", "values", "#d95f02")):
                at, every = result["rows"][0]["at"], [row[f"{of}_{kind}"] for row in result["rows"]]
                low, middle, high = ([f(xs) for xs in zip(*every)] for f in (min, median, max))
                ax.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
                dashes = "-" if kind == "k" else "--"
                ax.plot(at, middle, dashes, color=color, label=f"{name}, median layer")
                ax.plot(at, every[0], dashes, color=color, linewidth=0.7, marker=".", markevery=4,
                        label=f"{name}, layer 0")
            ax.set_yscale("log")
            shared.plain_numbers(ax.yaxis)
    shared.legend(fig, axes[0, -1])
    return fig


def kappa(found):
    """ln kappa of each layer, and their sums from the layer on."""
    fig, axes = shared.panels(found, "layer", "ln of a condition number")
    for ax, result in zip(axes[0], found.values()):
        shared.lines(ax, [{"label": label, "layer": row["layer"], "y": row[key]}
                          for key, label in (("log_kappa_tilde", r"ln $\tilde\kappa_l$, Eq. 12"),
                                             ("log_kappa_k", r"ln $\kappa(W_k)$, Eq. 10"),
                                             ("log_kappa_v", r"ln $\kappa(W_v)$, Eq. 10"))
                          for row in result["rows"]], "layer", "y")
        ax.set_yscale("log")
        shared.plain_numbers(ax.yaxis)
    shared.legend(fig, axes[0, -1])
    return fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
