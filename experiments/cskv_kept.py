"""CSKV, the fraction kept, with latents of 16 and of 4 bits.

CSKV's Tables 1 and 5: 80 % saved costs .05 of accuracy after fine-tuning (with ASVD's basis and no
fine-tuning, .12 of .99 remains), and 95 %, with 4 bits on top, needs training with rounding. Here:
the closed form [E30] and ASVD in bi-branch caches (4 sinks, a window of 32); rounded without any
training.

    python experiments/cskv_kept.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
BASES = {"ASVD": "asvd", "closed form": "whitened"}


def measure(study):
    return [study.full()] + [row for name, basis in BASES.items() for bits in (16, 4)
                             for row in study.sweep(f"{name}, {bits} bits", KEPT, basis=basis,
                                                    cache="bibranch", bits=bits)]


def plot(found):
    fig, axes = shared.panels(found, "fraction of the numbers kept", "perplexity")
    for ax, result in zip(axes[0], found.values()):
        shared.scores(ax, result["rows"], "kept", pairs=True)
    shared.legend(fig, axes[0, -1])
    yield "cskv_kept", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
