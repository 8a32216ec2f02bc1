"""What a command says: a table for a reader, one JSON object for a program."""
import itertools
import json
import sys


def report(args, plan, runs, seconds):
    """The result for a program (--json, on standard output) or for a reader (on standard error)."""
    compressed = [r["errors"] for r in runs if r["cache"]["kind"] != "full" and r["errors"]]
    errors = [tuple(map(max, zip(*layer))) for layer in zip(*compressed)]     # worst of all prompts
    rows = plan_rows(plan, errors) if plan else []
    if args.json:
        print(json.dumps({"model": args.model, "plan": rows} | as_json(args, runs, seconds)))
        return
    to = sys.stdout if args.plan else sys.stderr
    if rows:
        print_plan(rows, plan, to)
    if args.compare:
        print_comparison(runs)
    for r in runs if not args.compare else []:
        if "perplexity" in r:
            print(f"perplexity {r['perplexity']:.4f}")
        c = r["cache"]
        spent = seconds | {"prefill": r["prefill"], "decode": r["decode"]}
        print(f"{c['kind']} cache: {size(c['bytes'])} held ({c['bytes']:,} bytes), "
              f"a full one in {c['dtype']} {size(c['full_bytes'])} ({c['full_bytes']:,}): "
              f"{c['bytes'] / c['full_bytes']:.1%}\n"
              f"{r['tokens']} tokens; seconds: "
              + ", ".join(f"{k} {s:.2f}" for k, s in spent.items())
              + " (compiling included)" * bool(args.compile)
              + ("\npeak memory: " + ", ".join(map(size, c["memory"])) if "memory" in c else ""),
              file=sys.stderr)
    for status in sorted({r["status"] for r in runs} - {"ok"}):
        print({"context": "stopped at the model's context: it was made for no more positions",
               "interrupted": "interrupted"}[status], file=sys.stderr)
    worst = max((max(e) for e in errors), default=0)
    two = [r["cache"] for r in runs if r["cache"]["kind"] == "bibranch"]
    if two and all(c["kept"] < 1 and c["bytes"] == c["full_bytes"] for c in two):
        print("Every token fits into sinks and window: the bi-branch cache compressed nothing "
              "here.", file=sys.stderr)
    elif args.cache == "bibranch" or args.compare:
        print("The errors are of the low-rank part alone: exact tokens have none, and rounding to "
              "4 bits is not in them.", file=sys.stderr)
    elif worst > 0.3:
        print(f"On this text the worst layer loses {worst:.0%} of its keys or values: read the "
              "text with care. --cache bibranch"
              f"{' with --calibrate FILE' * (args.calibrate is None)} repairs most of it.",
              file=sys.stderr)


def plan_rows(plan, errors):
    """The plan as the table's and the JSON's rows: one dict a layer."""
    layers = zip(plan.log_kappa, plan.log_kappa_tilde, plan.ranks)
    return [{"layer": i, "log_kappa_k": k, "log_kappa_v": v, "log_kappa": k + v,
             "log_kappa_tilde": t, "d_k": d_k, "d_v": d_v, "kept": (d_k + d_v) / (2 * plan.d_max)}
            | ({"error_k": errors[i][0], "error_v": errors[i][1]} if errors else {})
            for i, ((k, v), t, (d_k, d_v)) in enumerate(layers)]


def as_json(args, runs, seconds):
    """What was run, as README lists it. Prompts give a list of texts; --compare three objects."""
    def one(results):
        texts = [r["text"] for r in results if "text" in r]
        return ({"cache": max((r["cache"] for r in results), key=lambda c: c["full_bytes"])}
                | ({"text": texts[0] if len(texts) == 1 else texts} if texts else {})
                | {"perplexity": r["perplexity"] for r in results if "perplexity" in r}
                | {"tokens": sum(r["tokens"] for r in results),
                   "status": next((r["status"] for r in results if r["status"] != "ok"), "ok"),
                   "seconds": seconds | {k: sum(r[k] for r in results)
                                         for k in ("prefill", "decode")}})
    kinds = list(dict.fromkeys(r["cache"]["kind"] for r in runs))
    found = [one([r for r in runs if r["cache"]["kind"] == kind]) for kind in kinds]
    if args.compare:
        return {"compare": found, "agree": {k: agreement(runs, k) for k in kinds if args.prompt}}
    return found[0] if found else {"seconds": seconds}


def agreement(runs, kind):
    """How many tokens of each prompt equal the full cache's before the first difference."""
    ids = {k: [r["ids"] for r in runs if r["cache"]["kind"] == k] for k in ("full", kind)}
    return [sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b)))
            for a, b in zip(ids[kind], ids["full"])]


def size(n):
    """Bytes for a reader: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def print_plan(rows, plan, to):
    """The table of layers: Eq. 10, Eq. 12, Eq. 13, and the error measured on the user's text."""
    measured = "error_k" in rows[0]
    print("layer  ln k(Wk)  ln k(Wv)   ln k~   d_k   d_v   kept"
          + "  |k-k~|/|k|  |v-v~|/|v|" * measured, file=to)
    for r in rows:
        print(f"{r['layer']:5d}  {r['log_kappa_k']:8.2f}  {r['log_kappa_v']:8.2f}  "
              f"{r['log_kappa_tilde']:6.1f}  {r['d_k']:4d}  {r['d_v']:4d}  {r['kept']:5.3f}"
              + (f"  {r['error_k']:10.3f}  {r['error_v']:10.3f}" if measured else ""), file=to)
    print(f"kept {plan.kept:.4f} of the full cache's numbers (d_max {plan.d_max})", file=to)


def print_comparison(runs):
    """The three caches side by side, on standard output: the table is the result."""
    print("cache              bytes  of full  prefill s  decode s")
    for kind in dict.fromkeys(r["cache"]["kind"] for r in runs):
        of_kind = [r for r in runs if r["cache"]["kind"] == kind]
        agree = agreement(runs, kind) if "ids" in of_kind[0] else [0]
        for r, same in zip(of_kind, agree):
            c = r["cache"]
            last = (f"perplexity {r['perplexity']:.4f}" if "perplexity" in r
                    else f"first {same} of {r['tokens']} tokens as with the full cache")
            print(f"{kind:10s}  {c['bytes']:12,}  {c['bytes'] / c['full_bytes']:7.1%}  "
                  f"{r['prefill']:9.2f}  {r['decode']:8.2f}  {last}")
    for r in runs:
        if "text" in r:
            print(f"\n--- {r['cache']['kind']}\n{r['text']}")
