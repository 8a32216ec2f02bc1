"""LoRC, Tables 2 and 3: shapes, and the bytes of the cache by formula and as buffers.

The paper, at batch 64 and length 2,048: 50, 8 and 20 GB for the full cache; 27.5, 4.8 and 11 GB
with dim_c of 2048, 512 and 512. These are the sizes of keys or of values alone [E14], and they do
not follow from Eq. 13: some layers are full and all others have dim_c [E16]. Here the caches
themselves are made, for keys and values in 16 bits, on torch's meta device (shapes without memory),
for the paper's three models and for --model at 0.6 kept. The memory that a GPU needs in all is
measured by `memory.py`.

    python experiments/lorc_tables2_3.py --model PATH --text FILE --calibrate OTHER_FILE
"""
import sys

import study as shared
from study import model

BATCH, LENGTH, GIB = 64, 2048, 2**30
# Table 3: layers, heads, KV heads, head dimension, width. Table 2: dim_c, layers whole, full, ours
PAPER = {"LLaMA-2-13B": ((40, 40, 40, 128, 5120), 2048, 10, 50, 27.5),
         "LLaMA-3-8B": ((32, 32, 8, 128, 4096), 512, 6, 8, 4.8),
         "LLaMA-3-70B": ((80, 64, 8, 128, 8192), 512, 8, 20, 11)}


def row(name, shape, dim_c, whole):
    """Eq. 4 for keys alone, and the buffers of `whole` full layers and the others at dim_c."""
    layers, heads, kv_heads, head_dim, width = shape
    llama = shared.shape_only(model.Config(          # its MLP and vocabulary do not matter here
        vocab=8, width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp=8, context=LENGTH, eps=1e-5, tied=True, rope={"type": "default", "theta": 1e4}))
    d_max = kv_heads * head_dim
    ranks = [(d_max, d_max)] * whole + [(dim_c, dim_c)] * (layers - whole)
    full, ours = (shared.held(llama, kind, ranks, LENGTH, BATCH) for kind in ("full", "compressed"))
    return {"label": name, "shape": shape, "dim_c": dim_c, "whole": whole,
            "eq_4": 2 * BATCH * LENGTH * d_max * layers, "full_bytes": full, "bytes": ours}


def measure(study):
    c = study.config
    own = (c.layers, c.heads, c.kv_heads, c.head_dim, c.width)
    rows = [row(name, *line[:3]) | {"paper": line[3:]} for name, line in PAPER.items()]
    return [*rows, row(study.name, own, round(0.6 * c.kv_width), 0)]


def plot(found):
    rows = list({row["label"]: row for r in found.values() for row in r["rows"]}.values())
    lines = [[r["label"], *r["shape"], f"{r['shape'][4]} x {r['shape'][2] * r['shape'][3]}",
              f"{r['dim_c']} ({r['whole']} whole)", *(f"{x:g}" for x in r.get("paper", "")),
              *["-"] * (2 - len(r.get("paper", ""))),
              *(f"{x / GIB:.4g}" for x in (r["eq_4"], r["full_bytes"], r["bytes"])),
              f"{r['bytes'] / r['full_bytes']:.1%}"] for r in rows]
    yield "lorc_tables2_3", shared.markdown(
        ["model", "layers", "heads", "KV heads", "d", "D", "Wk", "d_c", "paper: full",
         "paper: LoRC", "Eq. 4, K alone", "buffers: full", "buffers: LoRC", "kept"], lines)


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
