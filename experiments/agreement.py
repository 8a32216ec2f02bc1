"""Task accuracies out of evaluate.py's result, and how often each cache answers as the full one.

A model that is worse than always giving the commonest answer gains when a broken cache changes its
answers at random; what a cache does to it is seen question by question. kappa is Cohen's: agreement
beyond that of two independent answerers with the same frequencies, 0 for chance and 1 for all.

    python experiments/agreement.py experiments/results/accuracy-SmolLM2-135M-Instruct.json
"""
import json
import sys
from collections import Counter
from pathlib import Path

from study import markdown


def agreement(a, b):
    """Part of the questions answered alike, and Cohen's kappa (nan if neither a nor b varies)."""
    n, alike = len(a), sum(x == y for x, y in zip(a, b, strict=True))
    chance = sum(Counter(a)[x] * Counter(b)[x] for x in set(a)) / n
    return alike / n, (alike - chance) / (n - chance) if chance < n else float("nan")


def cells(task, full):
    """Of one task: accuracy with its standard error, agreement and kappa with the full cache."""
    metric = "acc_norm" if "acc_norm" in task else "acc"
    same, kappa = agreement(task["picks"], full["picks"])
    return (f"{100 * task[metric]:.1f} ± {100 * task[metric + '_stderr']:.1f}", f"{same:.1%}",
            f"{kappa:.2f}")


def table(result):
    """One line a configuration."""
    first = result["configurations"][0]["tasks"]
    header = [word for name, task in first.items()
              for word in (f"{name}, {task['questions']}", "as full", "kappa")]
    return markdown(["flags", *header], [
        [f"`{one['flags'][one['flags'].index('--cache'):]}`",
         *(cell for name in first for cell in cells(one["tasks"][name], first[name]))]
        for one in result["configurations"]])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
