"""README's first picture: what each method costs in perplexity, against the bytes its cache holds.

Bytes are the buffers' for one window of text: latents, 4-bit codes with their minimum and step,
exact sinks and window. Trained factors are those of `distill.py`, whose results/distill-*.json hold
their ranks and their perplexity on the same text; only their bytes are computed here.

    python experiments/front.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import json
import sys
from pathlib import Path

import study as shared

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = {
    "LoRC, uniform": {},
    "LoRC, progressive": {"schedule": "progressive"},
    "calibrated": {"basis": "whitened"},
    "calibrated, bi-branch": {"basis": "whitened", "cache": "bibranch"},
    "calibrated, bi-branch, 4 bits": {"basis": "whitened", "cache": "bibranch", "bits": 4}}


def measure(study):
    return [study.full()] + [row for name, setting in METHODS.items()
                             for row in study.sweep(name, KEPT, **setting)] + trained(study)


def trained(study):
    """Rows from distill.py's results on this text, if there are any, with their caches' bytes."""
    rows = []
    for path in sorted((shared.HERE / "results").glob("distill-*.json")):
        run = json.loads(path.read_text())
        scores = run["perplexity"].get(Path(study.args.text).name)
        ranks = [tuple(pair) for pair in run["ranks"]]
        if not scores or (len(ranks), scores["tokens"]) != (study.config.layers, len(study.text)):
            continue
        for bits, key in ((16, "after"), (4, "after, 4 bits")):
            rows.append({"label": "trained" + ", 4 bits" * (bits == 4), "kept": run["kept"],
                         "cache": "bibranch", "bits": bits, "perplexity": scores[key],
                         "from": path.name} | study.bytes("bibranch", ranks, bits=bits))
    return rows


def plot(found):
    """Of the largest model: perplexity above the full cache's against bytes, both in percent."""
    (name, result), = list(found.items())[-1:]
    full, _ = shared.split_full(result["rows"])
    fig, ax = shared.pyplot().subplots(figsize=(7, 3.4), layout="constrained")
    shared.losses(ax, result["rows"], lambda row: 100 * row["bytes"] / row["full_bytes"])
    ax.set(xlim=(0, 100), xlabel="bytes of the cache (% of the full cache's)",
           ylabel="perplexity above the full cache's (%)",
           title=f"{name} on {result['text']}; full cache: {full['perplexity']:.2f}")
    fig.legend(loc="outside right center", labelspacing=1.2)
    yield "front", fig


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
