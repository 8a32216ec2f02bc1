"""CSKV, the split between keys and values: which of them needs more numbers.

The paper finds that compressing values harder costs more; its code keeps a quarter of the keys'
width and three quarters of the values'. Here: the closed form [E30] in bi-branch caches at three
budgets, with a fraction of the width moved from keys to values. All points of a line keep the same
number of numbers.

    python experiments/cskv_split.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

KEPT = (0.2, 0.4, 0.6)
SPLITS = (-0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def measure(study):
    return [study.full()] + [
        study.row(f"{kept:g} kept", kept, "whitened", "bibranch", split=split)
        for kept in KEPT for split in SPLITS if 0 < kept - abs(split)]


def plot(found):
    fig, axes = shared.panels(found, "fraction of the width, keys to values", "perplexity")
    for ax, result in zip(axes[0], found.values()):
        shared.scores(ax, result["rows"], "split")
    shared.legend(fig, axes[0, -1])
    yield "cskv_split", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
