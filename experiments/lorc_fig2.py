"""LoRC, Fig. 2: the score against the fraction kept, for Eq. 13 and for one rank in all layers.

The paper: at 60 % kept the progressive schedule (Eq. 13) loses almost nothing on most tasks, where
one rank for all layers loses much more. In both, the most sensitive layers are left full. Here both
schedules are measured with and without the first eighth of the layers full ("first whole"), and
also with the calibrated basis, C = E[x x^T], which is not in the paper.

    python experiments/lorc_fig2.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

KEPT = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def measure(study):
    first = max(1, round(study.config.layers / 8))
    rows = [study.full()]
    for name, setting in {"LoRC": {}, "LoRC, first whole": {"skip": first},
                          "calibrated": {"basis": "whitened"}}.items():
        for schedule in ("progressive", "uniform"):
            rows += study.sweep(f"{name}, {schedule}", KEPT, schedule=schedule, **setting)
    return rows


def plot(found):
    fig, axes = shared.panels(found, "fraction of the numbers kept", "perplexity")
    for ax, result in zip(axes[0], found.values()):
        shared.scores(ax, result["rows"], "kept", pairs=True)
    shared.legend(fig, axes[0, -1], 4)
    yield "lorc_fig2", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
