"""README's first picture: what each method costs in perplexity, against the bytes of its cache.

    label                 basis and ranks                                       cache
    LoRC, Eq. 13          SVD, as printed                                       compressed
    LoRC, uniform         SVD, one rank for all layers                          compressed
    calibrated            E[x x^T], one rank for all layers                     bi-branch
    loss metric           E[x x^T] and E[g g^T], ranks by one sort, two passes  bi-branch
    trained               distill.py, results/distill-*.json                    bi-branch
    quantization alone    none: keys and values as they are                     bi-branch

A bi-branch cache keeps the first 4 and the last 32 tokens exact. Latents have 16 or 4 bits;
quantization alone has 4, 3 or 2, with the same quantizer (groups of 32 tokens per channel) and the
same exact tokens. Labels ending in "no exact tokens" have no sinks and no window. Bytes are the
sizes of all buffers for one window of text: latents or codes, minimum and scale of each group,
exact tokens. `latent_bytes` is the fraction without the exact tokens, which a longer text
approaches. Trained factors are not measured here: pictures and tables read their ranks and scores
from distill.py's results on the same texts, and compute their bytes.

    python experiments/front.py --model PATH --text FILE --second OTHER_TEXT --calibrate OTHER_FILE
"""
import json
import sys

import study as shared

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
FEW = (0.2, 0.4, 0.6)
BITS = (4, 3, 2)
LORC = {"LoRC, Eq. 13": {"schedule": "progressive"}, "LoRC, uniform": {}}
METRICS = {"calibrated": "whitened", "loss metric": "loss, sorted"}
NONE_EXACT = {"sinks": 0, "window": 0}


def measure(study):
    rows = [study.row("full", cache="full", second=True)]
    for label, setting in LORC.items():
        rows += study.sweep(label, KEPT, second=True, **setting)
    for label, basis in METRICS.items():
        for bits in (16, 4):
            rows += study.sweep(f"{label}, {bits} bits", KEPT, basis=basis, cache="bibranch",
                                bits=bits, second=True)
        rows += study.sweep(f"{label}, 4 bits, no exact tokens", FEW, basis=basis,
                            cache="bibranch", bits=4, second=True, **NONE_EXACT)
    for bits in BITS:
        rows.append(study.row("quantization alone", basis="identity", cache="bibranch", bits=bits,
                              second=True))
        rows.append(study.row("quantization alone, no exact tokens", basis="identity",
                              cache="bibranch", bits=bits, second=True, **NONE_EXACT))
    return [row | {"latent_bytes": latent_bytes(row)} for row in rows]


def latent_bytes(row):
    """Bytes of a compressed token over those of an exact one, in 16 bits: codes of less than 16
    bits come with a minimum and a scale of 16 bits each for every 32 tokens."""
    bits = row.get("bits", 16)
    return round(row["kept"] * (1 if bits == 16 else (bits + 32 / shared.GROUP) / 16), 5)


def trained(result):
    """Rows from distill.py's results on the texts of one of this script's, if there are any."""
    c = shared.model.Config(             # its MLP and vocabulary do not matter here
        vocab=8, width=result["width"], layers=result["layers"], heads=result["heads"],
        kv_heads=result["kv_heads"], head_dim=result["head_dim"], mlp=8,
        context=result["context"], eps=1e-5, tied=True, rope={"type": "default", "theta": 1e4})
    shape, rows = shared.shape_only(c), []
    for path in sorted((shared.HERE / "results").glob("distill-*.json")):
        run = json.loads(path.read_text())
        found = run["perplexity"].get(result["text"])
        second = run["perplexity"].get(result.get("second_text"), {})
        ranks = [tuple(pair) for pair in run["ranks"]]
        if not found or (len(ranks), found["tokens"]) != (c.layers, result["tokens"]):
            continue
        for bits, key in ((16, "after"), (4, "after, 4 bits")):
            row = {"label": f"trained, {bits} bits", "kept": round(run["kept"], 5),
                   "cache": "bibranch", "bits": bits, "perplexity": found[key],
                   "bytes": shared.held(shape, "bibranch", ranks, c.context, bits=bits),
                   "full_bytes": shared.held(shape, "full", ranks, c.context)}
            if key in second:
                row["second_perplexity"] = second[key]
            rows.append(row | {"latent_bytes": latent_bytes(row)})
    return rows


# The picture -------------------------------------------------------------------------------------

# label: color, marker, dashes, where its name stands (index of the point, offset in points, side)
CURVES = {
    "quantization alone": ("#000000", "s", "-", (-1, (6, 2), "left")),
    "calibrated, 4 bits": ("#8a8a8a", "v", "--", (3, (8, 4), "left")),
    "loss metric, 16 bits": ("#6fa8dc", "o", "-", (2, (8, 5), "left")),
    "loss metric, 4 bits": ("#1f5fa8", "o", "-", (0, (8, 0), "left")),
    "trained, 4 bits": ("#d95f02", "D", ":", (-1, (6, -12), "left"))}


def plot(found):
    """Of the largest model: perplexity above the full cache's against bytes, both in percent."""
    name, result = list(found.items())[-1]
    texts = [("perplexity", result["text"])]
    if "second_text" in result:
        texts.append(("second_perplexity", result["second_text"]))
    plt = shared.pyplot()
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10.5, "lines.linewidth": 1.8,
                         "lines.markersize": 5.5, "savefig.dpi": 160})
    fig, axes = plt.subplots(len(texts), 1, figsize=(4.6, 3.4 * len(texts)), sharex=True,
                             squeeze=False, layout="constrained")
    for ax, (key, text) in zip(axes[:, 0], texts):
        panel(ax, result["rows"] + trained(result), key)
        ax.set_title(f"{name}, {shared.TEXTS.get(text, text)}", loc="left")
        ax.set_ylabel("perplexity increase (%)")
    axes[-1, 0].set_xlabel("size of the cache (% of the full cache)")
    yield "front", fig
    yield "front", table(found)


def panel(ax, rows, key):
    """The curves of one text, each with its name beside it."""
    full = next(row for row in rows if row["label"] == "full")

    def percent(row):
        return max(shared.FLOOR, 100 * (row[key] / full[key] - 1))
    for label, (color, marker, dashes, (index, offset, side)) in CURVES.items():
        points = sorted((100 * row["bytes"] / row["full_bytes"], percent(row), row)[:2]
                        for row in rows if row["label"] == label and key in row)
        if not points:
            continue
        ax.plot(*zip(*points), color=color, marker=marker, linestyle=dashes,
                markerfacecolor="white" if label.endswith("16 bits") else color)
        index = min(index, len(points) - 1)
        ax.annotate(label, points[index], xytext=offset, textcoords="offset points", ha=side,
                    color=color, fontsize=9.5)
    ax.set(yscale="log", ylim=(0.8 * shared.FLOOR, 130), xlim=(0, 62))
    shared.plain_numbers(ax.yaxis)


def table(found):
    """All rows of all models: bytes, and perplexity above the full cache's on both texts."""
    lines = []
    for name, result in found.items():
        full = next(row for row in result["rows"] if row["label"] == "full")
        for row in result["rows"] + trained(result):
            lines.append([name, row["label"], row["kept"], row.get("bits", 16),
                          f"{row['latent_bytes']:.2%}", f"{row['bytes'] / row['full_bytes']:.2%}",
                          *(f"{row[key]:,.2f}" if key in row else "–"
                            for key in ("perplexity", "second_perplexity")),
                          *(shared.percent_above(row[key], full, key) if key in row else "–"
                            for key in ("perplexity", "second_perplexity"))])
    return shared.markdown(["model", "method", "kept", "bits", "bytes of a compressed token",
                            "bytes of the cache", "perplexity", "on the second text",
                            "increase (%)", "on the second text (%)"], lines)


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
