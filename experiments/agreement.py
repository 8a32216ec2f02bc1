"""Accuracies in a result of evaluate.py, and how often each cache answers as the full cache does.

A model that answers worse than a constant guess can gain accuracy from a cache that changes its
answers at random. What a cache does to the model is visible only question by question: as the
fraction of answers that equal the full cache's, and as Cohen's kappa, which is 0 for the agreement
of two independent answerers with the same frequencies and 1 for identical answers.

    python experiments/agreement.py RESULT.json
"""
import json
import sys
from collections import Counter
from pathlib import Path

from study import markdown


def agreement(a, b):
    """The fraction of equal answers, and Cohen's kappa (nan if neither a nor b varies)."""
    n, alike = len(a), sum(x == y for x, y in zip(a, b, strict=True))
    chance = sum(Counter(a)[x] * Counter(b)[x] for x in set(a)) / n
    return alike / n, (alike - chance) / (n - chance) if chance < n else float("nan")


def cells(task, full):
    """The cells of one task: accuracy with its standard error, agreement and kappa."""
    metric = "acc_norm" if "acc_norm" in task else "acc"
    same, kappa = agreement(task["picks"], full["picks"])
    return (f"{100 * task[metric]:.1f} ± {100 * task[metric + '_stderr']:.1f}", f"{same:.1%}",
            f"{kappa:.2f}")


def table(result):
    """A Markdown table with one line for each configuration."""
    first = result["configurations"][0]["tasks"]
    header = [word for name, task in first.items()
              for word in (f"{name}, {task['questions']}", "as full", "kappa")]
    return markdown(["flags", *header], [
        [f"`{one['flags'][one['flags'].index('--cache'):]}`",
         *(cell for name in first for cell in cells(one["tasks"][name], first[name]))]
        for one in result["configurations"]])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
