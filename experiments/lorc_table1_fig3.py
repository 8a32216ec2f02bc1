"""LoRC, Table 1 and Fig. 3: one layer compressed at a time, and a shallow block of layers.

Fig. 3 (d_c of 256, 384, 512 of 1024, LLaMA-3-8B): compressing a shallow layer costs most, and a
layer of the deeper half hardly anything. Table 1 (half of the dimension): layer 0 alone costs up to
10.8 points of accuracy and the first eighth of the layers up to 68, while all layers at 60 % by
Eq. 13 cost at most 0.6. Here the last eighth is measured as well; without it, nothing shows that
shallow layers are special.

    python experiments/lorc_table1_fig3.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

RATIOS = (0.25, 0.375, 0.5)
BASES = {"as printed": "svd", "calibrated": "whitened"}


def measure(study):
    L = study.config.layers
    eighth, rows = max(1, round(L / 8)), [study.full()]
    for name, basis in BASES.items():
        for ratio in RATIOS if basis == "svd" else RATIOS[:1]:
            rows += [study.row(f"{ratio:g} of layer {i}", ratio, basis, layers=[i]) | {"name": name}
                     for i in range(L)]
        for label, layers in {"layer 0": [0], "first eighth": [*range(eighth)],
                              "last eighth": [*range(L - eighth, L)]}.items():
            rows.append(study.row(label, 0.5, basis, layers=layers) | {"name": name})
        for skip in (0, eighth):
            label = "all layers, Eq. 13" + ", first eighth whole" * bool(skip)
            rows.append(study.row(label, 0.6, basis, schedule="progressive", skip=skip)
                        | {"name": name})
    return rows


def plot(found):
    fig, axes = shared.panels(found, "the only compressed layer", "perplexity above full (%)")
    for ax, result in zip(axes[0], found.values()):
        full, rows = shared.split_full(result["rows"])
        alone = [row | {"label": f"{row['wanted']:g} kept, {row['name']}"} for row in rows
                 if " of layer " in row["label"]]
        shared.losses(ax, [full, *alone], lambda row: row["layers"][0])
    shared.legend(fig, axes[0, -1], 5)
    yield "lorc_fig3", fig
    yield "lorc_table1", shared.markdown(["", "kept there", *found], list(table(found)))


def table(found):
    """Table 1's rows: what is compressed, the fraction kept of it, and each model's perplexity."""
    yield "full cache", 1, *(f"{shared.split_full(r['rows'])[0]['perplexity']:.2f}"
                             for r in found.values())
    rows = [[row for row in shared.split_full(r["rows"])[1] if " of layer " not in row["label"]]
            for r in found.values()]
    for same in zip(*rows):
        yield (f"{same[0]['label']}, {same[0]['name']}", same[0]["wanted"],
               *(f"{row['perplexity']:.2f}" for row in same))


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
