"""CSKV, the window: how many of the most recent tokens stay exact.

CSKV's Table 3, at 80 % saved: accuracy .77 with a window of 2, .92 with 32, .96 with 4,096; the
paper says that the gain flattens after about 128. Here at 0.2 kept, with and without 4 sinks: ASVD,
where CSKV starts; the closed form, where its training ends [E30]; and the loss metric, whose bases
are those for 4 sinks and a window of 32. A window as long as the text gives the full cache.

    python experiments/cskv_window.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

KEPT = 0.2
BASES = {"ASVD": "asvd", "closed form": "whitened", "loss metric": "loss, sorted"}


def measure(study):
    windows = [0, *(2**i for i in range(1, study.length.bit_length()) if 2**i < study.length)]
    return [study.full()] + [
        study.row(f"{name}, {sinks} sinks", KEPT, basis, "bibranch", window=window, sinks=sinks)
        for name, basis in BASES.items() for sinks in (0, 4) for window in windows]


def plot(found):
    fig, axes = shared.panels(found, "window (tokens)", "perplexity")
    for ax, result in zip(axes[0], found.values()):
        shared.scores(ax, result["rows"], "window", pairs=True)
        ax.set_xscale("symlog", base=2, linthresh=2)
        ax.set_xlim(left=-0.3)
        ticks = sorted({row["window"] for row in result["rows"] if "window" in row})[::2]
        ax.set_xticks(ticks, [str(t) for t in ticks])
    shared.legend(fig, axes[0, 0])
    yield "cskv_window", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
