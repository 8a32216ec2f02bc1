"""The guided tour runs, and its saved output is what it prints.

To execute it again and save the output (needs nbclient and ipykernel):

    jupyter execute --inplace experiments/tour.ipynb
"""
import contextlib
import io
import json
import re
from pathlib import Path

import torch

TOUR = Path(__file__).resolve().parent / "tour.ipynb"
try:
    import matplotlib
    matplotlib.use("Agg")
except ImportError:
    matplotlib = None


def saved_text(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"]
                   if output["output_type"] == "stream" and output["name"] == "stdout")


def without_numbers(text):
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "0", text).split()


def test_the_tour_runs_and_its_saved_output_is_what_it_prints(monkeypatch):
    """Cells run in order in one namespace. Numbers may differ from one CPU to another, and so may
    the stories that the model tells (cells with the tag "story"); all other words are compared.
    Cells with the tag "picture" need matplotlib."""
    monkeypatch.chdir(TOUR.parent)
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    names, pictures = {}, 0
    for cell in cells:
        tags, printed = cell["metadata"].get("tags", []), io.StringIO()
        if "picture" in tags:
            pictures += any("image/png" in output.get("data", {}) for output in cell["outputs"])
            if matplotlib is None:
                continue
        source = "".join(cell["source"]).replace("%matplotlib inline\n", "")
        with contextlib.redirect_stdout(printed):
            exec(compile(source, TOUR.name, "exec"), names)
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        if "story" not in tags:
            assert without_numbers(printed.getvalue()) == without_numbers(saved_text(cell)), source
    torch.set_grad_enabled(False)
    assert pictures >= 2 and len(cells) > 10
