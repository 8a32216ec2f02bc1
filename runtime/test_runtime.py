"""What surrounds the method: checkpoints from anyone, text, the command line, processes."""
import errno
import functools
import http.server
import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, find, given, settings, target
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cache
import lorc
from runtime import bounds, cli as command, distributed, fast, jobs as running
from runtime.text import Stream, Tokenizer
import model
import theory
from cache import Basis, BiBranchCache, CompressedCache, FullCache

from test_lorc import HERE, LLAMA3, RAW, REAL, VARIANTS, beside, bibranch, cli, close, formula_weights, full, numpy_llama, real, small, tensor_shapes, write_checkpoint


def test_perplexity_is_that_of_the_windows_one_by_one(capsys, tmp_path):
    """exp of the mean over predicted tokens: each window of 10 predicts its last 9; 25 tokens, 22 of them."""
    folder, text = write_checkpoint(tmp_path, RAW), [5 * i % 61 for i in range(25)]
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in text))
    weights = formula_weights(RAW)
    nats = [-math.log(np.exp(row - row.max())[y] / np.exp(row - row.max()).sum())
            for a in (0, 10, 20) for row, y in zip(numpy_llama(RAW, weights, text[a:a + 10]), text[a + 1:a + 10])]
    for kind in ("full", "bibranch"):              # a window of 32 sees everything exactly
        status, out, _ = cli(capsys, "--model", folder, "--perplexity", tmp_path / "text", "--context", 10,
                             "--cache", kind, "--json")
        got = json.loads(out)
        assert status == 0 and got["tokens"] == len(nats) == 22
        assert math.isclose(got["perplexity"], math.exp(sum(nats) / 22), rel_tol=1e-5)


def test_too_little_text_to_score_or_to_calibrate_on_is_said(capsys, tmp_path):
    """A context of one token leaves nothing to score; only the first 32 windows count for a calibration."""
    one = write_checkpoint(tmp_path, RAW | {"max_position_embeddings": 1})
    text = str(HERE / "test_lorc.py")
    for args, word in ((["--model", one, "--perplexity", HERE / "LICENSE", "--cache", "full"], "too short to score"),
                       (["--plan", "--calibrate", text, "--sinks", 510], "gives 64 tokens")):
        status, out, err = cli(capsys, *args)
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err


def test_a_model_that_overflows_its_dtype_says_so(capsys, tmp_path):
    weights = {k: v * 300 for k, v in formula_weights(RAW).items()}
    folder = write_checkpoint(tmp_path, RAW, weights)
    status, out, err = cli(capsys, "--model", folder, "--prompt", "w1 w2", "--cache", "full", "--dtype", "float16")
    assert status == 2 and "overflows in float16" in err and err.count("\n") == 1


# The report, --json, --compare, --save --------------------------------------------------- by hand ---

def test_json_reports_the_bytes_of_the_tensors_held(capsys, real):
    """bytes = 4 bytes * capacity * sum of (d_k + d_v); capacity = prompt + new - 1; full: Eq. 4 twice [E14]."""
    status, out, err = cli(capsys, "--model", REAL, "--prompt", "Once upon a time", "--max-new-tokens", 5, "--json")
    got, c = json.loads(out), real[0].config
    capacity = len(real[1].encode("Once upon a time")) + 4
    assert status == 0 and got["cache"]["kind"] == "compressed" and isinstance(got["text"], str)
    assert got["cache"]["full_bytes"] == 4 * capacity * 2 * c.layers * c.kv_width
    assert got["cache"]["dtype"] == "float32"
    assert got["cache"]["bytes"] == 4 * capacity * sum(r["d_k"] + r["d_v"] for r in got["plan"])
    assert abs(got["cache"]["kept"] - 0.6) <= 0.5 / c.kv_width and got["tokens"] == 5
    assert set(got["seconds"]) == {"load", "bases", "prefill", "decode"}
    assert 0 <= max(r["error_v"] for r in got["plan"]) <= 1.000001


def test_the_reported_error_is_that_of_the_keys_of_the_prompt(real):
    """||k - U U^T k|| / ||k|| of layer 0, whose input no compression has touched yet."""
    llama, _, tokens = real
    bases = lorc.compress(llama, kept=0.5, schedule="uniform")[1]
    with running.measuring(llama, bases) as errors:
        llama.hidden(tokens, lorc.new_caches(llama, "compressed", tokens.shape[1], bases))
    layer = llama.layers[0]
    k = layer.attn.Wk(layer.attn_norm(llama.embed(tokens)))
    lost = k - k @ bases[0][0].up @ bases[0][0].up.T
    assert math.isclose(errors[0][0], lost.norm() / k.norm(), rel_tol=1e-4)


def test_compare_runs_the_three_caches(capsys):
    status, out, err = cli(capsys, "--model", REAL, "--prompt", "Once upon a time", "--compare", "--max-new-tokens", 8)
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["full"], ["compressed"], ["bibranch"])]
    assert status == 0 and [r[0] for r in rows] == ["full", "compressed", "bibranch"]
    first = rows[0].index("first")
    assert rows[0][2] == "100.0%" and rows[0][first + 1] == rows[0][first + 3]
    assert ("the bi-branch cache compressed nothing here" in err) == (rows[2][2] == "100.0%")
    ask = ["--model", REAL, "--prompt", "Once", "--compare", "--max-new-tokens", 8, "--sinks", 2]
    for more, nothing in ((["--window", 16], True), (["--window", 2], False),
                          (["--window", 16, "--prompt", "Once upon a time, in a far and cold land, a dog sat on a mat."], False)):
        assert ("compressed nothing" in cli(capsys, *ask, *more)[2]) == nothing


def test_a_text_with_carriage_returns_is_the_text_without(tmp_path):
    (tmp_path / "dos").write_bytes(b"One day\r\na cat\r\n")
    assert running.read_text(tmp_path / "dos") == "One day\na cat\n"


# The documents ------------------------------------------------------------------------- by hand ---

def test_readme_and_parser_know_the_same_flags():
    listed = set(re.findall(r"`(--[\w-]+)`", (HERE / "README.md").read_text().split("## The command line")[1]))
    assert listed - {"--help"} == {o for a in command.command_line()._actions for o in a.option_strings} - {"-h", "--help"}


def test_help_answers_before_torch_is_imported():
    program = "import sys, runpy; sys.argv = ['lorc.py', '--help']\ntry: runpy.run_path('lorc.py', run_name='__main__')\n" \
              "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A good checkpoint of 64 positions, good/, and beside it what a row below points at."""
    d = tmp_path_factory.mktemp("places")
    good, other = write_checkpoint(d / "good", RAW), write_checkpoint(d / "tied", RAW | VARIANTS["tied"])
    for name, data in {"empty": b"", "blank": b" \n", "latin": b"caf\xe9", "binary": bytes(range(256)), "one": b"w1",
                       "text": b"w1 w2 w3 " * 9, "bases.safetensors": b"junk"}.items():
        (d / name).write_bytes(data)
    for folder, bases in ((other, "b_other"), (good, "b_good"), (good, "b_kind"), (good, "b_plan")):
        assert command.main(["--model", str(folder), "--save", str(d / bases)]) == 0
    (d / "b_kind" / "bases.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    path = d / "b_plan" / "bases.safetensors"
    path.write_bytes(path.read_bytes().replace(b'\\"ranks\\": [[16', b'\\"ranks\\": [[99'))
    return d


WRONG = [line.split(" -> ") for line in """
                        -> nothing to do: give --prompt
--prompt w1 --perplexity {d}/text   -> not allowed with
--prompt w1 --plan      -> not allowed with
--plan --compile        -> nothing is said without --prompt; leave out --compile
--prompt w1 --compile --max-new-tokens 1 -> the only new token comes with the prompt; leave out --compile
--prompt                -> --prompt: expected one argument
--nonsense              -> unrecognized arguments: --nonsense
--prompt w1 --temp 1    -> unrecognized arguments: --temp
--prompt w1 w2          -> unrecognized arguments: w2
--prompt w1 --kept 0    -> --kept: should be a fraction in (0, 1], not '0'
--prompt w1 --kept 1.5  -> --kept: should be a fraction
--prompt w1 --kept nan  -> --kept: should be a fraction
--prompt w1 --kept half -> --kept: should be a fraction in (0, 1], not 'half'
--prompt w1 --kept 0.05 -> kept 0.05 cannot be reached
--prompt w1 --kept 0.5 --d-min 3    -> --d-min: not allowed with argument --kept
--prompt w1 --d-min 0   -> --d-min: should be a positive count up to 10^9
--prompt w1 --d-min 2.5 -> --d-min: should be a positive count up to 10^9
--prompt w1 --d-min 17  -> --d-min 17 is above the KV width G*d = 16
--prompt w1 --threshold nan         -> --threshold: should be a number
--prompt w1 --schedule linear       -> --schedule: invalid choice
--prompt w1 --skip -1   -> --skip: should be a count
--prompt w1 --skip 2    -> --skip 2 leaves none of the model's 2 layers to compress
--prompt w1 --split 2   -> --split: should be a number in [-1, 1], not '2'
--prompt w1 --split nan -> --split: should be a number
--prompt w1 --basis pca -> --basis: invalid choice: 'pca'
--prompt w1 --basis whitened        -> --basis whitened needs --calibrate FILE
--prompt w1 --basis asvd            -> --basis asvd needs --calibrate FILE
--prompt w1 --basis svd --calibrate {d}/text         -> --basis svd uses no text; leave out --calibrate
--prompt w1 --calibrate /nowhere    -> /nowhere: No such file
--prompt w1 --calibrate {d}/empty   -> {d}/empty holds no text
--prompt w1 --calibrate {d}/binary  -> {d}/binary is not UTF-8 text (byte 128)
--prompt w1 --calibrate {d}/one     -> calibrating needs 16
--prompt w1 --calibrate {d}/text --sinks 9999        -> calibrating needs 16
--prompt w1 --bases /nowhere        -> /nowhere holds no bases.safetensors; give the folder
--prompt w1 --bases {d}/text        -> {d}/text holds no bases.safetensors; give the folder
--prompt w1 --bases {d}/b_kind      -> {d}/b_kind/bases.safetensors holds no bases
--prompt w1 --bases {d}/b_other     -> was made for another model; make new ones with --save
--prompt w1 --bases {d}/b_plan      -> {d}/b_plan/bases.safetensors holds no bases that can be read; make some with --save
--prompt w1 --bases x --kept 0.5    -> --bases brings its own plan; leave out --kept
--prompt w1 --bases x --threshold 0 -> --bases brings its own plan; leave out --threshold
--prompt w1 --bases x --save y      -> --bases brings its own plan; leave out --save
--prompt w1 --cache half            -> --cache: invalid choice: 'half' (choose from
--prompt w1 --cache full --kept 0.5 -> --cache full keeps everything; leave out --kept
--prompt w1 --cache full --bases x  -> --cache full keeps everything; leave out --bases
--prompt w1 --compare --cache full  -> --compare runs all three caches; leave out --cache
--prompt w1 --sinks 1   -> only --cache bibranch has two branches, and only --calibrate leaves sinks out; leave out --sinks
--prompt w1 --bits 4    -> only --cache bibranch has two branches
--prompt w1 --cache bibranch --window -1             -> --window: should be a count up to 10^9, not '-1'
--prompt w1 --cache bibranch --sinks 1e3             -> --sinks: should be a count up to 10^9, not '1e3'
--prompt w1 --cache bibranch --bits 3                -> --bits: should be a number, 16 or 4, not '3'
--prompt w1 --cache bibranch --bits 8                -> --bits: invalid choice: 8 (choose from
--prompt w1 --cache bibranch --bits four             -> --bits: should be a number, 16 or 4, not 'four'
--plan --compare        -> no cache is filled without --prompt or --perplexity; leave out --compare
--plan --cache bibranch -> no cache is filled without --prompt or --perplexity; leave out --cache
--plan --seed 3         -> nothing is said without --prompt; leave out --seed
--plan --json=yes       -> --json: ignored explicit argument
--prompt w1 --context 9 -> nothing is scored without --perplexity; leave out --context
--prompt w1 --max-tokens 9          -> leave out --max-tokens
--prompt w1 --max-new-tokens 0      -> --max-new-tokens: should be a positive count up to 10^9
--prompt w1 --temperature -1        -> --temperature: should be a number >= 0
--prompt w1 --temperature inf       -> --temperature: should be a number >= 0
--prompt w1 --temperature 1 --top-p 2                -> --top-p: should be a fraction in (0, 1]
--prompt w1 --temperature 1 --seed x                 -> --seed: should be a count up to 10^9, not 'x'
--prompt w1 --seed 3    -> nothing is drawn at temperature 0; leave out --seed
--prompt w1 --temperature 0 --top-p 0.9              -> nothing is drawn at temperature 0; leave out --top-p
--prompt w1 --chat      -> no chat template; leave out --chat
--prompt ''             -> the prompt is empty
--prompt '  '           -> the prompt is empty
--prompt '<|endoftext|>' --model {tiny}              -> only special tokens
--prompt \udcff         -> cannot read the text: 'utf-8' codec can't encode
--prompt w1 --model /nowhere        -> /nowhere is not a folder; --model takes one
--prompt w1 --model {d}/text        -> {d}/text is not a folder; --model takes one
--prompt w1 --model {d} -> {d} holds no config.json; give a folder
--prompt w1 --model=    -> --model: should not be empty
--prompt w1 --save=     -> --save: should not be empty
--prompt - --calibrate -            -> standard input can be read once
--prompt w1 --model {d}/{long}      -> File name too long
--prompt w1 --device abacus         -> --device abacus cannot be used; here: cpu
--prompt w1 --device gpu            -> --device gpu cannot be used; here: cpu
--prompt w1 --device meta           -> --device meta cannot be used
--prompt w1 --device cuda:99        -> --device cuda:99 cannot be used
--prompt w1 --dtype int8            -> --dtype: invalid choice: 'int8'
--prompt w1 --save {d}/text         -> --save {d}/text: File exists
--prompt w1 --save {d}/text/x       -> --save {d}/text/x: Not a directory
--perplexity /nowhere   -> /nowhere: No such file
--perplexity /nowhere --model /no-model              -> /nowhere: No such file
--perplexity {d}        -> {d}: Is a directory
--perplexity /proc/self/mem         -> /proc/self/mem: Input/output error
--perplexity {d}/empty  -> {d}/empty holds no text
--perplexity {d}/blank  -> {d}/blank holds no text
--perplexity {d}/latin  -> {d}/latin is not UTF-8 text (byte 3)
--perplexity {d}/one    -> {d}/one is too short to score
--perplexity {d}/text --context 1   -> --context: should be a count > 1
--perplexity {d}/text --context 65  -> --context 65 is beyond the model's 64 positions
--perplexity {d}/text --max-tokens 1                 -> --max-tokens: should be a count > 1
--perplexity {d}/text --chat        -> nothing is said without --prompt; leave out --chat
""".strip("\n").splitlines()]


@pytest.mark.parametrize("line, word", WRONG, ids=[line.strip() for line, _ in WRONG])
def test_a_wrong_command_ends_with_one_line_and_status_2(line, word, places, capsys):
    names = {"d": places, "tiny": HERE / "tiny", "long": "x" * 300}
    args = [a.encode().decode("unicode_escape") if "\\" in a else a for a in shlex.split(line.format(**names), posix=True)]
    status, out, err = cli(capsys, "--model", places / "good", *args)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("lorc: ") and word.format(**names) in err


def test_the_table_of_wrong_commands_is_as_long_as_promised():
    assert len(WRONG) >= 60


# Full disks, closed pipes, Ctrl-C --------------------------------------------------------- by hand ---

@pytest.fixture
def start(tmp_path):
    """Start lorc.py on a small model without an end token; what still runs after the test is killed."""
    raw = {k: v for k, v in RAW.items() if k != "eos_token_id"} | {"max_position_embeddings": 10**5}
    folder, running = write_checkpoint(tmp_path, raw), []

    def run(*args, stdout=subprocess.PIPE):
        command = [sys.executable, str(HERE / "lorc.py"), "--model", str(folder), "--prompt", "w1", *args]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}      # as users have it
        running.append(subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, bufsize=0, env=env))
        return running[-1]
    yield run
    for process in running:
        with process:
            process.kill()


def test_ctrl_c_a_closed_pipe_and_a_full_disk_end_without_a_traceback(start):
    """130 with the text so far and the report; 141 after `| head -c 1`; 2 with one line when standard output is full."""
    stopped, closed = start("--max-new-tokens", "100000", "--cache", "bibranch"), start("--json")
    with open("/dev/full", "w") as full:
        disk = start("--json", stdout=full)
    closed.stdout.close()
    text = stopped.stdout.read(1)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and text == b" " and out.endswith(b"\n") and b"Traceback" not in err
    said = int(re.search(rb"(\d+) tokens; seconds", err)[1])            # the last may be cut off before its text
    assert b"bibranch cache: " in err and b"\ninterrupted\n" in err and said - len(out.split()) in (0, 1)
    for process, status, last in ((closed, 141, b""), (disk, 2, b"No space left on device\n")):
        err = process.stderr.read()
        assert process.wait(timeout=60) == status and err.endswith(last) and err.count(b"\n") == bool(last), err


@pytest.mark.parametrize("error, word", [
    (MemoryError(), "not enough memory"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left"), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141),
    (UnicodeEncodeError("ascii", "so \u201c", 3, 4, "not in range"), "takes only ascii, and the text has '\\u201c'")])
def test_what_ends_a_command_is_told_in_a_line(error, word, capsys, monkeypatch):
    def fail(args):
        raise error
    monkeypatch.setattr(running, "run", fail)
    status, out, err = cli(capsys, "--prompt", "w1")
    assert (status, err) == (word, "") if isinstance(word, int) else status == 2 and word in err and err.count("\n") == 1
    with monkeypatch.context() as closed:                        # >&-
        closed.setattr(running, "run", lambda args: 0)
        closed.setattr(sys, "stdout", None)
        assert command.main(["--prompt", "w1"]) == 0
    monkeypatch.setattr(running, "run", lambda args: [][0])
    with pytest.raises(IndexError):                             # a fault of ours is not hidden
        command.main(["--prompt", "w1"])


def test_a_dtype_that_the_device_lacks_ends_with_one_line(capsys, monkeypatch):
    def lacks(*shape, dtype=None, device=None):
        raise RuntimeError("BFloat16 is not supported")
    monkeypatch.setattr(torch, "ones", lacks)
    status, out, err = cli(capsys, "--prompt", "w1", "--dtype", "bfloat16")
    assert status == 2 and "--device cpu cannot be used with bfloat16; here: cpu" in err and err.count("\n") == 1


@pytest.mark.parametrize("args, word", [
    (["--kept", "2"], "--kept: should be a fraction in [0.01, 0.99], not '2'"), (["--model", "/nowhere"], "/nowhere is not a folder"),
    (["--prompt", "bird " * 600], "tokens; give 1 to 511"), (["--mod", "x"], "unrecognized arguments")])
def test_theory_answers_a_wrong_command_in_its_own_name(args, word, capsys):
    try:
        status = bounds.main(args)
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("theory: ") and word in err


def test_a_prompt_that_is_empty_or_too_long_ends_with_one_line(capsys, tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    for prompt, word in (("", "empty"), ("w1 " * 65, "context is 64")):
        status, out, err = cli(capsys, "--model", folder, "--prompt", prompt, "--cache", "full")
        assert status == 2 and out == "" and word in err and err.count("\n") == 1
    status, out, err = cli(capsys, "--model", folder, "--prompt", "w1 " * 60, "--cache", "full")
    assert status == 0 and "stopped at the model's context" in err
