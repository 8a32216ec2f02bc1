"""Cost against length: a decoding step's time and a cache's bytes from 1k to 64k tokens.

bench.py measures it, because it accepts several lengths; this script draws every
results/lengths-*.json. The axes are linear, so that a linear cost is a straight line. Times are
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
    lengths = np.array([t["context"] for t in tables])
    unit = tables[0]["rows"]["full compiled"]["ms"]
    rows = {name: [t["rows"][f"{name} compiled"] for t in tables] for name in NAMES}
    return {name: (lengths, np.array([row["ms"] / unit for row in of]),
                   np.array([row["cache_bytes"] for row in of])) for name, of in rows.items()}


def straightness(lengths, times):
    """Slope of the least-squares line, and the largest distance from it over the longest time."""
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
        curves = series(result).items()
        for (cache, (n, times, held)), (color, marker, dashes) in zip(curves, shared.LOOKS):
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
    yield "lengths", shared.markdown(
        ("run", "cache", "increase of a step per 1,024 tokens, times full's step at 1k",
         "largest distance from a straight line"), rows)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=shared.HERE / "results", metavar="DIR",
                   help="Folder of the result files. Default: results/ here.")
    p.add_argument("--figures", type=Path, default=shared.HERE / "figures", metavar="DIR")
    args = p.parse_args()
    found = {path.stem.removeprefix("lengths-"): json.loads(path.read_text())
             for path in sorted(args.out.glob("lengths-*.json"))}
    shared.keep(plot(found) if found else (), args.figures)


if __name__ == "__main__":
    main()
