"""Cost against length: a decode step's time and a cache's bytes, 1k to 64k tokens, cache by cache.

Measured by bench.py, which takes several lengths; this draws every results/lengths-*.json, on linear
axes, where a cost that is linear is a straight line and one that has steps is not. Times are
multiples of the full cache's step at the shortest length of the same run.

    python experiments/bench.py --shape smollm2-135m --device cpu --dtype float32 \\
        --context 1024 8192 16384 32768 49152 65536 --steps 10 --rounds 2 --how compiled \\
        --caches full compressed commuting bibranch bibranch-4bit --transformers none \\
        --out experiments/results/lengths-smollm2-135m-cpu.json
    python experiments/lengths.py
"""
import argparse
import json
from pathlib import Path

import numpy as np

import study as shared

NAMES = {"full": "full", "compressed": "compressed", "commuting": "compressed, commuting basis",
         "bibranch": "bi-branch", "bibranch-4bit": "bi-branch, 4 bits"}


def series(result):
    """{cache: (lengths, times, bytes)}, each an array."""
    tables = result["tables"]
    lengths, unit = np.array([t["context"] for t in tables]), tables[0]["rows"]["full compiled"]["ms"]
    rows = {name: [t["rows"][f"{name} compiled"] for t in tables] for name in NAMES}
    return {name: (lengths, np.array([row["ms"] / unit for row in of]), np.array([row["cache_bytes"] for row in of]))
            for name, of in rows.items()}


def straightness(lengths, times):
    """(slope, the largest distance from the least-squares line, as a part of the longest length's time)."""
    line = np.polyfit(lengths, times, 1)
    return line[0], abs(np.polyval(line, lengths) - times).max() / times.max()


def plot(found):
    plt = shared.pyplot()
    fig, axes = plt.subplots(2, len(found), figsize=(0.6 + 3.2 * len(found), 5), squeeze=False,
                             sharex=True, layout="constrained")
    rows = []
    for (top, bottom), (name, result) in zip(axes.T, found.items()):
        top.set_title(f"{name}\n{result['device']}, batch {result['tables'][0]['batch']}, "
                      f"kept {result['tables'][0]['kept']}")
        for (cache, (n, times, held)), (color, marker, dashes) in zip(series(result).items(), shared.LOOKS):
            look = {"color": color, "marker": marker, "linestyle": dashes, "label": NAMES[cache]}
            top.plot(n / 1024, times, **look)
            bottom.plot(n / 1024, held / 2**20, **look)
            slope, off = straightness(n, times)
            rows.append((name, NAMES[cache], f"{1024 * slope:.3f}", f"{off:.1%}"))
        bottom.set_xlabel("tokens of context, thousands (1,024)")
        for ax in (top, bottom):
            ax.set_ylim(0, None)
            ax.set_xlim(0, None)
    axes[0, 0].set_ylabel("decode step, times full's at 1k")
    axes[1, 0].set_ylabel("cache, MiB")
    shared.legend(fig, axes[0, -1], columns=3)
    yield "lengths", fig
    yield "lengths", shared.markdown(("run", "cache", "step for 1,024 more tokens, times full's at 1k",
                                      "off a straight line, at most"), rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=shared.HERE / "results", metavar="DIR", help="Where the runs are.")
    p.add_argument("--figures", type=Path, default=shared.HERE / "figures", metavar="DIR")
    args = p.parse_args()
    found = {path.stem.removeprefix("lengths-"): json.loads(path.read_text())
             for path in sorted(args.out.glob("lengths-*.json"))}
    shared.keep(plot(found) if found else (), args.figures)


if __name__ == "__main__":
    main()
