"""README's first picture: what each method costs in perplexity, against the bytes of its cache.

    label                 basis and ranks                                       cache
    LoRC, Eq. 13          SVD, as printed                                       compressed
    LoRC, uniform         SVD, one rank for all layers                          compressed
    calibrated            E[x x^T], one rank for all layers                     bi-branch
    loss metric           lorc.fisher_factors, ranks by one sort                bi-branch
    trained               distill.py, results/distill-*.json                    bi-branch
    quantization alone    none: keys and values as they are                     bi-branch

A bi-branch cache keeps the first 4 and the last 32 tokens exact. Latents have 16 or 4 bits;
quantization alone has 4, 3 or 2, with the same quantizer (groups of 32 tokens per channel) and the
same exact tokens. Bytes are the sizes of all buffers for one window of text: latents or codes,
minimum and scale of each group, exact tokens. `latent_bytes` is the fraction without the exact
tokens, which a longer text approaches. Trained factors are not measured here: pictures and tables
read their ranks and scores from distill.py's results on the same texts, and compute their bytes.

Verdict: on SmolLM2, 0.4 of the numbers in 4 bits (12.5 % of the bytes of a compressed token) costs
less perplexity than quantization alone in 3 bits (25 %), on both texts. On tiny and stories15M,
where 3 bits cost 0.3 % at most, it also costs less.

    python experiments/front.py --model PATH --text FILE --second OTHER_TEXT --calibrate OTHER_FILE
"""
import json
import sys

import study as shared

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
KEPT_LORC = (0.4, 0.6, 0.8)
BITS = (4, 3, 2)
LORC = {"LoRC, Eq. 13": {"schedule": "progressive"}, "LoRC, uniform": {}}
METRICS = {"calibrated": "whitened", "loss metric": "loss, sorted"}


def measure(study):
    rows = [study.row("full", cache="full", second=True)]
    for label, setting in LORC.items():
        rows += study.sweep(label, KEPT_LORC, second=True, **setting)
    for label, basis in METRICS.items():
        for bits in (16, 4):
            rows += study.sweep(f"{label}, {bits} bits", KEPT, basis=basis, cache="bibranch",
                                bits=bits, second=True)
    rows += [study.row("quantization alone", basis="identity", cache="bibranch", bits=bits,
                       second=True) for bits in BITS]
    return [row | {"latent_bytes": latent_bytes(row)} for row in rows]


def latent_bytes(row):
    """Bytes of a compressed token over those of an exact one, in 16 bits: codes of less than 16
    bits come with a minimum and a scale of 16 bits each for every 32 tokens."""
    bits = row.get("bits", 16)
    return round(row["kept"] * (1 if bits == 16 else (bits + 32 / shared.GROUP) / 16), 5)


def trained(result):
    """Rows from distill.py's results, those that have both texts of one of this script's."""
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
        if (not found or "second_text" in result and not second
                or (len(ranks), found["tokens"]) != (c.layers, result["tokens"])):
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

# label: color, marker, dashes; then index of the point that the name stands at, offset in points,
# side. AT_POINTS: what is written at each point, from its row; offset, side
CURVES = {
    "quantization alone": ("#000000", "s", "-", (0, (-4, 9), "left")),
    "calibrated, 4 bits": ("#8a8a8a", "v", "--", (0, (8, 2), "left")),
    "loss metric, 16 bits": ("#6fa8dc", "o", "-", (3, (6, 8), "left")),
    "loss metric, 4 bits": ("#1f5fa8", "o", "-", (5, (-24, -28), "left")),
    "trained, 4 bits": ("#d95f02", "D", ":", (0, (-1, -25), "right"))}
AT_POINTS = {"quantization alone": (lambda row: f"{row['bits']} bits", (7, 2), "left"),
             "loss metric, 4 bits": (lambda row: f"{row['wanted']:g}", (4, 4), "left")}
SHOWN = {"loss metric, 4 bits": "loss metric,\n4 bits", "trained, 4 bits": "trained,\n4 bits",
         "calibrated, 4 bits": "uniform, 4 bits"}
TOP = 130           # of the vertical axis, in percent


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
        of = sorted((row for row in rows if row["label"] == label and key in row),
                    key=lambda row: row["bytes"])
        points = [(100 * row["bytes"] / row["full_bytes"], percent(row)) for row in of]
        if not points:
            continue
        ax.plot(*zip(*points), color=color, marker=marker, linestyle=dashes,
                markerfacecolor="white" if label.endswith("16 bits") else color)
        index = min(index, len(points) - 1)
        ax.annotate(SHOWN.get(label, label), points[index], xytext=offset, ha=side, color=color,
                    textcoords="offset points", fontsize=9.5)
        if label in AT_POINTS:
            words, offset, side = AT_POINTS[label]
            for row, point in zip(of, points):
                ax.annotate(words(row), point, xytext=offset, fontsize=7, color=color,
                            textcoords="offset points", ha=side)
    out_of_range(ax, [row for row in rows if row["label"] == "LoRC, Eq. 13"], percent)
    ax.set(yscale="log", ylim=(0.8 * shared.FLOOR, TOP), xlim=(0, 66))
    shared.plain_numbers(ax.yaxis)


def out_of_range(ax, rows, percent):
    """A line that says how much the best of LoRC's caches costs, if all are above the axis."""
    if rows and min(map(percent, rows)) > TOP:
        best = min(rows, key=percent)
        ax.text(0.99, 0.97, f"LoRC as printed: +{percent(best):,.0f} %\nat "
                f"{best['bytes'] / best['full_bytes']:.0%} of the size", ha="right", va="top",
                transform=ax.transAxes, fontsize=9)


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
