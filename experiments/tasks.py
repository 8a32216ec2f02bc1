"""Tasks: do compressed caches answer as the full cache does?

A model of 135 million parameters answers these questions hardly better than chance, so that its
accuracy says little about a cache: a cache that changes answers at random can even gain. The
measure is the agreement with the full cache's answers, question by question, and Cohen's kappa,
which is 0 for the agreement that two independent answerers with the same frequencies have, and 1
for identical answers. Accuracies are given with their standard errors.

    BoolQ        likelihood of "yes" and "no" after a passage and a question; five answered
                 questions stand before it, so that most of the prompt is read compressed
    OpenBookQA   likelihood per character of four answers, also after five answered questions
    GSM8K        the final number of a greedy answer. A prompt is the last PROMPT tokens of answered
                 questions and the question: of equal length, so that one batch holds many

The examples before a question are those that follow it in the file. BoolQ and OpenBookQA read every
token as a token-by-token run would (`simulate_decoding`). GSM8K follows CSKV's rule: a prompt sees
itself exactly, and the answer sees it as it is stored.

Verdict, on SmolLM2 calibrated on WikiText-2: on BoolQ and OpenBookQA the loss metric with 4 bits
gives 95 to 98 % of the full cache's answers, as quantization alone with 3 bits does, and LoRC as
printed gives 10 and 49 %. Written answers (GSM8K) diverge early: 35 % at 0.4 kept, 21 % at 0.2.

    python experiments/tasks.py --model PATH --text FILE --calibrate OTHER_FILE --data DIR

The files of DIR are those that evaluate.py lists. --text is not read by this script. Other tasks,
such as CSKV's and LoRC's XSum and LoRC's other tasks, run through lm-evaluation-harness where their
data is at hand: `evaluate.py` takes any task of it.
"""
import json
import math
import re
import sys

import torch

import study as shared
from agreement import agreement
from scoring import continuation_scores
from study import lorc

NEEDS_DATA = True
SHOTS = 5                     # answered questions before a question
QUESTIONS = 250               # of BoolQ and of OpenBookQA
PROBLEMS = 200                # of GSM8K
PROMPT, ANSWER = 768, 128     # tokens of a prompt and of an answer in GSM8K
AT_ONCE = 200                 # problems that are answered in one batch
CACHES = {                    # label: keyword arguments of `caches_for`
    "full": {"kept": 1.0, "basis": "svd", "kind": "full"},
    "LoRC, Eq. 13, 0.6": {"kept": 0.6, "basis": "svd", "kind": "compressed",
                          "schedule": "progressive"},
    "calibrated, 0.2": {"kept": 0.2, "basis": "whitened"},
    "loss metric, 0.4, 4 bits": {"kept": 0.4, "basis": "loss, sorted", "bits": 4},
    "loss metric, 0.2, 4 bits": {"kept": 0.2, "basis": "loss, sorted", "bits": 4},
    "quantization alone, 3 bits": {"kept": 1.0, "basis": "identity", "bits": 3}}


# Questions ---------------------------------------------------------------------------------------

def read_boolq(folder):
    """[(text of the question, choices, index of the right choice)]"""
    text = (folder / "boolq" / "validation_std.jsonl").read_text(encoding="utf-8")
    return [(f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", (" no", " yes"),
             int(item["answer"])) for item in map(json.loads, text.splitlines())]


def read_openbookqa(folder):
    """[(text of the question, choices, index of the right choice)] of LLM-Adapters' file."""
    found = []
    for item in json.loads((folder / "openbookqa" / "test.json").read_text(encoding="utf-8")):
        question, rest = item["instruction"].split("question: ", 1)[1].split("\n\n", 1)
        choices = re.split(r"\s*Answer\d: ", rest.split("\n\nAnswer format")[0])[1:]
        found.append((f"Question: {question.strip()}\nAnswer:", [" " + c.strip() for c in choices],
                      int(item["answer"].removeprefix("answer")) - 1))
    return found


def read_gsm8k(folder):
    """[(text of the question, text of its answer)]"""
    text = (folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8")
    return [(f"Question: {item['question']}\nAnswer:", " " + item["answer"])
            for item in map(json.loads, text.splitlines())]


def with_examples(questions, i):
    """Question i with the SHOTS questions that follow it in the file, answered, before it."""
    examples = [questions[(i + n) % len(questions)] for n in range(SHOTS, 0, -1)]
    return "".join(f"{text}{choices[right]}\n\n" for text, choices, right in examples) \
        + questions[i][0]


def problem_prompt(tokenizer, problems, i):
    """The last PROMPT tokens of problem i after as many answered problems as it takes."""
    text, n = problems[i][0], 0
    while len(tokens := tokenizer.encode(text)) < PROMPT:
        n += 1
        question, answer = problems[(i + n) % len(problems)]
        text = f"{question}{answer}\n\n{text}"
    return tokens[-PROMPT:]


# Answers -----------------------------------------------------------------------------------------

def choose(study, questions, count, make):
    """The likeliest choice per character for each of the first `count` questions, as digits."""
    pairs, sizes = [], []
    for i in range(min(count, len(questions))):
        context = study.tokenizer.encode(with_examples(questions, i))
        for choice in questions[i][1]:
            pairs.append((context, study.tokenizer.encode(choice, special=False)))
            sizes.append(len(choice) - 1)
    scores = [nats / size for (nats, _), size in
              zip(continuation_scores(study.llama, pairs, make), sizes)]
    n = len(questions[0][1])
    rows = [scores[i:i + n] for i in range(0, len(scores), n)]
    return "".join(str(row.index(max(row))) for row in rows)


def final_number(text):
    """The number after "####", else the last number, of an answer; None if it has none."""
    text = re.split(r"\n\n|\nQuestion:", text)[0]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2]) or \
        re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    return (numbers[0] if "####" in text else numbers[-1]).replace(",", "")


def solve(study, problems, count, make):
    """The final number of a greedy answer to each of the first `count` problems, as a text."""
    device, answers = study.llama.embed.weight.device, []
    prompts = torch.tensor([problem_prompt(study.tokenizer, problems, i)
                            for i in range(min(count, len(problems)))], device=device)
    for part in prompts.split(AT_ONCE):
        caches = make(PROMPT + ANSWER, len(part))
        steps = list(lorc.generate(study.llama, caches, part, ANSWER))
        for tokens in torch.stack(steps, 1).tolist():
            answers.append(final_number(study.tokenizer.fast.decode(tokens)))
    return answers


# Measuring ---------------------------------------------------------------------------------------

def caches_for(study, kept, basis, kind="bibranch", bits=16, simulate=True, **plan):
    """A function of (capacity, B) that makes empty caches."""
    options = {"bits": max(4, bits), "simulate_decoding": simulate} if kind == "bibranch" else {}
    bases = study.compressed(kept, basis, **plan)[1]
    return lambda capacity, B: lorc.new_caches(study.llama, kind, capacity, bases, B, **options)


def row(label, task, answers, right, full):
    """One line of a result: accuracy, agreement with the full cache's answers, kappa."""
    same, kappa = agreement(answers, full)
    correct = [a == r for a, r in zip(answers, right)]
    accuracy, n = sum(correct) / len(correct), len(correct)
    return {"label": label, "task": task, "questions": n, "accuracy": round(accuracy, 5),
            "accuracy_se": round((accuracy * (1 - accuracy) / n) ** 0.5, 5),
            "agreement": round(same, 5), "agreement_se": round((same * (1 - same) / n) ** 0.5, 5),
            "kappa": None if math.isnan(kappa) else round(kappa, 5), "answers": answers}


@torch.no_grad()
def measure(study):
    rows, folder = [], study.args.data
    for task, read in (("boolq", read_boolq), ("openbookqa", read_openbookqa)):
        questions, full = read(folder), None
        right = "".join(str(right) for *_, right in questions[:QUESTIONS])
        for label, setting in CACHES.items():
            with shared.rounded_to(setting.get("bits", 16)):
                answers = choose(study, questions, QUESTIONS, caches_for(study, **setting))
            full = full or answers
            rows.append(row(label, task, answers, right, full) | setting)
            study.say(f"{task:12s} {label:28s} agreement {rows[-1]['agreement']:.3f}")
    problems, full = read_gsm8k(folder), None
    right = [final_number(answer) for _, answer in problems[:PROBLEMS]]
    for label, setting in CACHES.items():
        with shared.rounded_to(setting.get("bits", 16)):
            answers = solve(study, problems, PROBLEMS, caches_for(study, **setting, simulate=False))
        full = full or answers
        rows.append(row(label, "gsm8k", answers, right, full) | setting)
        study.say(f"{'gsm8k':12s} {label:28s} agreement {rows[-1]['agreement']:.3f}")
    return rows


def plot(found):
    """One table a model: accuracy, agreement and kappa of each cache on each task."""
    for name, result in found.items():
        of = {(row["label"], row["task"]): row for row in result["rows"]}
        tasks = list(dict.fromkeys(task for _, task in of))
        header, lines = ["cache"], []
        for task in tasks:
            n = of["full", task]["questions"]
            header += [f"{task}, {n}: accuracy", "as the full cache", "kappa"]
        for label in CACHES:
            line = [label]
            for task in tasks:
                line += cells(of.get((label, task), {}))
            lines.append(line)
        yield f"tasks-{name}", shared.markdown(header, lines)


def cells(row):
    """Of one cache and task: accuracy with its standard error, agreement, and kappa."""
    accuracy = (f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}"
                if "accuracy" in row else "–")
    agreement = (f"{100 * row['agreement']:.1f} ± {100 * row['agreement_se']:.1f} %"
                 if "agreement" in row else "–")
    return [accuracy, agreement, f"{row['kappa']:.2f}" if row.get("kappa") is not None else "–"]


if __name__ == "__main__":
    sys.exit(shared.main(sys.modules[__name__]))
