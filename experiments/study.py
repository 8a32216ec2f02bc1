"""Shared by all tables and figures: a model and its texts, scores of caches, files, plotting style.

    python experiments/NAME.py --model PATH --text FILE --calibrate OTHER_FILE    measure and draw
    python experiments/NAME.py --plot-only         draw again, from the result files of all models

A script defines `measure(study)`, which returns rows (one dict per score), and `plot(found)`, which
receives {model: result} for all models measured so far and yields pairs of a name and a figure or
Markdown table. `run_all.py` runs all scripts on one model in one process, so that bases, metrics
and scores that several scripts need are computed once.

Scores are perplexities over the first --tokens tokens of a text in windows of min(1024, context),
in float32. Every query reads what it would read if the tokens came one by one
(`simulate_decoding` in cache.py). Bytes are those of the buffers for one window of text in a 16-bit
model, as in the papers; beside a float32 model, 4-bit codes would look twice as good. matplotlib is
imported only when something is drawn.
"""
import argparse
import contextlib
import functools
import json
import math
import re
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import lorc                                                        # noqa: E402
from runtime import jobs                                           # noqa: E402
from runtime.cli import BUNDLED_TEXT                                # noqa: E402
from runtime.commuting import commuting_basis                      # noqa: E402
from runtime.text import Tokenizer                                 # noqa: E402
import model                                                       # noqa: E402
from cache import GROUP, Basis, BiBranchCache, affine_codes        # noqa: E402
from record import provenance                                      # noqa: E402

CALIBRATION = 2**15       # tokens of --calibrate that second moments of inputs are taken over
LOSS_TOKENS = 2**17       # default of --loss-tokens
AT_ONCE = {"cuda": 2**14}   # tokens of windows that are scored in one batch; elsewhere one window
SINKS = 4                 # positions of each window that neither of them uses


# Bytes -------------------------------------------------------------------------------------------

def shape_only(config):
    """A model without memory, on torch's meta device, in 16 bits."""
    with torch.device("meta"):
        return model.Llama(config).bfloat16()


def held(llama, kind, ranks, capacity, B=1, everywhere=False, **bibranch):
    """Bytes of all buffers of the caches that lorc.new_caches makes for these (d_k, d_v).

    everywhere: a layer of full rank has a basis too, as quantization alone needs. With 3 or 2 bits
    the codes are counted packed, 32 codes in 12 or 8 bytes; cache.py can only pack 4 bits.
    """
    d_max, bits = llama.config.kv_width, bibranch.get("bits", 16)

    def basis(d_c):
        new = llama.embed.weight.new_empty
        return Basis(new((d_c, d_max)), new((d_max, d_c)))
    bases = [None if pair == (d_max, d_max) and not everywhere else tuple(map(basis, pair))
             for pair in ranks]
    if bits < 4:
        bibranch = bibranch | {"bits": 4}
    caches = lorc.new_caches(llama, kind, capacity, bases, B, **bibranch)
    total = sum(cache.nbytes for cache in caches)
    if bits < 4:
        codes = sum(store.packed.nbytes for cache in caches if isinstance(cache, BiBranchCache)
                    for store in (cache.c_k, cache.c_v))
        total -= codes * (4 - bits) // 4
    return total


# Fewer than four bits ----------------------------------------------------------------------------

@contextlib.contextmanager
def rounded_to(bits):
    """Within it, caches of 4 bits round to `bits` bits (3 or 2) and pack as before. 4 and 16 do not
    change anything."""
    def fewer(c, _=4):
        return affine_codes(c, bits)
    with patch("cache.affine_codes", fewer) if bits < 4 else contextlib.nullcontext():
        yield


# Measuring ---------------------------------------------------------------------------------------

class Study:
    """One model on its texts. Bases, metrics and scores are computed once and then remembered."""

    def __init__(self, args):
        self.args, self.begun = args, time.perf_counter()
        self.name = Path(args.model).resolve().name
        self.llama = model.load(args.model, torch.float32, args.device)
        self.config = self.llama.config
        self.tokenizer = Tokenizer(args.model, self.config)
        self.context = min(1024, self.config.context)
        self.text, self.calibration = (self.encode(args.text, args.tokens),
                                       self.encode(args.calibrate))
        self.second = self.encode(args.second, args.tokens) if args.second else None
        self.length = min(self.context, len(self.text))                  # of one window of text
        self.shape = shape_only(self.config)
        self.weights = [(layer.attn.Wk.weight, layer.attn.Wv.weight) for layer in self.llama.layers]

    def encode(self, path, n=None):
        """The first n token ids of a text file. Raises UserError when there are fewer than two."""
        tokens = torch.tensor(self.tokenizer.encode(jobs.read_text(path))[:n])
        if len(tokens) < 2:
            raise model.UserError(f"{path} is too short; give a text of at least two tokens")
        return tokens.to(self.llama.embed.weight.device)

    def windows(self, tokens):
        """How many windows of the model's context hold this many tokens."""
        return -(-tokens // self.context)

    @functools.cache
    def moments(self, basis, held_out=False):
        """C of each layer's inputs for lorc's --basis; None for plain SVD. held_out: of --text."""
        if basis == "svd":
            return [None] * self.config.layers
        if basis == "norm":
            return lorc.norm_moments(self.llama)
        if basis == "query":
            return self.moments("whitened")
        tokens = CALIBRATION
        if basis == "whitened, more text":
            basis, tokens = "whitened", self.args.loss_tokens
        return lorc.calibrated_moments(self.llama, self.text if held_out else self.calibration,
                                       basis, SINKS, self.context, self.windows(tokens))

    @functools.cache
    def fisher_factors(self, bundled=False):
        """(C, M) of the keys and of the values of each layer, in the metric of the loss.

        bundled: from 32 windows of the text that comes with the project.
        """
        if bundled:
            return lorc.fisher_factors(self.llama, self.encode(BUNDLED_TEXT), sinks=SINKS,
                                       context=self.context, windows=32)
        return lorc.fisher_factors(self.llama, self.calibration, sinks=SINKS,
                                   context=self.context, windows=self.windows(self.args.loss_tokens))

    @functools.cache
    def loss_ranks(self, kept, bundled=False):
        """(d_k, d_v) of each layer by one sort in the metric of the loss."""
        return lorc.sort_ranks(self.fisher_factors(bundled), kept)

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
        """(d_k, d_v) of each layer, as lorc.make_plan has them. layers: all others stay full.

        Raises UserError when no d_min gives `kept`.
        """
        d_max, L = self.config.kv_width, self.config.layers
        if layers is not None:                      # `kept` is then of each of these layers alone
            return [(round(kept * d_max),) * 2 if i in layers else (d_max, d_max) for i in range(L)]
        return lorc.make_plan(self.log_kappas(), d_max, kept, schedule=schedule, skip=skip,
                              split=split, pairs=pairs).ranks

    @functools.cache
    def full_rank(self, basis):
        """Bases of full rank for keys and values in each layer, from which lower ranks are cut.

        `identity` stores keys and values as they are; `query` is the metric of metric.py.
        """
        eye = torch.eye(self.config.kv_width).to(self.weights[0][0])
        if basis == "identity":
            return [(Basis(eye, eye),) * 2] * self.config.layers
        if basis in ("loss", "loss, bundled text"):
            return [[lorc.basis(eye, len(eye), *factors) for factors in pair]
                    for pair in self.fisher_factors(basis != "loss")]
        moments, metrics = self.moments(basis), [(None, None)] * self.config.layers
        if basis == "query":
            from metric import query_metrics        # here, because metric.py imports this module
            metrics = query_metrics(self.llama, moments)
        return [[lorc.basis(W, len(W), C, M) for W, M in zip(pair, Ms)]
                for pair, C, Ms in zip(self.weights, moments, metrics)]

    def bases(self, ranks, basis):
        """Bases of these ranks, for lorc.new_caches; None where a layer is full.

        `random` is CSKV's random start: down and up are unrelated. With `commuting` the values'
        bases are `whitened`.
        """
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
            whole = self.full_rank("whitened" if basis == "commuting" else basis)[layer][i]
            return Basis(whole.down[:d_c].contiguous(), whole.up[:, :d_c].contiguous())
        return [None if (d_k, d_v) == (d_max, d_max) and basis != "identity"
                else (cut(d_k, layer, 0), cut(d_v, layer, 1))
                for layer, (d_k, d_v) in enumerate(ranks)]

    def compressed(self, kept, basis, ranks=None, **plan):
        """Ranks and bases. ranks: these instead of the plan's. `loss, sorted` brings its own ranks,
        and so does `loss, bundled text`."""
        if basis == "loss, sorted":
            ranks, basis = self.loss_ranks(kept), "loss"
        if basis == "loss, bundled text":
            ranks = self.loss_ranks(kept, bundled=True)
        ranks = ranks or self.plan(kept, **plan)
        return ranks, self.bases(ranks, basis)

    def caches(self, kind, bases, capacity, B=1, **bibranch):
        """Empty caches for this model that read as a token-by-token run would."""
        if kind == "bibranch":
            bibranch |= {"simulate_decoding": True}
        return lorc.new_caches(self.llama, kind, capacity, bases, B, **bibranch)

    def perplexity(self, text, make_caches, bits=16, rounding=None):
        """rounding: a function of latents that replaces cache.round_trip."""
        replaced = (patch("cache.round_trip", lambda c, _bits: rounding(c)) if rounding
                    else contextlib.nullcontext())
        whole = len(text) // self.context * self.context
        windows = text[:whole].view(-1, self.context)
        parts = [*windows.split(max(1, AT_ONCE.get(text.device.type, 0) // self.context))]
        if len(text) - whole > 1:
            parts.append(text[None, whole:])
        with torch.no_grad(), rounded_to(bits), replaced:
            nats = sum(self.nats(x, make_caches(x.shape[1], len(x))) for x in parts)
        return math.exp(min(nats / sum(x[:, 1:].numel() for x in parts), 700.0))

    def nats(self, tokens, caches):
        """Sum of -ln p over all tokens (B, T) but the first of each sequence."""
        h, total = self.llama.hidden(tokens, caches), 0.0
        for h, y in zip(h[:, :-1].split(64, 1), tokens[:, 1:].split(64, 1)):
            logits = self.llama.head(h).flatten(0, 1)
            total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
        return total

    def score(self, ranks, bases, kind, rounding=None, second=False, **bibranch):
        """{perplexity, bytes, full_bytes} of one cache; second: of --second, too, if it is given.
        """
        bits = bibranch.get("bits", 16)
        in_code = bibranch | {"bits": max(4, bits)} if bibranch else {}    # see rounded_to

        def make(capacity, B):
            return self.caches(kind, bases, capacity, B, **in_code)
        texts = {"perplexity": self.text, "second_perplexity": self.second if second else None}
        found = {name: self.perplexity(text, make, bits, rounding)
                 for name, text in texts.items() if text is not None}
        everywhere = kind != "full" and None not in bases
        return found | self.bytes(kind, ranks, everywhere=everywhere, **bibranch)

    def bytes(self, kind, ranks, **options):
        """Of the caches for one window of text, and of full ones: {bytes, full_bytes}."""
        return {"bytes": held(self.shape, kind, ranks, self.length, **options),
                "full_bytes": held(self.shape, "full", ranks, self.length)}

    def row(self, label, kept=1.0, basis="svd", cache="compressed", sinks=SINKS, window=32,
            bits=16, rounding=None, ranks=None, second=False, **plan):
        """One line of a result: the setting and its score. plan: schedule, skip, split, layers.

        ranks: these instead of the plan's. second: score --second, too.
        """
        ranks, bases = self.compressed(kept, basis, ranks, **plan)
        bibranch = {"sinks": sinks, "window": window, "bits": bits} if cache == "bibranch" else {}
        found = self.score(ranks, bases, cache, rounding, second, **bibranch)
        numbers = sum(map(sum, ranks)) / (2 * len(ranks) * self.config.kv_width)
        self.say(f"{label:34s} kept {numbers:.3f}  perplexity {found['perplexity']:.4f}  "
                 f"{found['bytes'] / found['full_bytes']:.1%} of the bytes")
        return {"label": label, "wanted": kept, "kept": round(numbers, 5), "basis": basis,
                "cache": cache} | plan | bibranch | found

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

    def about(self, script):
        """What the result file of one script says before its rows.

        The command is that of the script alone, also when run_all.py ran it: they share all flags.
        """
        c, args = self.config, self.args
        about = {"model": self.name, "layers": c.layers, "heads": c.heads, "kv_heads": c.kv_heads,
                 "head_dim": c.head_dim, "width": c.width,
                 "parameters": sum(p.numel() for p in self.llama.parameters()),
                 "text": Path(args.text).name, "calibrated_on": Path(args.calibrate).name,
                 "tokens": len(self.text), "context": self.context}
        if args.second:
            about |= {"second_text": Path(args.second).name, "second_tokens": len(self.second)}
        about |= provenance(self.llama.embed.weight.device.type, args.commit)
        about["command"] = own_command(about["command"], script)
        return about


def own_command(command, script):
    """The command that runs one script alone, from run_all.py's, whose flags are the same."""
    alone = re.sub(r" (--only \S+|--measure-only)", "", command)
    return alone.replace("run_all.py", f"{script}.py")


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
         study.about(name) | {"seconds": round(time.perf_counter() - begun, 1), "rows": rows})


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


def command_line(about, several):
    p = argparse.ArgumentParser(description=about,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default=str(HERE.parent / "tiny"), help="Folder of the model. Default: tiny/.")
    add("--text", metavar="FILE", help="Text to score.")
    add("--second", metavar="FILE", help="A text of another kind, scored too.")
    add("--calibrate", metavar="FILE", help="Another text, for bases and metrics that need one.")
    add("--loss-tokens", type=int, default=LOSS_TOKENS, metavar="N", help="Tokens of --calibrate that"
        " the metric of the loss is measured on. Default: 131072.")
    add("--data", type=Path, metavar="DIR", help="Folder of the questions of recall.py and tasks.py"
        " (longeval/, boolq/, openbookqa/, gsm8k/); without it these two are left out.")
    add("--tokens", type=int, default=2**14, metavar="N", help="Tokens to score. Default: 16384.")
    add("--out", type=Path, metavar="DIR", help="Folder of the result files. Default: results/ here.")
    add("--figures", type=Path, metavar="DIR", help="Folder of pictures and tables. Default: the"
        " folder of --out if it is given, otherwise figures/ here.")
    if several:
        add("--only", metavar="A,B", help="Run these scripts only. Default: all.")
    add("--plot-only", action="store_true", help="Measure nothing; draw from the files in --out.")
    add("--measure-only", action="store_true", help="Draw nothing: no matplotlib is needed.")
    add("--device", help="cpu or cuda. Default: cuda where there is one.")
    add("--commit", help="Written into the JSON. Default: what git says.")
    return p


def chosen(scripts, p, args):
    """The scripts that --only names and that have what they need. Ends the program if there are
    none; one that sets NEEDS_DATA is left out of several when --data is not given."""
    names = {Path(script.__file__).stem: script for script in scripts}
    wanted = args.only.split(",") if getattr(args, "only", None) else list(names)
    if unknown := [name for name in wanted if name not in names]:
        p.error(f"--only: there is no script {unknown[0]}; there are {', '.join(names)}")
    scripts = [names[name] for name in wanted]
    if not args.plot_only and not (args.text and args.calibrate):
        p.error("give --text FILE and --calibrate OTHER_FILE, or --plot-only")
    if not args.plot_only and not args.data:
        scripts = [script for script in scripts if not getattr(script, "NEEDS_DATA", False)]
        if not scripts:
            p.error("give --data DIR, the folder of the questions")
    return scripts


def main(*scripts, argv=None):
    """The command line of one script, or of several that share a study. Returns the exit status."""
    several = len(scripts) > 1
    p = command_line("Every table and figure." if several else scripts[0].__doc__, several)
    args = p.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.figures = args.figures or args.out or HERE / "figures"
    args.out = args.out or HERE / "results"
    scripts = chosen(scripts, p, args)
    try:
        study = None if args.plot_only else Study(args)
        for script in scripts if study else ():
            measure_and_save(script, study)
        for script in scripts if not args.measure_only else ():
            draw(script, args)
    except (model.UserError, OSError) as e:
        print(f"{p.prog}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


# Drawing -----------------------------------------------------------------------------------------

FLOOR = 0.1     # percent above the full cache's perplexity; what is less is drawn here
TEXTS = {"wiki.test.raw": "WikiText-2", "stories.txt": "TinyStories",
         "tinystories_197k.txt": "TinyStories"}

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


def percent_above(perplexity, full, key="perplexity"):
    """A table's cell: how much a perplexity is above that of the full cache's row, in percent."""
    if perplexity is None:
        return "–"
    above = 100 * (perplexity / full[key] - 1)
    return f"{above:+.2f}" if abs(above) < 10 else f"{above:+,.0f}"


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
