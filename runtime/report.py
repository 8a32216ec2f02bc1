"""What a command reports: tables and sentences for a reader, or one JSON object for a program."""
import itertools
import json
import sys

from runtime.advice import suggest

STATUS = {"context": "Generation stopped at the model's context, the number of positions that it "
                     "was made for.",
          "interrupted": "interrupted"}
UNRELIABLE = 0.1        # nats per token: about 10 % more perplexity


def report(args, plan, results, seconds):
    """Print the results of a command: JSON on standard output, or a report.

    Of the report, standard output receives what was asked for (perplexity and the tables of --plan
    and --compare), standard error the rest. seconds: those of "load" and "bases".
    """
    rows = plan_rows(plan, worst_errors(results)) if plan else []
    best = closest_kind(results) if args.compare else None
    reason, command = suggest(args, best)
    if args.json:
        found = {"model": args.model, "plan": rows, "next": command}
        print(json.dumps(found | as_json(args, results, seconds), allow_nan=False))
        return
    if args.plan or args.verbose:
        print_plan(rows, plan, sys.stdout if args.plan else sys.stderr)
    if results:
        print_results(args, results, seconds)
    for note in notes(args, plan, results):
        print(note, file=sys.stderr)
    print(f"{reason}:\n    {command}", file=sys.stderr)


def print_results(args, results, seconds):
    """The table of caches, and the texts or perplexities, on the streams that `report` names."""
    table = caches_table(args, results)
    if args.perplexity is not None and not args.compare:
        print_perplexity(results)
    print("\n".join(table), file=sys.stdout if args.compare else sys.stderr)
    if args.compare and args.prompt:
        for result in results:
            print(f"\n--- {result.cache['kind']}\n{result.text}")
    spent = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items())
    tokens = sum(r.tokens for r in results if r.cache["kind"] == results[-1].cache["kind"])
    what = "scored" if args.perplexity is not None else "generated"
    print(f"{tokens:,} tokens {what}; {spent}", file=sys.stderr)
    if args.compile:
        print("The seconds of decoding contain those of the compilation.", file=sys.stderr)


def print_perplexity(results):
    """perplexity 23.6, full cache 22.7 (+3.9 %): the last result is the chosen cache's."""
    full, chosen = results[0].perplexity, results[-1].perplexity
    if len(results) == 1:
        print(f"perplexity {chosen:.4f}")
    else:
        print(f"perplexity {chosen:.4f}; full cache {full:.4f} ({chosen / full - 1:+.2%})")


# The table of caches -----------------------------------------------------------------------------

def caches_table(args, results):
    """The lines of the table: a row for each cache, and what its columns are."""
    dtype = results[0].cache["stored_dtype"]
    header = ["cache", f"bytes in {dtype}", "of full", "KL"]
    scored = results[0].perplexity is not None
    header += ["perplexity"] if scored else []
    header += ["prefill s", "decode s"] if not scored else ["seconds"]
    same = args.compare and not scored
    header += ["first tokens as full"] if same else []
    rows = [header]
    for kind, group in by_kind(results).items():
        cache = largest_cache(group)
        row = [kind, f"{cache['stored_bytes']:,}",
               f"{cache['stored_bytes'] / cache['stored_full_bytes']:.1%}",
               format_divergence(mean_divergence(group)[0])]
        row += [f"{group[0].perplexity:.4f}"] if scored else []
        row.append(f"{sum(result.prefill for result in group):.2f}")
        row += [f"{sum(result.decode for result in group):.2f}"] if not scored else []
        row += [agreement_text(results, kind)] if same else []
        rows.append(row)
    if "full" not in by_kind(results):
        cache = largest_cache(results)
        rows.insert(1, ["full", f"{cache['stored_full_bytes']:,}", "100.0%", "0"]
                    + [""] * (len(header) - 4))
    return align(rows) + table_legend(results)


def align(rows):
    """Lines of columns: the first aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width
                                                   in zip(row[1:], widths[1:])]).rstrip()
            for row in rows]


def table_legend(results):
    """What the column KL is, with the number of tokens that it is a mean over."""
    chosen = list(by_kind(results).values())[-1]
    tokens = mean_divergence(chosen)[1]
    if not tokens:
        return []
    first = "the first " if tokens < sum(r.cached - 1 for r in chosen) and chosen[0].ids else ""
    return ["KL: divergence from the full cache's next-token distribution in nats per token, "
            f"mean over {first}{tokens:,} tokens"]


def format_divergence(divergence):
    if divergence is None:
        return "-"
    return f"{divergence:.4f}" if divergence else "0"


def by_kind(results):
    """{kind: its results}, in the order in which the kinds were run."""
    kinds = dict.fromkeys(result.cache["kind"] for result in results)
    return {kind: [r for r in results if r.cache["kind"] == kind] for kind in kinds}


def largest_cache(results):
    return max((result.cache for result in results), key=lambda cache: cache["full_bytes"])


def mean_divergence(results):
    """(mean over the tokens of all results, number of tokens); (None, 0) if it was not measured."""
    if any(result.divergence is None for result in results):
        return None, 0
    tokens = sum(result.divergence_tokens for result in results)
    total = sum(result.divergence * result.divergence_tokens for result in results)
    return (total / tokens if tokens else 0.0), tokens


def closest_kind(results):
    """The compressed kind of cache with the smallest divergence, and of equal ones the smallest."""
    found = []
    for kind, group in by_kind(results).items():
        divergence = mean_divergence(group)[0]
        if kind != "full" and divergence is not None:
            found.append((divergence, largest_cache(group)["stored_bytes"], kind))
    return min(found)[2] if found else None


def agreement(results, kind):
    """For each prompt, how many first tokens equal those of the full cache."""
    ids = {name: [r.ids for r in group] for name, group in by_kind(results).items()}
    return [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, full)))
            for ours, full in zip(ids[kind], ids["full"])]


def agreement_text(results, kind):
    """3 of 20, for each prompt."""
    group = by_kind(results)[kind]
    return ", ".join(f"{same} of {result.tokens}"
                     for same, result in zip(agreement(results, kind), group))


# Sentences ---------------------------------------------------------------------------------------

def notes(args, plan, results):
    """Sentences about what a reader should know before trusting the table."""
    for status in sorted({result.status for result in results} - {"ok"}):
        yield STATUS[status]
    for kind, group in by_kind(results).items():
        if (mean_divergence(group)[0] or 0) > UNRELIABLE:
            yield f"With a KL above {UNRELIABLE:g} the {kind} cache is unreliable on this text."
            if kind == "compressed" and (args.bases or args.calibrate):
                yield ("Bases that are calibrated are usually meant for the bi-branch cache, which "
                       "keeps the first and last tokens exact.")
    bibranch = [result for result in results if result.cache["kind"] == "bibranch"]
    cached = sum(result.cached for result in bibranch)
    exact = sum(result.exact for result in bibranch)
    if bibranch and exact == cached:
        yield ("Every token fits into sinks and window: the bi-branch cache compressed nothing "
               "on this text.")
    elif bibranch and exact > cached / 2:
        yield (f"{exact / cached:.0%} of the bi-branch cache's tokens were exact, in sinks and "
               "window; the KL of a longer text is usually larger.")
    if plan and bibranch and args.bits == 4:
        full = sum(ranks == (plan.d_max, plan.d_max) for ranks in map(tuple, plan.ranks))
        if full:
            yield (f"{full} of {len(plan.ranks)} layers are not compressed: --bits 4 does not "
                   "apply to them.")
    if results and "memory" in results[-1].cache:
        peak = ", ".join(size(n) for n in results[-1].cache["memory"])
        yield f"peak GPU memory, {results[-1].cache['kind']} cache: {peak}"


def size(n):
    """Bytes for a reader: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


# The table of layers -----------------------------------------------------------------------------

def worst_errors(results):
    """(keys, values) of each layer: the largest error over all prompts and compressed caches."""
    measured = [result.errors for result in results
                if result.cache["kind"] != "full" and result.errors]
    return [tuple(map(max, zip(*layer))) for layer in zip(*measured)]


def plan_rows(plan, errors):
    """The rows of the table of layers and of the JSON, one dict a layer."""
    rows = []
    for i, (kappas, total, (d_k, d_v)) in enumerate(
            zip(plan.log_kappa, plan.log_kappa_tilde, plan.ranks)):
        row = {"layer": i, "log_kappa_k": kappas[0], "log_kappa_v": kappas[1],
               "log_kappa": sum(kappas), "log_kappa_tilde": total, "d_k": d_k, "d_v": d_v,
               "kept": (d_k + d_v) / (2 * plan.d_max)}
        if errors:
            row |= {"error_k": errors[i][0], "error_v": errors[i][1]}
        rows.append(row)
    return rows


def print_plan(rows, plan, file):
    """The table of layers: Eqs. 10, 12 and 13, and the errors if they were measured."""
    measured = "error_k" in rows[0]
    header = "layer  ln kappa(Wk)  ln kappa(Wv)  ln kappa~   d_k   d_v   kept"
    print(header + ("  |k-k~|/|k|  |v-v~|/|v|" if measured else ""), file=file)
    for r in rows:
        line = (f"{r['layer']:5d}  {r['log_kappa_k']:12.2f}  {r['log_kappa_v']:12.2f}  "
                f"{r['log_kappa_tilde']:9.1f}  {r['d_k']:4d}  {r['d_v']:4d}  {r['kept']:5.3f}")
        if measured:
            line += f"  {r['error_k']:10.3f}  {r['error_v']:10.3f}"
        print(line, file=file)
    print(f"kept {plan.kept:.4f} of the full cache's numbers (d_max {plan.d_max})", file=file)
    if measured:
        print("The errors are those of the low-rank map alone: they do not contain the rounding "
              "to 4 bits, and exact tokens have none.", file=file)


# JSON --------------------------------------------------------------------------------------------

def as_json(args, results, seconds):
    """What was run, as README describes it: one object, or with --compare one for each cache."""
    groups = by_kind(results)
    if args.compare:
        agree = {kind: agreement(results, kind) for kind in groups if args.prompt}
        return {"compare": [json_of(group, seconds) for group in groups.values()], "agree": agree}
    if not groups:
        return {"seconds": seconds}
    found = json_of(list(groups.values())[-1], seconds)             # of the cache that was chosen
    if args.perplexity is not None:
        found["full_perplexity"] = results[0].perplexity
    return found


def json_of(results, seconds):
    """The results of one cache, over all prompts."""
    divergence, tokens = mean_divergence(results)
    found = {"cache": largest_cache(results)}
    if results[0].text is not None:
        texts = [result.text for result in results]
        found["text"] = texts[0] if len(texts) == 1 else texts
    if results[0].perplexity is not None:
        found["perplexity"] = results[0].perplexity
    cached = sum(result.cached for result in results)
    return found | {
        "tokens": sum(result.tokens for result in results),
        "divergence": divergence, "divergence_tokens": tokens,
        "exact": sum(result.exact for result in results) / cached if cached else 1.0,
        "status": next((r.status for r in results if r.status != "ok"), "ok"),
        "seconds": seconds | {"prefill": sum(result.prefill for result in results),
                              "decode": sum(result.decode for result in results)}}
