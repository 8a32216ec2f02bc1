"""Every experiment runs at its smallest, and scores the caches that lorc makes."""
import importlib
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

import lorc
import theory

from runtime.testing import HERE, cli
from runtime.testing import real  # noqa: F401 (fixture)


# The experiments ----------------------------------------------------------------------- parity ---

SHORT = str(HERE / "LICENSE")             # instead of the bundled text, of which 32 windows are read
SMALLEST = {"study": {"LOSS_TOKENS": 512, "BUNDLED_TEXT": SHORT}, "front": {"KEPT_LORC": (0.6,)},
            "loss_metric": {"SEEDS": (0, 1), "WINDOWS": (1,), "KEPT": (0.6,), "KEPT_EXACT": (0.6,),
                            "KEPT_WINDOWS": (0.6,), "BUNDLED_TEXT": SHORT},
            "recall": {"RECORDS": 4, "LINES": (2, 3), "RANKED": 2, "WINDOWS": (2, 32), "WINDOW_LINES": 3},
            "tasks": {"QUESTIONS": 3, "PROBLEMS": 3, "SHOTS": 1, "PROMPT": 60, "ANSWER": 8}}


def make_smaller(run_all, patch):
    """The smallest settings with which every script still does all that it does."""
    for script in run_all.SCRIPTS:
        if isinstance(getattr(script, "KEPT", None), tuple):
            patch.setattr(script, "KEPT", [k for k in script.KEPT if k >= 0.6][:2])
        patch.setattr(script, "SPLITS", (0, 0.1), raising=False)
    for name, settings in SMALLEST.items():
        for setting, value in settings.items():
            patch.setattr(getattr(run_all, name), setting, value)


def write_questions(folder):
    """Files like LongEval's, BoolQ's, OpenBookQA's and GSM8K's, with four questions each."""
    record = "".join(f"line {a}-{b}: REGISTER_CONTENT is <{17 * i + 31 * j}>\n"
                     for i, a in enumerate(("red", "big", "old", "sad"), 1)
                     for j, b in enumerate(("dog", "cat", "car"), 1))
    choices = "Answer1: a dog Answer2: a cat Answer3: a car Answer4: a park"
    files = {"longeval/200_lines.jsonl": {"prompt": f"Now the record start:\n\n{record}"},
             "boolq/validation_std.jsonl": {"passage": "Tom has a dog.", "question": "has tom a dog",
                                            "answer": True},
             "openbookqa/test.json": {"answer": "answer1", "instruction": "the correct answer to the question: "
                                      f"Tom has\n\n{choices}\n\nAnswer format: answer1/answer2"},
             "gsm8k/test.jsonl": {"question": "Tom has 2 dogs and 3 cats. How many?", "answer": "2 + 3\n#### 5"}}
    for name, item in files.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        items = [item] * 4
        path.write_text(json.dumps(items) if name.endswith("json") else "\n".join(map(json.dumps, items)))


@pytest.fixture(scope="session")
def every_experiment(tmp_path_factory):
    """{script: rows} of all tables and figures at their smallest, on tiny/."""
    import run_all
    out, text = tmp_path_factory.mktemp("results"), str(HERE / "tiny" / "README.md")
    try:
        import matplotlib                                                      # noqa: F401
        draw = ["--figures", str(out)]
    except ImportError:
        draw = ["--measure-only"]
    write_questions(out / "data")
    argv = ["--text", text, "--second", str(HERE / "LICENSE"), "--calibrate", text, "--tokens", "64",
            "--data", str(out / "data"), "--device", "cpu", "--out", str(out), *draw]
    with pytest.MonkeyPatch.context() as patch:
        make_smaller(run_all, patch)
        assert run_all.study.main(*run_all.SCRIPTS, argv=argv) == 0
    return {path.stem.removesuffix("-tiny"): json.loads(path.read_text())["rows"]
            for path in out.glob("*-tiny.json")}


def test_every_table_and_figure_is_run_and_listed(every_experiment):
    """Every script with a `measure` is run by run_all.py and has a line in experiments/README.md."""
    scripts = {p.stem for p in (HERE / "experiments").glob("*.py") if "\ndef measure(study)" in p.read_text()}
    assert set(every_experiment) == scripts and len(scripts) > 10
    listed = re.findall(r"^\| `(\w+)\.py`", (HERE / "experiments" / "README.md").read_text(), re.M)
    assert scripts <= set(listed)
    for name, rows in every_experiment.items():
        assert rows and all(math.isfinite(row.get("perplexity", 0)) for row in rows), name


TEXT = str(HERE / "tiny" / "README.md")


@pytest.mark.parametrize("script, flags, read", [
    ("distill", ["--text", TEXT, "--test", TEXT, "--context", 48, "--steps", 2, "--every", 1, "--batch", 2,
                 "--max-tokens", 48], lambda r: r["perplexity"]["README.md"]["after"]),
    ("cskv_finetune", ["--text", TEXT, "--layers", 0, "--windows", 2, "--steps", 2, "--every", 1],
     lambda r: r["curves"][-1]["loss"]["svd"][0][0]),
    ("bench", ["--model", HERE / "tiny", "--dtype", "float32", "--context", 40, "--steps", 6, "--rounds", 1,
               "--how", "eager", "--transformers", "none"], lambda r: r["tables"][0]["rows"]["full eager"]["ms"]),
    ("dtypes", ["--model", HERE / "tiny", "--text", TEXT, "--calibrate", HERE / "LICENSE", "--tokens", 24, "--windows", 1],
     lambda r: r["caches"]["bibranch"]["bfloat16"]["perplexity"]),
    ("svd_speed", ["--sample", 1], lambda r: r["numpy_float64_over_ours"]),
])
def test_other_experiments_run_at_their_smallest(script, flags, read, tmp_path, monkeypatch, capsys):
    """On tiny/, to a result file with the number that README or the next script reads, and its origin.

    Not here: what needs lm_eval, transformers, CUDA, the network or a teacher."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    module, out = importlib.import_module(script), tmp_path / ("" if script == "distill" else "result.json")
    monkeypatch.setattr(module, "ROWS", 32, raising=False)               # svd_speed's matrices
    monkeypatch.setattr(module, "COLUMNS", 64, raising=False)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--device", "cpu", "--out", str(out)])
    with torch.enable_grad():
        module.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < read(result) < math.inf and {"device", "torch", "commit", "command"} <= set(result)


UNIFORM = ["--kept", "0.6", "--schedule", "uniform"]


@pytest.mark.parametrize("script, label, flags, basis", [
    ("front", "full", ["--cache", "full"], None), ("front", "LoRC, Eq. 13", ["--kept", "0.6"], None),
    ("lorc_fig2", "LoRC, first whole, uniform", [*UNIFORM, "--skip", "1"], None),
    ("cskv_starts", "ASVD", [*UNIFORM, "--cache", "bibranch"], "asvd"),
    ("cskv_bits", "4 bits, ours", [*UNIFORM, "--cache", "bibranch", "--bits", "4"], "whitened"),
])
def test_experiments_score_the_caches_that_lorc_makes(every_experiment, script, label, flags, basis, capsys):
    """A row's perplexity and bytes (of 16-bit models) are those of `lorc.py --perplexity` with its flags."""
    text = str(HERE / "tiny" / "README.md")
    flags = ["--perplexity", text, "--max-tokens", "64", "--device", "cpu", "--json", *flags]
    calibrated = ["--basis", basis, "--calibrate", text] if basis else []
    said = json.loads(cli(capsys, *flags, *calibrated)[1])
    half = json.loads(cli(capsys, *flags, "--dtype", "bfloat16")[1])["cache"]
    row, = [r for r in every_experiment[script] if r["label"] == label and r["wanted"] in (0.6, 1)]
    assert math.isclose(row["perplexity"], said["perplexity"], rel_tol=1e-4)
    assert (row["bytes"], row["full_bytes"]) == (half["bytes"], half["full_bytes"])


def test_the_exact_error_of_fig_4_is_the_one_measured_on_the_text(real, monkeypatch):
    """lorc_fig4's error from the second moment = ||k - k~|| / ||k|| summed over the tokens themselves."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    import lorc_fig4
    llama, _, tokens = real
    x, W = theory.layer_inputs(llama, tokens)[-1], llama.layers[-1].attn.Wv.weight.double()
    (lam, U), d_c, k = lorc.spectrum(W), len(W) // 3, x @ W.T
    found = lorc_fig4.errors(W, x.T @ x / len(x), d_c, lam, U, U)
    lost = (k - k @ U[:, :d_c] @ U[:, :d_c].T).norm() / k.norm()
    assert math.isclose(found["activations"], lost, rel_tol=1e-6) and found["activations"] <= found["bound"]
    assert math.isclose(found["weights"], theory.reconstruction_error(W, d_c), rel_tol=1e-6)


def test_a_step_costs_as_readme_says_of_the_length(monkeypatch):
    """The recorded run on the H200: every cache within 2 % of a straight line. Kills: a fit of another degree."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    import lengths
    run = json.loads((HERE / "experiments" / "results" / "lengths-llama-3-8b-h200.json").read_text())
    assert all(lengths.straightness(n, times)[1] < 0.02 for n, times, _ in lengths.series(run).values())
    slope, off = lengths.straightness(np.array([0, 1, 2]), np.array([0, 0, 6.0]))         # 3x - 1 is nearest: off by 2
    assert math.isclose(slope, 3) and math.isclose(off, 1 / 3)
