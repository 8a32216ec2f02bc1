"""App. C made possible: keys in a basis that commutes with RoPE, against the joint basis.

The joint basis is the project's usual one: it mixes all components of all heads, so that keys must
be rebuilt before they are rotated. A basis that commutes with RoPE mixes heads at one frequency
only. Latents are then cached rotated and U is folded into the query, which App. C of LoRC wants and
the joint basis does not allow [E4]; at equal rank the basis is less accurate.

This basis was published before by two repositories. PseudoHunt/rope-kv-compression has complex
eigenvectors per frequency across heads, one global sort, and the folded query.
PriyanshBhatnagar/PhasorKV has the same with weights by query energy; it reports, for keys at half
rank without exact tokens, perplexity 6.01 -> 7.06 (joint basis: 6.09) for Llama-3.1-8B with 8 KV
heads, and 8.08 -> 8.41 (joint: 8.08) for LongChat-7B with 32. TransMLA (arXiv 2502.07864) mixes
heads by one real orthogonal matrix per frequency. Added here: the basis in a running cache with
sinks, window and 4 bits, decoding times (`bench.py`), and Theorem 1 frequency by frequency.

Both bases are calibrated, both caches bi-branch. Each budget is measured at several splits between
keys and values; the pictures show the best split of each basis.

    python experiments/commuting.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import json
import sys

import study as shared

TIMED = (("bench-llama-3-8b-b64", "64 x 2,048 tokens", "o"),
         ("bench-llama-3-8b-b4-32k", "4 x 32,768", "s"))
KEPT = (0.4, 0.5, 0.6, 0.7, 0.8)
SPLITS = (-0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2)


def measure(study):
    return [study.full()] + [
        study.row(label, kept, basis, "bibranch", split=split, pairs=basis == "commuting")
        for label, basis in (("joint basis", "whitened"), ("commuting basis", "commuting"))
        for kept in KEPT for split in SPLITS if kept + abs(split) <= 1]


def best(rows):
    """The row of lowest perplexity for each label and budget."""
    least = {}
    for row in sorted(rows, key=lambda row: -row["perplexity"]):
        least[row["label"], row["wanted"]] = row
    return sorted(least.values(), key=lambda row: (row["label"], row["wanted"]))


def plot(found):
    fig, axes = shared.panels(found, "cache bytes, part of the full cache", "perplexity")
    for ax, result in zip(axes[0], found.values()):
        full, others = shared.split_full(result["rows"])
        shared.scores(ax, [full, *best(others)], lambda row: row["bytes"] / row["full_bytes"])
    shared.legend(fig, axes[0, -1])
    yield "commuting", fig
    for name, result in found.items():
        full, others = shared.split_full(result["rows"])
        yield f"commuting-{name}", shared.markdown(
            ("basis", "kept", "best split", "perplexity", "over full", "bytes"),
            [(r["label"], r["wanted"], r["split"], f"{r['perplexity']:.2f}",
              f"{r['perplexity'] / full['perplexity'] - 1:+.1%}",
              f"{r['bytes'] / r['full_bytes']:.1%}") for r in best(others)])
    yield from speed(found)


def speed(found):
    """Decoding time (LLaMA-3-8B's shape, kept 0.5, bench.py) against perplexity at that budget."""
    name = next((name for name in found if name.startswith("SmolLM2")), None)
    if not name:
        return
    full, others = shared.split_full(found[name]["rows"])
    at_half = {r["label"]: r["perplexity"] for r in best(others) if r["wanted"] == 0.5}
    points = {"full": full["perplexity"], "compressed@0.5": at_half["joint basis"],
              "commuting@0.5": at_half["commuting basis"]}
    plt = shared.pyplot()
    fig, ax = plt.subplots(figsize=(4.2, 2.6), layout="constrained")
    for file, label, marker in TIMED:
        run = json.loads((shared.HERE / "results" / f"{file}.json").read_text())
        rows = run["tables"][0]["rows"]
        x = [rows[f"{cache} compiled"]["ms"] / rows["full compiled"]["ms"] for cache in points]
        ax.plot(x, points.values(), marker, color="0.15", label=label,
                markerfacecolor="white" if marker == "s" else "0.15")
    for cache, text in (("full", "full cache"), ("compressed@0.5", "joint basis, keys rebuilt"),
                        ("commuting@0.5", "commuting basis, nothing rebuilt")):
        right = cache == "compressed@0.5"
        times = rows[f"{cache} compiled"]["ms"] / rows["full compiled"]["ms"]
        at = max(x) if right else min(times, 1)
        ax.annotate(text, (at, points[cache]), xytext=(0 if right else 6, 9), fontsize=7,
                    textcoords="offset points", ha="right" if right else "left")
    ax.set_xlabel("decode step, times the full cache's (LLaMA-3-8B's shape)")
    ax.set_ylabel("perplexity (SmolLM2-135M)")
    ax.set_xlim(0.8, 2.5)
    ax.margins(y=0.25)
    ax.legend(loc="upper right")
    yield "commuting_speed", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
