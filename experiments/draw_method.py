"""Draw the pictures that explain the method: figures/method_*.png.

    python experiments/draw_method.py                       draw all pictures
    python experiments/draw_method.py --measure --model PATH --calibrate FILE
                                                            first compute the ranks of picture 3

Picture 1  method_token      the path of one token through a layer with a compressed cache
Picture 2  method_bibranch   what the bi-branch cache holds after 30, 60 and 150 tokens
Picture 3  method_ranks      the ranks of every layer under three rules, from results/ranks-*.json
Picture 4  method_commuting  a mix of heads at one frequency commutes with the rotation

Each picture is 4 inches wide and has no type smaller than 9 points, so it can be read at the width
of a phone. Grey levels, dashes and labels carry what the colors say. Needs matplotlib.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
WIDTH = 4.0                                   # inches
KEY, VALUE, EXACT, NOTE = "#9dc3e6", "#f6c48f", "#4f4f4f", "#c00000"


def canvas(height):
    """A figure of WIDTH x height inches whose axes are in inches, with y pointing down."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "mathtext.fontset": "dejavusans", "savefig.dpi": 200})
    fig = plt.figure(figsize=(WIDTH, height))
    ax = fig.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    return fig, ax


def text(ax, x, y, label, size=10, align="center", **options):
    ax.text(x, y, label, fontsize=size, ha=align, va="center", linespacing=1.25, **options)


def bar(ax, x, y, width, blocks=1, color="white", height=0.2, **options):
    """A vector as a bar centered at (x, y), divided into equal blocks, one for each head."""
    from matplotlib.patches import Rectangle
    step = width / blocks
    for i in range(blocks):
        ax.add_patch(Rectangle((x - width / 2 + i * step, y - height / 2), step, height,
                               facecolor=color, edgecolor="black", linewidth=0.9, **options))


def box(ax, x, y, width, label, color="white", height=0.3, edge="black"):
    """A rounded box for an operation."""
    from matplotlib.patches import FancyBboxPatch
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                                boxstyle="round,pad=0,rounding_size=0.07", facecolor=color,
                                edgecolor=edge, linewidth=1.2))
    text(ax, x, y, label)


def arrow(ax, start, end, **options):
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.1, "mutation_scale": 11,
             "shrinkA": 0, "shrinkB": 0} | options
    ax.annotate("", end, start, arrowprops=style)


# Picture 1 ---------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD = 9, 3, 0.36            # query heads, key-value heads, inches for one head
LATENT = 0.5                                  # inches for a latent


def token():
    """The path of one token: SmolLM2's proportions, 9 query heads that share 3 KV heads."""
    fig, ax = canvas(7.3)
    left, right, kv_width = 1.0, 3.0, KV_HEADS * HEAD
    text(ax, 2.0, 0.16, "hidden state of one token, $x$: $D$ numbers")
    bar(ax, 2.0, 0.42, HEADS * HEAD)
    for x, name, color in ((left, "k", KEY), (right, "v", VALUE)):
        arrow(ax, (x, 0.52), (x, 0.74))
        box(ax, x, 0.89, 0.5, f"$W_{name}$", color)
        arrow(ax, (x, 1.04), (x, 1.5))
        bar(ax, x, 1.6, kv_width, KV_HEADS, color)
        word = {"k": "key", "v": "value"}[name]
        text(ax, x, 1.27, f" {word} ${name}$:  $G \\times d$", bbox={"fc": "white", "ec": "none",
                                                                   "pad": 1})
        arrow(ax, (x, 1.7), (x, 1.88))
        box(ax, x, 2.03, 0.5, f"$U_{name}^T$", color)
        arrow(ax, (x, 2.18), (x, 2.58))
    draw_stored(ax, left, right)
    draw_key_side(ax, left, kv_width)
    draw_value_side(ax, right)
    return fig


def draw_stored(ax, left, right):
    """The band of the cache, with one latent of keys and one of values."""
    from matplotlib.patches import Rectangle
    ax.add_patch(Rectangle((0.06, 2.36), 3.88, 0.74, facecolor="#e8e8e8", edgecolor="black",
                           linewidth=1.2))
    text(ax, 2.0, 2.49, "cache", weight="bold")
    for x, name, color in ((left, "k", KEY), (right, "v", VALUE)):
        bar(ax, x, 2.68, LATENT, 1, color)
        text(ax, x, 2.93, f"latent $c_{name}$:  $d_{name}$ numbers")
    ax.plot([0.06, 3.94], [3.24, 3.24], color="black", linewidth=0.9, linestyle=(0, (4, 3)))
    text(ax, 2.45, 3.4, "for every later query", 9.5, style="italic")


def draw_key_side(ax, x, kv_width):
    """Latent -> rebuilt key -> rotation -> score -> weights."""
    arrow(ax, (x, 3.1), (x, 3.56))
    box(ax, x, 3.71, 0.5, "$U_k$", KEY)
    arrow(ax, (x, 3.86), (x, 4.0))
    bar(ax, x, 4.1, kv_width, KV_HEADS, KEY)
    text(ax, 1.62, 4.1, r"$\tilde k$ of every token:  $G \times d$", 9.5, "left")
    arrow(ax, (x, 4.2), (x, 4.38))
    box(ax, x, 4.56, 1.5, "rotate by $R_n$", "#ffd9d9", 0.34, NOTE)
    text(ax, 1.86, 4.52, "$R_n$ depends on position $n$:\n$U_k$ cannot move past it\n"
         "into the query", 9.5, "left", color=NOTE)
    arrow(ax, (x, 4.73), (x, 5.0))
    box(ax, x, 5.18, 1.8, r"scores  $q \cdot \tilde k\,/\sqrt{d}$", KEY, 0.36)
    arrow(ax, (2.32, 5.18), (1.9, 5.18))
    text(ax, 2.36, 5.18, "query $q$: $H \\times d$,\nrotated", align="left")
    arrow(ax, (x, 5.36), (x, 5.63))
    box(ax, x, 5.8, 1.8, "softmax  $p$:  $H \\times N$", "white", 0.34)


def draw_value_side(ax, x):
    """Latents -> weighted sum in each head -> expanded -> output."""
    arrow(ax, (3.86, 3.1), (3.86, 5.63))
    arrow(ax, (1.9, 5.8), (2.24, 5.8))
    box(ax, 3.09, 5.8, 1.7, r"$\sum\, p\, c_v$:  $H \times d_v$", VALUE, 0.34)
    arrow(ax, (x, 5.97), (x, 6.2))
    box(ax, x, 6.36, 0.5, "$U_v$", VALUE)
    text(ax, 2.64, 6.36, "a head uses the rows\nof its own group", 9.5, "right")
    arrow(ax, (x, 6.51), (x, 6.72))
    bar(ax, 2.0, 6.82, HEADS * HEAD, HEADS, VALUE)
    text(ax, 2.0, 7.1, "output of attention:  $H \\times d$,  then $W_o$")


# Picture 2 ---------------------------------------------------------------------------------------

SINKS, WINDOW, GROUP = 4, 32, 32


def spans(n):
    """What the bi-branch cache holds after n tokens: [(kind, tokens)], in order of position."""
    sinks = min(n, SINKS)
    window = min(n - sinks, WINDOW)
    latents = n - sinks - window
    groups = latents // GROUP
    return ([("sink", sinks)] + groups * [("rounded", GROUP)]
            + [("waiting", latents - groups * GROUP), ("window", window)])


LOOKS = {"sink": {"color": EXACT}, "window": {"color": EXACT}, "waiting": {"color": KEY},
         "rounded": {"color": "#e6f0fa", "hatch": "////"}}


def bibranch():
    """The cache as a strip of tokens at three moments, a legend, and the ring of the window."""
    fig, ax = canvas(4.75)
    left, scale = 0.08, 3.84 / 150
    for y, n in zip((0.44, 1.1, 1.76), (30, 60, 150)):
        text(ax, left, y - 0.26, f"after {n} tokens", align="left")
        start = left
        for kind, size in spans(n):
            if size:
                bar(ax, start + size * scale / 2, y, size * scale, height=0.26, **LOOKS[kind])
            start += size * scale
    text(ax, left, 2.04, "4 sinks", 9.5, "left")
    text(ax, left + (4 + 48) * scale, 2.04, "3 groups of 32", 9.5)
    text(ax, left + (150 - 16) * scale, 2.04, "window: 32", 9.5)
    labels = (("sink", "exact key and value"), ("waiting", "latent, not yet rounded"),
              ("rounded", "latents rounded to 4 bits: a group has\none minimum and step per channel"))
    for y, (kind, label) in zip((2.42, 2.7, 3.06), labels):
        bar(ax, 0.29, y, 0.42, height=0.2, **LOOKS[kind])
        text(ax, 0.6, y, label, align="left")
    draw_ring(ax, 0.72, 4.02)
    return fig


def draw_ring(ax, x, y):
    """The window as a ring of slots; the light one holds the oldest token and is written next."""
    from matplotlib.patches import Wedge
    slots = 8
    for i in range(slots):
        oldest = i == 0
        ax.add_patch(Wedge((x, y), 0.58, -67.5 + 45 * i, -22.5 + 45 * i, width=0.25,
                           facecolor="white" if oldest else EXACT, linewidth=1.2,
                           edgecolor="black" if oldest else "white", zorder=2 if oldest else 1))
    text(ax, x, y, "window", 9.5)
    arrow(ax, (1.5, 3.6), (1.1, 3.68))
    text(ax, 1.55, 3.6, "A new token takes the slot\nof the oldest token,", align="left")
    arrow(ax, (1.08, 3.85), (1.5, 4.3), connectionstyle="arc3,rad=-0.2")
    text(ax, 1.55, 4.38, "which is compressed once,\nat this moment.", align="left")


# Picture 3 ---------------------------------------------------------------------------------------

RULES = {"Eq. 13": ("#d95f02", "--", "s"), "uniform": ("0.45", ":", None),
         "loss metric": ("#1f3f78", "-", "o")}


def ranks(result):
    """Kept numbers of keys and of values in each layer, one line a rule."""
    fig, _ = canvas(4.6)
    fig.clear()
    axes = fig.subplots(2, 1, sharex=True, sharey=True)
    for ax, word, i in zip(axes, ("keys, $d_k$", "values, $d_v$"), (0, 1)):
        for name, (color, dashes, marker) in RULES.items():
            d_c = [pair[i] for pair in result["ranks"][name]]
            ax.plot(d_c, color=color, linestyle=dashes, marker=marker, markersize=3.5,
                    linewidth=1.6, label=name)
        ax.set(ylim=(0, 1.05 * result["d_max"]), ylabel=word)
        ax.axhline(result["d_max"], color="0.7", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("layer")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False,
               columnspacing=1.0, handlelength=1.8)
    fig.subplots_adjust(left=0.17, right=0.98, top=0.91, bottom=0.11, hspace=0.14)
    return fig


def measure_ranks(model_path, calibrate, kept):
    """Ranks of all layers under the three rules, for results/ranks-MODEL.json."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    import lorc
    import model
    from record import provenance
    from runtime.jobs import read_text
    from runtime.text import Tokenizer
    llama = model.load(model_path, torch.float32)
    tokens = torch.tensor(Tokenizer(model_path, llama.config).encode(read_text(calibrate)))
    kappas, d_max = lorc.log_kappas(llama), llama.config.kv_width
    plans = {"Eq. 13": lorc.make_plan(kappas, d_max, kept),
             "uniform": lorc.make_plan(kappas, d_max, kept, schedule="uniform"),
             "loss metric": lorc.compress_for_loss(llama, tokens, kept)[0]}
    return {"model": Path(model_path).resolve().name, "calibrated_on": Path(calibrate).name,
            "d_max": d_max, "kept": {name: plan.kept for name, plan in plans.items()},
            "ranks": {name: plan.ranks for name, plan in plans.items()}} | provenance("cpu")


# Picture 4 ---------------------------------------------------------------------------------------

def commuting():
    """Three heads at one frequency before and after the rotation, and their mix."""
    fig, ax = canvas(3.4)
    z = np.array([0.7 + 0.1j, 0.34 + 0.52j, -0.2 + 0.4j])
    mix = np.array([0.5 - 0.5j, 0.4 - 0.35j, -0.2 + 0.3j])
    turn = np.exp(1j * np.deg2rad(100))
    for x, phase in ((0.98, 1), (3.02, turn)):
        draw_plane(ax, x, 1.5, 0.88, z * phase, (mix @ z) * phase)
    text(ax, 0.98, 0.2, "position 0")
    text(ax, 3.02, 0.2, "position $n$")
    arrow(ax, (1.62, 0.5), (2.38, 0.5), connectionstyle="arc3,rad=-0.3", linewidth=1.6)
    text(ax, 2.0, 0.62, r"$\times\, e^{i n \theta_j}$")
    text(ax, 2.0, 2.72, "thin: three heads,  $z = k_j + i\\,k_{j+d/2}$")
    text(ax, 2.0, 3.12, "thick: a complex mix of the heads\nturns by the same angle", weight="bold")
    return fig


def draw_plane(ax, x, y, radius, heads, mixed):
    """Arrows of complex numbers from the middle of a circle."""
    from matplotlib.patches import Circle
    ax.add_patch(Circle((x, y), radius, facecolor="none", edgecolor="0.75"))
    for ends in (((x - radius, y), (x + radius, y)), ((x, y - radius), (x, y + radius))):
        ax.plot(*zip(*ends), color="0.8", linewidth=0.8)

    def point(z):
        return x + z.real, y - z.imag
    for i, z in enumerate(heads, 1):
        arrow(ax, (x, y), point(z), linewidth=1.2, color="#1f5fa8")
        text(ax, *point(z * (1 + 0.13 / abs(z))), str(i))
    arrow(ax, (x, y), point(mixed), linewidth=3.2, color=EXACT, mutation_scale=16)


# -------------------------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--measure", action="store_true", help="Compute the ranks of picture 3 before drawing.")
    add("--model", metavar="PATH", help="Folder of the model, for --measure.")
    add("--calibrate", metavar="FILE", help="Text for the loss metric, for --measure.")
    add("--kept", type=float, default=0.6, help="Fraction kept, for --measure. Default: 0.6.")
    add("--out", type=Path, default=HERE / "results", metavar="DIR", help="Default: results/ here.")
    add("--figures", type=Path, default=HERE / "figures", metavar="DIR",
        help="Default: figures/ here.")
    args = p.parse_args(argv)
    if args.measure:
        if not (args.model and args.calibrate):
            p.error("--measure needs --model PATH and --calibrate FILE")
        result = measure_ranks(args.model, args.calibrate, args.kept)
        path = args.out / f"ranks-{result['model']}.json"
        path.write_text(json.dumps(result) + "\n")
    pictures = {"token": token(), "bibranch": bibranch(), "commuting": commuting()}
    found = sorted(args.out.glob("ranks-*.json"))
    if found:
        pictures["ranks"] = ranks(json.loads(found[0].read_text()))
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, fig in pictures.items():
        fig.savefig(args.figures / f"method_{name}.png")
        print("drew", f"method_{name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
