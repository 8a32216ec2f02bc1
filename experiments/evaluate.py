"""Task accuracy under any cache, by lm-evaluation-harness: its prompts, its normalisation, its
metrics and its standard errors. The model is ours; lm_eval_adapter.py says how it answers.

    python experiments/evaluate.py --model PATH --tasks openbookqa,boolq --data DIR --out FILE \\
        --dtype float32 --cache full --also "--cache compressed --kept 0.8" \\
        --also "--cache bibranch --kept 0.4 --calibrate TEXT --basis whitened --split 0.1"

The flags of the cache are lorc.py's own. Each --also is one more configuration of the same loaded
model. Without --data every task that lm-eval knows can be named, and comes from the Hub. With it,
tasks come from these files, put into the Hub's columns:

    DIR/openbookqa/test.json            [{"instruction": ..., "answer": "answer2"}], LLM-Adapters'
    DIR/boolq/validation_std.jsonl      {"question": ..., "passage": ..., "answer": false}
    DIR/gsm8k/test.jsonl                {"question": ..., "answer": ...}, as OpenAI publishes it

GSM8K has no training file there: its five examples are drawn from the other test questions.

The result holds, for each configuration and task, every metric with its standard error, and one
entry a question, so that two configurations can be compared question by question: `picks`, the
choice of the highest log-likelihood, a digit each; `acc_each` and the like, the metric, a digit
each; `texts` where the task wants text. --against-hf makes this comparison between the full cache
and lm-eval's own `hf` backend, both in float32 on the CPU.
"""
import argparse
import json
import logging
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import lm_eval
import torch
import yaml
from lm_eval.tasks import TaskManager

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lorc                                                        # noqa: E402
from runtime import cli as command, jobs as running
import record                                                      # noqa: E402
from lm_eval_adapter import CachedLM                               # noqa: E402
from model import UserError                                        # noqa: E402

SEED = 1234        # lm-eval's own, for the examples in front of a question


# Tasks -------------------------------------------------------------------------------------------

def openbookqa(item):
    """The Hub's columns out of LLM-Adapters' one text."""
    question, rest = item["instruction"].split("question: ", 1)[1].split("\n\nAnswer1: ", 1)
    choices = rest.split("\n\nAnswer format")[0]
    for n in range(2, 5):
        choices = choices.replace(f" Answer{n}: ", "\n", 1)
    choices = [choice.strip() for choice in choices.split("\n")]
    return {"question_stem": question.strip(), "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[int(item["answer"].removeprefix("answer")) - 1]}


def boolq(item):
    return {"passage": item["passage"], "question": item["question"], "label": int(item["answer"])}


def gsm8k(item):
    return {"question": item["question"], "answer": item["answer"]}


LOCAL = {"openbookqa": (openbookqa, "openbookqa/test.json"),
         "boolq": (boolq, "boolq/validation_std.jsonl"), "gsm8k": (gsm8k, "gsm8k/test.jsonl")}


def local_task(name, folder, manager):
    """lm-eval's own task, with its questions out of a file. Raises UserError."""
    if name not in LOCAL:
        raise UserError(f"--data holds {', '.join(LOCAL)} and not {name}; the Hub holds the rest")
    convert, file = LOCAL[name]
    text = running.read_text(Path(folder) / file)
    try:
        items = json.loads(text) if file.endswith("json") else map(json.loads, text.splitlines())
        questions = datasets.Dataset.from_list([convert(item) for item in items])
    except (ValueError, LookupError, AttributeError, TypeError) as e:
        raise UserError(f"{file} is not laid out as --help says: {e!r:.80}") from None
    task = yaml.safe_load(Path(manager.task_index[name].yaml_path).read_text(encoding="utf-8"))
    return task | {"custom_dataset": lambda **_: {"test": questions}, "test_split": "test",
                   "training_split": None, "validation_split": None, "fewshot_split": "test"}


def load_tasks(names, folder):
    """What lm_eval.evaluate runs, from the Hub or, with a folder, from files. Raises UserError."""
    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.task_index]:
        raise UserError(f"lm-eval {version('lm_eval')} has no task {unknown[0]!r}")
    tasks = [local_task(name, folder, manager) if folder else name for name in names]
    try:
        return manager.load(tasks)
    except Exception as e:                           # the Hub can fail in any way that a net can
        raise UserError(f"the tasks cannot be loaded; --data DIR reads files: {e!r:.120}") from None


# Answers -----------------------------------------------------------------------------------------

def answer(lm, tasks, limit):
    """Each task's metrics with standard errors, and one entry a question: {task: see `entry`}."""
    for task in tasks["tasks"].values():
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(SEED)
    found = lm_eval.evaluate(lm, tasks, limit=limit)
    return {name: entry(found["results"][name], samples)
            for name, samples in found["samples"].items()}


def entry(numbers, samples):
    """One task's part of the result, from lm-eval's results and samples of it.

    lm-eval names a metric "acc,none" or "exact_match,strict-match"; "none" is left out.
    """
    out = {key.removesuffix(",none"): float(x) for key, x in numbers.items()
           if isinstance(x, float)}                  # a NumPy number too; not names and counts
    questions = {}                                   # filter -> samples in the questions' order
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        questions.setdefault(sample["filter"], []).append(sample)
    for name, some in questions.items():
        for metric in some[0]["metrics"]:
            each = [sample[metric] for sample in some]
            if all(x in (0, 1) for x in each):
                key = f"{metric},{name}".removesuffix(",none") + "_each"
                out[key] = "".join(str(int(x)) for x in each)
    responses = [[r for r, *_ in sample["resps"]] for sample in some]
    if isinstance(responses[0][0], str):
        out["texts"] = [r for r, *_ in responses]
    elif isinstance(responses[0][0], tuple):
        nats = [[p for p, _ in r] for r in responses]
        out["picks"] = "".join(str(p.index(max(p))) for p in nats)
        out["nats"] = nats
    return out | {"questions": len(some)}


def compare(ours, theirs):
    """How many questions two backends answer alike, and how far apart their log-likelihoods are."""
    out = {}
    for task, a in ours.items():
        b = theirs[task]
        same = {f"same_{key}": sum(x == y for x, y in zip(a[key], b[key], strict=True))
                for key in a if key.endswith("_each") or key in ("picks", "texts")}
        if "nats" in a:
            same["largest_difference_nats"] = max(
                abs(x - y) for p, q in zip(a["nats"], b["nats"]) for x, y in zip(p, q))
        out[task] = {"questions": a["questions"]} | same
    return out


# The command line --------------------------------------------------------------------------------

def command_line():
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Every other flag is lorc.py's: --model, --dtype, --device, --cache ...",
                    allow_abbrev=False)
    flag = p.add_argument
    flag("--tasks", required=True, metavar="A,B", help="Names of lm-eval's tasks.")
    flag("--data", metavar="DIR", help="Read the tasks from files in DIR. Default: the Hub.")
    flag("--limit", type=command.number_in(int, 1, 10**9, "positive count"), metavar="N",
         help="Ask only the first N questions of each task.")
    flag("--also", action="append", default=[], metavar="FLAGS", help="One more configuration.")
    flag("--against-hf", action="store_true", help="Ask lm-eval's own `hf` too, and compare.")
    flag("--out", required=True, metavar="FILE", help="Where the result is written, as JSON.")
    flag("--commit", help="Written into the result. Default: what git says.")
    return p


def configuration(flags, first=None):
    """lorc.py's flags of one configuration, checked by lorc.py as if a text were to be scored.

    The model comes with the first configuration; for every other one, `first` is that one.
    """
    p = command.command_line()
    args = command.validate_flags(p, p.parse_args([*flags, "--perplexity", "the tasks"]))
    for name in ("compare", "save", "json", "verbose", "context", "max_tokens",
                 *(("model", "dtype", "device") if first else ())):
        if getattr(args, name) not in (p.get_default(name), None):
            p.error(f"--{name.replace('_', '-')} does nothing here; leave it out")
    return args


def run_one(llama, tokenizer, args, tasks, limit):
    """One configuration: the fraction of numbers kept, seconds, and the answers to every task."""
    plan, bases = None, None
    if args.cache != "full":
        plan, bases = running.choose_bases(args, llama, tokenizer)
    options = {name: getattr(args, name) for name in ("sinks", "window", "bits")}
    start = time.perf_counter()
    found = answer(CachedLM(llama, tokenizer, args.cache, bases, **options), tasks, limit)
    return {"kept": plan.kept if plan else 1.0, "seconds": time.perf_counter() - start,
            "tasks": found}


def against_hf(args, device, ours, tasks, limit):
    """The full cache's answers beside those of lm-eval's own backend, in float32: see `compare`."""
    if args.cache != "full" or args.dtype != "float32":
        raise UserError("--against-hf compares --cache full in --dtype float32; give both")
    from lm_eval.models.huggingface import HFLM
    hf = HFLM(args.model, dtype="float32", device=device, batch_size=16)
    theirs = answer(hf, tasks, limit)
    return {"transformers": version("transformers"), "tasks": compare(ours, theirs)}


def show(result):
    """A line for each configuration and metric, on standard error."""
    for one in result["configurations"]:
        for task, found in one["tasks"].items():
            for key, x in found.items():
                metric, comma, name = key.partition(",")
                error = found.get(f"{metric}_stderr{comma}{name}")
                if error is not None:
                    print(f"{task:11s} {key:28s} {x:.4f} +- {error:.4f}  {one['flags']}",
                          file=sys.stderr)


def run(args, flags):
    """Every configuration, and the comparison if asked for: written to --out."""
    first = configuration(flags)
    given = [flags, *map(shlex.split, args.also)]
    every = [first, *(configuration(f, first) for f in given[1:])]
    llama, tokenizer, _ = running.open_model(first)
    device = llama.embed.weight.device.type
    tasks = load_tasks(args.tasks.split(","), args.data)
    result = record.provenance(device, args.commit) | {
        "lm_eval": version("lm_eval"), "dtype": str(llama.embed.weight.dtype)[6:]}
    result["configurations"] = [
        {"flags": shlex.join(f)} | run_one(llama, tokenizer, one, tasks, args.limit)
        for f, one in zip(given, every)]
    if args.against_hf:
        ours = result["configurations"][0]["tasks"]
        result["against_hf"] = against_hf(first, device, ours, tasks, args.limit)
    for one in result["configurations"]:
        for found in one["tasks"].values():
            found.pop("nats", None)                  # for compare: too many to keep
    record.write(args.out, result)
    show(result)


def main():
    args, flags = command_line().parse_known_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with torch.no_grad():                    # --basis loss needs gradients
            run(args, flags)
    except UserError as e:
        print("evaluate:", " ".join(str(e).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
