"""App. C, made possible: keys in a basis that commutes with RoPE against the joint basis.

Both calibrated, bi-branch, at equal bytes. A commuting basis mixes heads at one frequency only, so
it needs more numbers for the same keys; its cached keys need no rebuilding (experiments/bench.py
times that). Each budget at several splits between keys and values; drawn is each basis's best.

    python experiments/commuting.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

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


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
