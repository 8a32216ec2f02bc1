"""What every table and figure shares: a model and its texts, scores of caches, files, one style.

    python experiments/NAME.py --model PATH --text FILE --calibrate OTHER_FILE    measure and draw
    python experiments/NAME.py --plot-only         draw again, from the result files of all models

A script has `measure(study)`, which returns rows (one dict a score), and `plot(found)`, which is
given {model: result} of all models measured so far and yields (name, figure or Markdown table).
`run_all.py` runs all scripts on one model in one process: what they share is computed once.

Scores are perplexities over the first --tokens tokens of --text in windows of min(1024, context),
in float32, every query seeing what a token-by-token run would show it (`simulate_decoding` in cache.py).
Bytes are those of the buffers for one such window in a 16-bit model, the papers' measure: 4-bit
codes would look twice as good beside float32. Nothing here needs matplotlib until it draws.
"""
import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import lorc                                                        # noqa: E402
from runtime import jobs as running
from runtime.commuting import commuting_basis
from runtime.scoring import negative_log_likelihood
from runtime.text import Tokenizer
import model                                                       # noqa: E402
from cache import Basis, round_trip                                # noqa: E402
from record import provenance                                      # noqa: E402

CALIBRATION = 2**15     # tokens of --calibrate that second moments are taken over
SINKS = 4               # positions of each window that they leave out


# Bytes -------------------------------------------------------------------------------------------

def shape_only(config):
    """A model without memory, on torch's meta device, in 16 bits."""
    with torch.device("meta"):
        return model.Llama(config).bfloat16()


def held(llama, kind, ranks, capacity, B=1, **bibranch):
    """Bytes of all buffers of the caches that lorc.new_caches makes for these (d_k, d_v)."""
    d_max = llama.config.kv_width

    def basis(d_c):
        new = llama.embed.weight.new_empty
        return Basis(new((d_c, d_max)), new((d_max, d_c)))
    bases = [None if pair == (d_max, d_max) else tuple(map(basis, pair)) for pair in ranks]
    caches = lorc.new_caches(llama, kind, capacity, bases, B, **bibranch)
    return sum(cache.nbytes for cache in caches)


# Measuring ---------------------------------------------------------------------------------------

class Study:
    """One model on its texts. Eigenvectors and scores are computed once, and then remembered."""

    def __init__(self, args):
        self.args, self.begun = args, time.perf_counter()
        self.name = Path(args.model).resolve().name
        self.llama = model.load(args.model, torch.float32, args.device)
        self.config, tokenizer = self.llama.config, Tokenizer(args.model, self.llama.config)
        self.context = min(1024, self.config.context)
        self.text, self.calibration = (
            torch.tensor(tokenizer.encode(running.read_text(path))[:n], device=args.device)
            for path, n in ((args.text, args.tokens), (args.calibrate, CALIBRATION)))
        if min(len(self.text), len(self.calibration)) < 2:
            raise model.UserError("--text or --calibrate is too short; give at least two tokens")
        self.length = min(self.context, len(self.text))                  # of one window of text
        self.shape = shape_only(self.config)
        self.weights = [(layer.attn.Wk.weight, layer.attn.Wv.weight) for layer in self.llama.layers]

    @functools.cache
    def moments(self, basis, held_out=False):
        """C of each layer's inputs, as --basis has it; None for plain SVD."""
        text, windows = self.text if held_out else self.calibration, -(-CALIBRATION // self.context)
        return {"svd": lambda: [None] * self.config.layers,
                "norm": lambda: lorc.norm_moments(self.llama),
                }.get(basis, lambda: lorc.calibrated_moments(self.llama, text, basis, SINKS,
                                                             self.context, windows))()

    @functools.cache
    def spectra(self, basis):
        """(lam, U) of Wk and of Wv in each layer: lorc.spectrum."""
        return [[lorc.spectrum(W, C) for W in pair]
                for pair, C in zip(self.weights, self.moments(basis))]

    @functools.cache
    def log_kappas(self):
        """ln kappa(Wk), ln kappa(Wv) of each layer: Eq. 10."""
        return [tuple(map(lorc.log_kappa, pair)) for pair in self.weights]

    def plan(self, kept, schedule="uniform", skip=0, split=0.0, layers=None, pairs=False):
        """(d_k, d_v) of each layer, as lorc.compress has them. layers: the others stay whole.

        Raises UserError when no d_min gives `kept`.
        """
        d_max, L = self.config.kv_width, self.config.layers
        if layers is not None:                      # `kept` is then of each of these layers alone
            return [(round(kept * d_max),) * 2 if i in layers else (d_max, d_max) for i in range(L)]
        log_tilde = lorc.log_kappa_tilde(self.log_kappas())

        def ranks_of(d_min):
            d_c = lorc.compressed_dimension(log_tilde, d_max, d_min, schedule)
            return lorc.round_ranks(d_c, [i < skip for i in range(L)], d_max, split, pairs)
        return ranks_of(lorc.solve_d_min(kept, ranks_of, d_max))

    def bases(self, ranks, basis):
        """Bases of these ranks, for lorc.new_caches. `random` is CSKV's: up and down unrelated."""
        d_max, generator = self.config.kv_width, torch.Generator().manual_seed(0)

        def cut(d_c, layer, i):
            if basis == "random":
                down, up = (torch.randn(shape, generator=generator).to(self.weights[0][0])
                            * shape[1] ** -0.5 for shape in ((d_c, d_max), (d_max, d_c)))
                return Basis(down, up)
            if basis == "commuting" and i == 0:
                attn, C = self.llama.layers[layer].attn, self.moments("whitened")[layer]
                return commuting_basis(attn.Wk.weight, d_c, self.config.head_dim, C,
                                       attn.Wq.weight)
            of = "whitened" if basis == "commuting" else basis
            U = self.spectra(of)[layer][i][1][:, :d_c].to(self.weights[0][0]).contiguous()
            return Basis(U.T, U)
        return [None if (d_k, d_v) == (d_max, d_max) else (cut(d_k, layer, 0), cut(d_v, layer, 1))
                for layer, (d_k, d_v) in enumerate(ranks)]

    @functools.cache
    def score(self, ranks, basis, kind, sinks, window, bits, rounding):
        """Perplexity under one cache and the bytes that it holds: {perplexity, bytes, full_bytes}.

        rounding stands in for cache.round_trip, what 4 bits do to latents.
        """
        bases = self.bases(ranks, basis) if kind != "full" else None
        options = {"sinks": sinks, "window": window, "bits": bits}

        def make(capacity):
            return lorc.new_caches(self.llama, kind, capacity, bases, simulate_decoding=True,
                                   **options)
        with torch.inference_mode(), patch("cache.round_trip", lambda c, bits: rounding(c)):
            nats, n = negative_log_likelihood(self.llama, self.text, self.context, make)
        return {"perplexity": math.exp(min(nats / n, 700.0))} | self.bytes(kind, ranks, **options)

    def bytes(self, kind, ranks, **options):
        """Of the caches for one window of text, and of full ones: {bytes, full_bytes}."""
        return {"bytes": held(self.shape, kind, ranks, self.length, **options),
                "full_bytes": held(self.shape, "full", ranks, self.length)}

    def row(self, label, kept=1.0, basis="svd", cache="compressed", sinks=4, window=32, bits=16,
            rounding=round_trip, **plan):
        """One line of a result: the setting and its score. plan: schedule, skip, split, layers."""
        ranks = tuple(self.plan(kept, **plan))
        found = self.score(ranks, basis, cache, sinks, window, bits, rounding)
        numbers = sum(map(sum, ranks)) / (2 * len(ranks) * self.config.kv_width)
        setting = {"label": label, "wanted": kept, "kept": round(numbers, 5), "basis": basis,
                   "cache": cache} | plan
        setting |= {"sinks": sinks, "window": window, "bits": bits} if cache == "bibranch" else {}
        self.say(f"{label:28s} kept {numbers:.3f}  perplexity {found['perplexity']:.4f}  "
                 f"{found['bytes'] / found['full_bytes']:.1%} of the bytes")
        return setting | found

    def full(self):
        """The row of the full cache."""
        return self.row("full", cache="full")

    def sweep(self, label, kepts, **setting):
        """Rows for each of `kepts` that the schedule can reach."""
        rows = []
        for kept in kepts:
            try:
                rows.append(self.row(label, kept, **setting))
            except model.UserError:
                self.say(f"{label:28s} kept {kept:.3f}  cannot be reached")
        return rows

    def say(self, line):
        """A line of progress with the seconds so far."""
        print(f"{time.perf_counter() - self.begun:6.0f} s  {self.name}  {line}", flush=True)

    def about(self):
        """What a result file says before its rows."""
        c, args = self.config, self.args
        return {"model": self.name, "layers": c.layers, "heads": c.heads, "kv_heads": c.kv_heads,
                "head_dim": c.head_dim, "width": c.width,
                "parameters": sum(p.numel() for p in self.llama.parameters()),
                "text": Path(args.text).name, "calibrated_on": Path(args.calibrate).name,
                "tokens": len(self.text), "context": self.context,
                } | provenance(self.llama.embed.weight.device.type, args.commit)


# Files -------------------------------------------------------------------------------------------

def save(path, result):
    """Write a result as JSON, one row a line."""
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    about = {k: v for k, v in result.items() if k != "rows"}
    head = json.dumps(about, indent=1)[2:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{head},\n \"rows\": [\n{rows}\n ]\n}}\n")


def results(folder, script):
    """{model: result} of every result file of this script, the smallest model first."""
    found = [json.loads(path.read_text()) for path in Path(folder).glob(f"{script}-*.json")]
    return {r["model"]: r for r in sorted(found, key=lambda r: r["parameters"])}


def measure_and_save(script, study):
    """Run one script's `measure` and write its result. script: the imported module."""
    begun, name = time.perf_counter(), Path(script.__file__).stem
    study.say(f"{name}: {script.__doc__.splitlines()[0]}")
    rows = script.measure(study)
    save(study.args.out / f"{name}-{study.name}.json",
         study.about() | {"seconds": round(time.perf_counter() - begun, 1), "rows": rows})


def draw(script, args):
    """What one script's `plot` makes of its results."""
    found = results(args.out, Path(script.__file__).stem)
    keep(script.plot(found) if found else (), args.figures)


def keep(drawn, folder):
    """Write pairs of a name and a picture, as PNG, or a table, as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, it in drawn:
        if isinstance(it, str):
            (folder / f"{name}.md").write_text(it)
        else:
            it.savefig(folder / f"{name}.png", bbox_inches="tight")
        print("drew", name, flush=True)


def command_line(about):
    p = argparse.ArgumentParser(description=about,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default=str(HERE.parent / "tiny"), help="Folder of the model. Default: tiny/.")
    add("--text", metavar="FILE", help="Text to score.")
    add("--calibrate", metavar="FILE", help=f"Another text; {CALIBRATION} tokens of it are used.")
    add("--tokens", type=int, default=2**14, metavar="N", help="Tokens to score. Default: 16384.")
    add("--out", type=Path, default=HERE / "results", metavar="DIR", help="Default: results/ here.")
    add("--figures", type=Path, default=HERE / "figures", metavar="DIR",
        help="Default: figures/ here.")
    add("--plot-only", action="store_true", help="Measure nothing; draw from the files in --out.")
    add("--measure-only", action="store_true", help="Draw nothing: no matplotlib is needed.")
    add("--device", help="cpu or cuda. Default: cuda where there is one.")
    add("--commit", help="Written into the JSON. Default: what git says.")
    return p


def main(*scripts, argv=None):
    """The command line of one script, or of several that share a study. Returns the exit status."""
    None
    p = command_line(scripts[0].__doc__ if len(scripts) == 1 else "Every table and figure.")
    args = p.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not args.plot_only and not (args.text and args.calibrate):
        p.error("give --text FILE and --calibrate OTHER_FILE, or --plot-only")
    try:
        study = None if args.plot_only else Study(args)
        for script in scripts:
            if study:
                measure_and_save(script, study)
        for script in scripts if not args.measure_only else ():
            draw(script, args)
    except (model.UserError, OSError) as e:
        print(f"{p.prog}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


# Drawing -----------------------------------------------------------------------------------------

FLOOR = 0.1     # percent above the full cache's perplexity; what is less is drawn here

# Told apart in grey, too: each has its own marker and dashes
LOOKS = [("#111111", "o", "-"), ("#d95f02", "s", "--"), ("#1f5fa8", "^", "-."),
         ("#4dac8f", "D", ":"), ("#b03a8c", "v", (0, (5, 1, 1, 1, 1, 1))),
         ("#8a6d1f", "P", (0, (1, 1))), ("#777777", "X", (0, (7, 2)))]


def pyplot():
    """matplotlib.pyplot in this project's style; imported only when something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7, "axes.grid": True,
        "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.spines.top": False,
        "axes.spines.right": False, "lines.linewidth": 1.3, "lines.markersize": 3.8,
        "savefig.dpi": 135, "legend.frameon": False, "axes.axisbelow": True})
    return plt


def panels(found, xlabel, ylabel, rows=1, sharey=False, height=2.4):
    """A figure with one column a model, titled with it: (figure, axes of shape (rows, models))."""
    n = len(found)
    fig, axes = pyplot().subplots(rows, n, figsize=(0.6 + 2.5 * n, 0.5 + height * rows),
                                  squeeze=False, sharey=sharey, layout="constrained")
    for ax, (name, r) in zip(axes[0], found.items()):
        ax.set_title(f"{name}\n{r['layers']} layers, {r['kv_heads']} KV of {r['heads']} heads")
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    return fig, axes


def lines(ax, rows, x, y, pairs=False):
    """One line for each label, in the order they come. x, y: keys of a row, or functions of it.

    pairs: every second label has the look of the one before it, hollow and dashed.
    """
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        points = sorted((read(row, x), read(row, y)) for row in rows if row["label"] == label)
        color, marker, dashes = LOOKS[(i // 2 if pairs else i) % len(LOOKS)]
        hollow = {"markerfacecolor": "white", "linestyle": "--"} if pairs and i % 2 else {}
        ax.plot(*zip(*points), color=color, marker=marker, label=label,
                **{"linestyle": "-" if pairs else dashes} | hollow)


def read(row, key):
    return key(row) if callable(key) else row[key]


def split_full(rows):
    """The full cache's row, and all others."""
    return (next(row for row in rows if row["cache"] == "full"),
            [row for row in rows if row["cache"] != "full"])


def scores(ax, rows, x, pairs=False):
    """Perplexity, on a logarithmic axis, against x; the full cache's as a grey line across."""
    full, others = split_full(rows)
    lines(ax, others, x, "perplexity", pairs)
    ax.axhline(full["perplexity"], color="0.6", linewidth=2.5, zorder=0, label="full cache")
    ax.set_yscale("log")
    plain_numbers(ax.yaxis)


def losses(ax, rows, x):
    """Perplexity above the full cache's, in percent, on a logarithmic axis that ends at FLOOR."""
    full, others = split_full(rows)
    lines(ax, others, x, lambda row: max(FLOOR, 100 * (row["perplexity"] / full["perplexity"] - 1)))
    ax.set(yscale="log", ylim=(0.8 * FLOOR, None))
    plain_numbers(ax.yaxis)


def plain_numbers(axis):
    """1, 10, 100 instead of powers on a logarithmic axis, and more of them where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    subs = (1,) if high > 300 * low else (1, 3) if high > 30 * low else (1, 2, 5)
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)) if high < 4 * low
                           else LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.7g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(fig, ax, columns=None):
    """One legend above all panels."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=columns or len(labels))


def markdown(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
