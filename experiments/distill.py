"""Beyond the papers: train the bases of all layers together, on the model's own predictions.

CSKV trains each layer to rebuild its keys and values, which has a closed form [E30]. Here `down`
and `up` of all layers are trained so that the next-token distribution stays that of the full cache:
the loss is the KL divergence from it, with every query reading what it would read in token-by-token
decoding through a bi-branch cache. With --bits 4 the latents are rounded while training. The
weights of the model do not change.

    python experiments/distill.py --model PATH --text TRAIN --kept 0.2 --out DIR --test TEST
    python lorc.py --model PATH --bases DIR --cache bibranch --perplexity TEST

In the order of events:
    read_windows         texts -> training windows; the last tenth of each text is held out
    start                bases and ranks of the loss metric, as in lorc.compress_for_loss
    Factor               one basis, scaled so that all directions matter equally
    divergence, train    the loss; AdamW with a cosine schedule, checkpoints
    measure              full cache, start and trained bases, on texts that were not trained on,
                         with 16 and with 4 bits

If a run was interrupted, the same command continues it from DIR/checkpoint.pt. Without --model it
runs on tiny/, on a CPU.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lorc                                                        # noqa: E402
from runtime import jobs as running, saved_bases
from runtime.scoring import negative_log_likelihood
from runtime.text import Tokenizer
import model                                                       # noqa: E402
import recall                                                      # noqa: E402
from cache import Basis                                            # noqa: E402
from record import provenance                                      # noqa: E402

SINKS = 4             # BiBranchCache's default: these positions are exact
CALIBRATION = 128     # windows that the start is measured on
LINES = 10            # of a record for recall


def log(*words):
    """Print a line of progress with the seconds since the start."""
    print(f"{time.perf_counter() - START:6.0f} s ", *words, flush=True)


# Text --------------------------------------------------------------------------------------------

def encode(tokenizer, path, device):
    return torch.tensor(tokenizer.encode(running.read_text(path)), device=device)


def read_windows(tokenizer, paths, context, device):
    """Texts in windows (n, context): those to train on, and the last tenth of each text."""
    train, held = [], []
    for path in paths:
        tokens = encode(tokenizer, path, device)
        windows = tokens[:len(tokens) // context * context].view(-1, context)
        if len(windows) < 2:
            raise model.UserError(f"{path} has {len(tokens)} tokens; {2 * context} are needed")
        cut = len(windows) - max(1, len(windows) // 10)
        train.append(windows[:cut])
        held.append(windows[cut:])
    return torch.cat(train), torch.cat(held)


# Where training starts ---------------------------------------------------------------------------

def bibranch(llama, capacity, bases, bits, B=1):
    """Caches for a whole text in the decode regime."""
    return lorc.new_caches(llama, "bibranch", capacity, bases, B, bits=bits, simulate_decoding=True)


class Factor(nn.Module):
    """One basis, as two trained matrices A and B: down = A L^-1 and up = R^-T B.

    C = L L^T and M = R R^T are the factors of lorc.fisher_factors. The best map of rank d_c is then
    R^-T U S V^T L^-1, with a truncated singular value decomposition U S V^T of R^T L (the proof of
    theory.expected_error). This is the start: A = S^1/2 V^T and B = U S^1/2. A step of AdamW
    changes all entries of A and B by about the same amount, and the loss by about the same amount
    in every direction. Entries of down and up would not have this property, because keys and values
    are large in few directions and small in most.
    """

    def __init__(self, C, M, d_c):
        super().__init__()
        L, R = torch.linalg.cholesky(C.double()), torch.linalg.cholesky(M.double())
        U, S, Vt = torch.linalg.svd(R.T @ L)
        S = S[:d_c, None]
        scale = S.square().mean().sqrt()                    # moved to up, so that S is about 1
        self.A = nn.Parameter(((S / scale).sqrt() * Vt[:d_c]).float())
        self.B = nn.Parameter((U[:, :d_c] * (S / scale).sqrt().T).float())
        self.register_buffer("before", L.inverse().float(), persistent=False)
        self.register_buffer("after", (scale * R.T.inverse()).float(), persistent=False)

    def forward(self):
        return Basis(self.A @ self.before, self.after @ self.B)


def start(llama, windows, kept):
    """The plan of the loss metric, and a Factor for keys and for values of each layer that is not
    full."""
    factors = lorc.fisher_factors(llama, windows.flatten(), SINKS, context=windows.shape[1],
                                  windows=len(windows))
    ranks, kappas = lorc.sort_ranks(factors, kept), lorc.log_kappas(llama)
    d_max = llama.config.kv_width
    plan = lorc.Plan(kappas, lorc.log_kappa_tilde(kappas), ranks, d_max)
    layers = [nn.ModuleList(Factor(C, M, d_c) for (C, M), d_c in zip(pair, dims)
                            if dims != (d_max, d_max)) for pair, dims in zip(factors, ranks)]
    return plan, nn.ModuleList(layers)


def bases_of(factors):
    """The present factors as bases for lorc.new_caches."""
    return [tuple(f() for f in pair) or None for pair in factors]


# Training ----------------------------------------------------------------------------------------

def divergence(llama, x, bases, bits):
    """KL(full model || compressed) of the next token: mean nats over windows x (B, T)."""
    B, T = x.shape
    with torch.no_grad():
        full = llama(x, lorc.new_caches(llama, "full", T, B=B)).log_softmax(-1)
    ours = llama(x, bibranch(llama, T, bases, bits, B)).log_softmax(-1)
    return F.kl_div(ours, full, log_target=True, reduction="sum") / x.numel()


@torch.no_grad()
def validate(llama, held, factors, args):
    """The divergence over all windows held out."""
    bases, parts = bases_of(factors), held.split(args.batch)
    return sum(divergence(llama, x, bases, args.bits).item() * len(x) for x in parts) / len(held)


def batch(windows, step, args):
    """The windows (B, T) of one step. Each epoch has its own order, which depends on --seed."""
    epoch, i = divmod(step, max(1, len(windows) // args.batch))
    generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
    return windows[torch.randperm(len(windows), generator=generator)[i * args.batch:][:args.batch]]


def train(llama, factors, windows, held, args):
    """Train `factors` and set them to the best of the run. Returns the run's curve and seconds.

    The learning rate warms up over 10 steps and falls along a cosine to zero with the steps or with
    the minutes, whichever run out first.
    """
    optimizer = torch.optim.AdamW(factors.parameters(), args.lr, (0.9, 0.95), weight_decay=0)
    run = resume(factors, optimizer, args)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")          # TF32 on a GPU, while training only
    begun, losses = time.perf_counter() - run["seconds"], []
    while True:
        run["seconds"] = time.perf_counter() - begun
        progress = max(run["step"] / args.steps, run["seconds"] / (60 * args.minutes))
        due = run["step"] % args.every == 0 or progress >= 1
        if due and run["step"] != run["noted"]:
            add_validation(run, losses, validate(llama, held, factors, args), factors)
            save_checkpoint(run, factors, optimizer, args)
            losses = []
        if progress >= 1:
            factors.load_state_dict(run["best"])
            torch.set_float32_matmul_precision(precision)
            return run["curve"], run["seconds"]
        for group in optimizer.param_groups:
            warm = min(1, (run["step"] + 1) / 10)
            group["lr"] = args.lr * warm * (1 + math.cos(math.pi * progress)) / 2
        x = batch(windows, run["step"], args)
        loss = divergence(llama, x, bases_of(factors), args.bits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        run["step"] += 1


def add_validation(run, losses, held, factors):
    """Add a validation to the curve, and keep a copy of the factors if it is the best so far."""
    loss = torch.stack(losses).mean().item() if losses else None   # none before the first step
    point = {"step": run["step"], "seconds": run["seconds"], "train": loss, "held": held}
    run["curve"].append(point)
    run["noted"] = run["step"]
    if held < run["best_held"]:
        run["best"] = {name: p.detach().clone() for name, p in factors.state_dict().items()}
        run["best_held"] = held
    log(f"step {run['step']:4d}  KL {loss or held:.5f}  held out {held:.5f}"
        f"  ({run['seconds']:.0f} s of training)")


def settings(args):
    names = ("model", "text", "kept", "bits", "steps", "batch", "context", "lr", "seed")
    return {name: getattr(args, name) for name in names}


def save_checkpoint(run, factors, optimizer, args):
    """Write the checkpoint atomically."""
    torch.save(run | {"settings": settings(args), "factors": factors.state_dict(),
                      "optimizer": optimizer.state_dict()}, args.out / "checkpoint.tmp")
    os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")


def resume(factors, optimizer, args):
    """The state of the run in --out, loaded into factors and optimizer; or that of a new run."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "curve": [], "noted": None,
                "best": {}, "best_held": math.inf}
    run = torch.load(path, args.device, weights_only=True)
    if run.pop("settings") != settings(args):
        raise model.UserError(f"{path} is of a run with other settings; choose another --out")
    factors.load_state_dict(run.pop("factors"))
    optimizer.load_state_dict(run.pop("optimizer"))
    log(f"continuing from step {run['step']}")
    return run


# Measuring ---------------------------------------------------------------------------------------

@torch.no_grad()
def perplexity(llama, tokens, context, make):
    nats, count = negative_log_likelihood(llama, tokens, context, make)
    return math.exp(nats / count)


def measure(name, llama, tokenizer, args, result, make):
    """Perplexities and recall under the caches of make(capacity, B), as in decoding.

    Adds them to `result` under `name` and writes the file."""
    for path in filter(None, (args.test, args.second)):
        tokens = encode(tokenizer, path, args.device)[:args.max_tokens]
        text = result["perplexity"].setdefault(Path(path).name, {"tokens": len(tokens)})
        text[name] = perplexity(llama, tokens, args.context, lambda n: make(n, 1))
        log(f"{name:14s}  {Path(path).name}: perplexity {text[name]:.4f},"
            f" {text[name] / text['full'] - 1:+.2%}")
    if args.data:
        result["recall"][name] = exact_matches(llama, tokenizer, args, make)
        log(f"{name:14s}  records of {LINES} lines: {result['recall'][name]:.3f} exact")
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def records_file(args):
    return args.data / "longeval" / "200_lines.jsonl"


@torch.no_grad()
def exact_matches(llama, tokenizer, args, make):
    """Fraction of recall.py's records of LINES lines whose number greedy decoding gives."""
    lines, intro = recall.read_lines(records_file(args))
    records = recall.make_records(lines, LINES, recall.RECORDS)
    prompts, numbers = recall.encode_records(tokenizer, intro, records)
    numbers = [record[:1] for record in numbers]                     # the right one of each record
    found = recall.measure_records(llama, prompts, numbers, make)
    return sum(record["exact"] for record in found) / len(found)


# The command line --------------------------------------------------------------------------------

def command_line():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--model", default=str(ROOT / "tiny"), help="Folder of the model. Default: tiny/.")
    add("--text", nargs="+", required=True, metavar="FILE", help="Texts to train on.")
    add("--kept", type=float, default=0.2, metavar="F", help="rho over all layers. Default: 0.2.")
    add("--bits", type=int, choices=[16, 4], default=16, help="4 rounds latents while"
        " training. Default: 16.")
    add("--out", type=Path, required=True, metavar="DIR", help="Folder for bases, result.json and"
        " checkpoint.")
    add("--test", metavar="FILE", help="A text to score before and after.")
    add("--second", metavar="FILE", help="A text of another kind, to score too.")
    add("--data", type=Path, metavar="DIR", help="Folder with longeval/200_lines.jsonl (recall).")
    add("--max-tokens", type=int, default=16384, metavar="N", help="Tokens scored of each text.")
    add("--context", type=int, metavar="N", help="Window length. Default: the model's, at most"
        " 1024.")
    add("--steps", type=int, default=300, metavar="N", help="Steps of training. Default: 300.")
    add("--minutes", type=float, default=10, metavar="F", help="Time of training. Default: 10.")
    add("--batch", type=int, default=8, metavar="B", help="Windows a step. Default: 8.")
    add("--lr", type=float, default=8e-4, help="Highest learning rate; the more is kept,"
        " the lower it should be: 0.0005 at 0.2, 0.0001 at 0.4. Default: 0.0008.")
    add("--every", type=int, default=25, metavar="N", help="Steps between validations.")
    add("--seed", type=int, default=0, help="Orders the windows. Default: 0.")
    add("--device", help="cpu or cuda. Default: cuda where there is one.")
    add("--commit", help="Written into result.json. Default: what git says.")
    return p


def main():
    args = command_line().parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.data and not records_file(args).is_file():
        raise model.UserError(f"{records_file(args)} does not exist; give another --data")
    args.out.mkdir(parents=True, exist_ok=True)
    llama = model.load(args.model, torch.float32, args.device)
    tokenizer = Tokenizer(args.model, llama.config)
    args.context = args.context or min(1024, llama.config.context)
    result = provenance(args.device, args.commit) | {"perplexity": {}, "recall": {}}
    windows, held = read_windows(tokenizer, args.text, args.context, args.device)
    log(f"{len(windows)} windows of {args.context} tokens, {len(held)} held out")
    measure("full", llama, tokenizer, args, result,
            lambda n, B: lorc.new_caches(llama, "full", n, B=B))
    begun, generator = time.perf_counter(), torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(windows), generator=generator)[:CALIBRATION]
    plan, factors = start(llama, windows[some], args.kept)
    result |= {"windows": len(windows), "held": len(held), "kept": plan.kept, "bits": args.bits,
               "ranks": plan.ranks, "parameters": sum(p.numel() for p in factors.parameters()),
               "seconds_start": time.perf_counter() - begun}

    def both(name):
        for bits, also in (16, ""), (4, ", 4 bits"):
            measure(name + also, llama, tokenizer, args, result,
                    lambda n, B: bibranch(llama, n, bases_of(factors), bits, B))
    both("before")
    result["curve"], result["seconds"] = train(llama, factors, windows, held, args)
    with torch.no_grad():
        saved_bases.save_bases(args.out, llama, plan, bases_of(factors))
    both("after")


START = time.perf_counter()
if __name__ == "__main__":
    try:
        main()
    except model.UserError as e:
        sys.exit(f"distill: {e}")
