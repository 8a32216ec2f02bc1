"""The command line: what is printed where, what is refused, and how a command ends."""
import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from runtime import cli as command, jobs
from runtime.testing import (HERE, RAW, REAL, VARIANTS, cli, formula_weights, numpy_llama,
                             write_checkpoint)
from runtime.testing import real  # noqa: F401 (fixture)


# Results -----------------------------------------------------------------------------------------

def test_perplexity_is_that_of_the_windows_one_by_one(capsys, tmp_path):
    """exp of the mean of -ln p over predicted tokens, by the loop-only NumPy model.

    Each window of 10 predicts its last 9: 22 of 25 tokens. The bi-branch cache's own window of 32
    sees everything exactly.
    """
    folder, text = write_checkpoint(tmp_path, RAW), [5 * i % 61 for i in range(25)]
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in text))
    weights, nats = formula_weights(RAW), []
    for start in (0, 10, 20):
        rows = numpy_llama(RAW, weights, text[start:start + 10])
        for row, y in zip(rows, text[start + 1:start + 10]):
            p = np.exp(row - row.max())
            nats.append(-math.log(p[y] / p.sum()))
    for kind in ("full", "bibranch"):
        status, out, _ = cli(capsys, "--model", folder, "--perplexity", tmp_path / "text",
                             "--context", 10, "--cache", kind, "--json")
        got = json.loads(out)
        assert status == 0 and got["tokens"] == len(nats) == 22
        assert math.isclose(got["perplexity"], math.exp(sum(nats) / 22), rel_tol=1e-5)


def test_json_reports_the_bytes_of_the_actual_buffers(capsys, real):  # noqa: F811
    """bytes = 4 * capacity * sum of (d_k + d_v), with capacity = prompt + new - 1, in float32.

    A full cache has Eq. 4 twice [E14].
    """
    status, out, err = cli(capsys, "--model", REAL, "--prompt", "Once upon a time",
                           "--max-new-tokens", 5, "--json")
    got, c = json.loads(out), real[0].config
    capacity = len(real[1].encode("Once upon a time")) + 4
    assert status == 0 and got["cache"]["kind"] == "compressed" and isinstance(got["text"], str)
    assert got["cache"]["full_bytes"] == 4 * capacity * 2 * c.layers * c.kv_width
    assert got["cache"]["dtype"] == "float32"
    ranks = sum(row["d_k"] + row["d_v"] for row in got["plan"])
    assert got["cache"]["bytes"] == 4 * capacity * ranks
    assert abs(got["cache"]["kept"] - 0.6) <= 0.5 / c.kv_width and got["tokens"] == 5
    assert set(got["seconds"]) == {"load", "bases", "prefill", "decode"}
    assert 0 <= max(row["error_v"] for row in got["plan"]) <= 1.000001


def test_compare_runs_the_three_caches(capsys):
    """A row per cache: bytes, their fraction, the divergence, and the tokens that agree."""
    ask = ["--model", REAL, "--prompt", "Once upon a time", "--compare", "--max-new-tokens", 8]
    status, out, err = cli(capsys, *ask)
    rows = [line.split() for line in out.splitlines()
            if line.split()[:1] in (["full"], ["compressed"], ["bibranch"])]
    assert status == 0 and [row[0] for row in rows] == ["full", "compressed", "bibranch"]
    assert rows[0][2:4] == ["100.0%", "0"] and rows[0][-3:] == ["8", "of", "8"]
    assert abs(float(rows[1][2].rstrip("%")) - 60) < 1 and float(rows[1][3]) > 0
    assert ("the bi-branch cache compressed nothing" in err) == (rows[2][2] == "100.0%")


def test_a_cache_that_compressed_nothing_is_called_so_if_that_holds_for_all_prompts(capsys):
    ask = ["--model", REAL, "--prompt", "Once", "--compare", "--max-new-tokens", 8, "--sinks", 2]
    longer = ["--prompt", "Once upon a time, in a far and cold land, a dog sat on a mat."]
    for more, nothing in ((["--window", 16], True), (["--window", 2], False),
                          (["--window", 16, *longer], False)):
        assert ("compressed nothing" in cli(capsys, *ask, *more)[2]) == nothing


def test_a_text_with_carriage_returns_is_the_text_without(tmp_path):
    (tmp_path / "dos").write_bytes(b"One day\r\na cat\r\n")
    assert jobs.read_text(tmp_path / "dos") == "One day\na cat\n"


# The documents -----------------------------------------------------------------------------------

def test_help_answers_before_torch_is_imported():
    program = ("import sys, runpy; sys.argv = ['lorc.py', '--help']\n"
               "try: runpy.run_path('lorc.py', run_name='__main__')\n"
               "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Wrong commands ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A good checkpoint of 64 positions, good/, and beside it what the rows below point at."""
    d = tmp_path_factory.mktemp("places")
    good = write_checkpoint(d / "good", RAW)
    other = write_checkpoint(d / "tied", RAW | VARIANTS["tied"])
    for name, data in {"empty": b"", "blank": b" \n", "latin": b"caf\xe9",
                       "binary": bytes(range(256)), "one": b"w1", "text": b"w1 w2 w3 " * 9,
                       "bases.safetensors": b"junk"}.items():
        (d / name).write_bytes(data)
    for folder, bases in ((other, "b_other"), (good, "b_kind"), (good, "b_plan")):
        assert command.main(["--model", str(folder), "--save", str(d / bases)]) == 0
    weights = (good / "model.safetensors").read_bytes()
    (d / "b_kind" / "bases.safetensors").write_bytes(weights)
    path = d / "b_plan" / "bases.safetensors"
    path.write_bytes(path.read_bytes().replace(b'\\"ranks\\": [[16', b'\\"ranks\\": [[99'))
    return d


WRONG = [line.split(" -> ") for line in """
 -> nothing to do: give --prompt
--compare -> nothing to compare: give --prompt TEXT or --perplexity FILE
--prompt w1 --calib -> unrecognized arguments: --calib; did you mean --calibrate?
--prompt w1 --perplexity {d}/text -> not allowed with
--prompt w1 --plan -> not allowed with
--plan --compile -> no text is generated without --prompt; leave out --compile
--prompt w1 --compile --max-new-tokens 1 -> the only new token is computed together with the prompt
--prompt -> --prompt: expected one argument
--nonsense -> unrecognized arguments: --nonsense
--prompt w1 --temp 1 -> unrecognized arguments: --temp
--prompt w1 w2 -> unrecognized arguments: w2
--prompt w1 --kept 0 -> --kept: should be a fraction in (0, 1], not '0'
--prompt w1 --kept 1.5  -> --kept: should be a fraction
--prompt w1 --kept nan  -> --kept: should be a fraction
--prompt w1 --kept half -> --kept: should be a fraction in (0, 1], not 'half'
--prompt w1 --kept 0.05 -> kept 0.05 cannot be reached
--prompt w1 --kept 0.5 --d-min 3 -> --d-min: not allowed with argument --kept
--prompt w1 --d-min 0 -> --d-min: should be a positive count up to 10^9
--prompt w1 --d-min 2.5 -> --d-min: should be a positive count up to 10^9
--prompt w1 --d-min 17  -> --d-min 17 is above the KV width G*d = 16
--prompt w1 --threshold nan -> --threshold: should be a number
--prompt w1 --schedule linear -> --schedule: invalid choice
--prompt w1 --skip -1 -> --skip: should be a count
--prompt w1 --skip 2 -> --skip 2 leaves none of the model's 2 layers to compress
--prompt w1 --split 2 -> --split: should be a number in [-1, 1], not '2'
--prompt w1 --split nan -> --split: should be a number
--prompt w1 --basis pca -> --basis: invalid choice: 'pca'
--prompt w1 --basis whitened -> --basis whitened needs --calibrate
--prompt w1 --basis asvd -> --basis asvd needs --calibrate
--prompt w1 --basis svd --calibrate {d}/text -> --basis svd uses no text
--prompt w1 --calibrate /nowhere -> /nowhere: No such file
--prompt w1 --calibrate {d}/empty -> {d}/empty contains no text
--prompt w1 --calibrate {d}/binary  -> {d}/binary is not UTF-8 text (byte 128)
--prompt w1 --calibrate {d}/one -> calibration needs 16
--prompt w1 --calibrate {d}/text --sinks 9999 -> calibration needs 16
--prompt w1 --bases /nowhere -> /nowhere holds no bases.safetensors; give the folder
--prompt w1 --bases {d}/text -> text is a file; give the folder that holds bases.safetensors
--prompt w1 --bases {d}/b_kind -> {d}/b_kind/bases.safetensors holds no bases
--prompt w1 --bases {d}/b_other -> for another model; make new ones with --save
--prompt w1 --bases {d}/b_plan -> {d}/b_plan/bases.safetensors holds no bases that can be read
--prompt w1 --bases x --kept 0.5 -> --bases contains its own plan; leave out --kept
--prompt w1 --bases x --threshold 0 -> --bases contains its own plan; leave out --threshold
--prompt w1 --bases x --save y -> --bases contains its own plan; leave out --save
--prompt w1 --cache half -> --cache: invalid choice: 'half' (choose from
--prompt w1 --cache full --kept 0.5 -> --cache full compresses nothing; leave out --kept
--prompt w1 --cache full --bases x  -> --cache full compresses nothing; leave out --bases
--prompt w1 --compare --cache full  -> --compare runs all three caches; leave out --cache
--prompt w1 --sinks 1 -> only --cache bibranch and --calibrate treat the first tokens
--prompt w1 --bits 4 -> only --cache bibranch has latents of 4 bits; add it, or leave out --bits
--prompt w1 --cache bibranch --window -1 -> --window: should be a count up to 10^9, not '-1'
--prompt w1 --cache bibranch --sinks 1e3 -> --sinks: should be a count up to 10^9, not '1e3'
--prompt w1 --cache bibranch --bits 3 -> --bits: invalid choice: 3 (choose from
--prompt w1 --cache bibranch --bits 8 -> --bits: invalid choice: 8 (choose from
--prompt w1 --cache bibranch --bits four -> --bits: invalid int value: 'four'
--plan --compare -> no cache is filled without --prompt or --perplexity; leave out --compare
--plan --cache bibranch -> no cache is filled without --prompt or --perplexity; leave out --cache
--plan --seed 3 -> no text is generated without --prompt; leave out --seed
--plan --json=yes -> --json: ignored explicit argument
--prompt w1 --context 9 -> nothing is scored without --perplexity
--prompt w1 --max-tokens 9 -> leave out --max-tokens
--prompt w1 --max-new-tokens 0 -> --max-new-tokens: should be a positive count up to 10^9
--prompt w1 --temperature -1 -> --temperature: should be a number >= 0
--prompt w1 --temperature inf -> --temperature: should be a number >= 0
--prompt w1 --temperature 1 --top-p 2 -> --top-p: should be a fraction in (0, 1]
--prompt w1 --temperature 1 --seed x -> --seed: should be a count up to 10^9, not 'x'
--prompt w1 --seed 3 -> nothing is sampled at temperature 0; leave out --seed
--prompt w1 --temperature 0 --top-p 0.9 -> nothing is sampled at temperature 0
--prompt w1 --chat -> no chat template; leave out --chat
--prompt '' -> the prompt is empty
--prompt '  ' -> the prompt is empty
--prompt '<|endoftext|>' --model {tiny} -> only special tokens
--prompt \udcff -> cannot read the text: 'utf-8' codec can't encode
--prompt w1 --model /nowhere -> /nowhere is not a folder; --model takes one
--prompt w1 --model {d}/text -> {d}/text is not a folder; --model takes one
--prompt w1 --model {d} -> {d} holds no config.json; give a folder
--prompt w1 --model= -> --model: should not be empty
--prompt w1 --save= -> --save: should not be empty
--prompt - --calibrate - -> standard input can be read once
--prompt w1 --model {d}/{long} -> File name too long
--prompt w1 --device abacus -> --device abacus cannot be used; here: cpu
--prompt w1 --device gpu -> --device gpu cannot be used; here: cpu
--prompt w1 --device meta -> --device meta cannot be used
--prompt w1 --device cuda:99 -> --device cuda:99 cannot be used
--prompt w1 --dtype int8 -> --dtype: invalid choice: 'int8'
--prompt w1 --save {d}/text -> --save {d}/text: File exists
--prompt w1 --save {d}/text/x -> --save {d}/text/x: Not a directory
--perplexity /nowhere -> /nowhere: No such file
--perplexity /nowhere --model /no-model -> /nowhere: No such file
--perplexity {d} -> {d}: Is a directory
--perplexity /proc/self/mem -> /proc/self/mem: Input/output error
--perplexity {d}/empty  -> {d}/empty contains no text
--perplexity {d}/blank  -> {d}/blank contains no text
--perplexity {d}/latin  -> {d}/latin is not UTF-8 text (byte 3)
--perplexity {d}/one -> {d}/one is too short to score
--perplexity {d}/text --context 1 -> --context: should be a count > 1
--perplexity {d}/text --context 65  -> --context 65 is beyond the model's 64 positions
--perplexity {d}/text --max-tokens 1 -> --max-tokens: should be a count > 1
--perplexity {d}/text --chat -> no text is generated without --prompt
--prompt w1 --window 8  -> only --cache bibranch and --basis loss have a window
--prompt w1 --basis loss -> --basis loss needs --calibrate
--prompt w1 --calibrate --split 0.1 -> --basis loss, the default with --calibrate, chooses
--prompt w1 --calibrate --basis loss --schedule uniform --skip 1 -> leave out --schedule, --skip
--prompt w1 --calibrate --threshold -1e-1 -> leave out --threshold
--prompt w1 --calibrate --d-min 4 -> leave out --d-min
--prompt w1 --kept 1 --bits 4 --cache bibranch -> --bits 4 rounds latents, and --kept 1 makes none
--prompt w1 --split -1e1 -> --split: should be a number in [-1, 1], not '-1e1'
--prompt w1 --threshold -nan -> --threshold: should be a number, not '-nan'
--prompt w1 --json --verbose -> --plan and --json contain the table; leave out --verbose
--plan --verbose -> --plan and --json contain the table; leave out --verbose
--save x --verbose -> --save alone prints no table (--plan does); leave out --verbose
--prompt w1 --cache full --verbose  -> --cache full compresses nothing; leave out --verbose
--prompt w1 --calibrate= -> --calibrate: should not be empty
--prompt w1 --device mkldnn -> --device mkldnn cannot be used; here: cpu
--prompt w1 --kept 0.3 --skip 0 -> --schedule uniform reaches 0.3
""".strip("\n").splitlines()]


@pytest.mark.parametrize("line, word", WRONG, ids=[line.strip() for line, _ in WRONG])
def test_a_wrong_command_ends_with_one_line_and_status_2(line, word, places, capsys):
    names = {"d": places, "tiny": HERE / "tiny", "long": "x" * 300}
    words = [word.encode().decode("unicode_escape") if "\\" in word else word
             for word in shlex.split(line.format(**names))]
    status, out, err = cli(capsys, "--model", places / "good", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lorc: ") and word.format(**names) in err


@pytest.mark.parametrize("args, word", [
    (["--kept", "2"], "--kept: should be a fraction in [0.01, 0.99], not '2'"),
    (["--model", "/nowhere"], "/nowhere is not a folder"), (["--mod", "x"], "unrecognized"),
    (["--prompt", "bird " * 600], "tokens; give 1 to 511")])
def test_theory_answers_a_wrong_command_in_its_own_name(args, word, capsys):
    try:
        status = command.bounds_main(args)
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("theory: ") and word in err


def test_a_prompt_that_is_empty_or_too_long_ends_with_one_line(places, capsys):
    words = ["--model", places / "good", "--cache", "full", "--prompt"]
    for prompt, word in (("", "empty"), ("w1 " * 65, "context is 64")):
        status, out, err = cli(capsys, *words, prompt)
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err
    status, out, err = cli(capsys, *words, "w1 " * 60)
    assert status == 0 and "stopped at the model's context" in err


def test_too_little_text_to_score_or_to_calibrate_on_is_said(capsys, tmp_path):
    """A context of one token leaves nothing to score. Calibration reads the first 32 windows."""
    one = write_checkpoint(tmp_path, RAW | {"max_position_embeddings": 1})
    score = ["--model", one, "--perplexity", HERE / "LICENSE", "--cache", "full"]
    calibrate = ["--plan", "--calibrate", HERE / "test_lorc.py", "--basis", "whitened"]
    for args, word in ((score, "too short to score"),
                       ([*calibrate, "--sinks", 510], "gives 64 tokens")):
        status, out, err = cli(capsys, *args)
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err


def test_a_model_that_overflows_its_dtype_says_so(capsys, tmp_path):
    weights = {name: x * 300 for name, x in formula_weights(RAW).items()}
    folder = write_checkpoint(tmp_path, RAW, weights)
    status, out, err = cli(capsys, "--model", folder, "--prompt", "w1 w2", "--cache", "full",
                           "--dtype", "float16")
    assert (status, err.count("\n")) == (2, 1) and "overflows in float16" in err


def test_a_dtype_that_the_device_lacks_ends_with_one_line(capsys, monkeypatch, recwarn):
    """PyTorch's own warning, as it comes with --device mkldnn, is not printed."""
    def lacks(*shape, dtype=None, device=None):
        warnings.warn("'mkldnn' is no longer used as device type")
        raise RuntimeError("BFloat16 is not supported")
    monkeypatch.setattr(torch, "ones", lacks)
    status, out, err = cli(capsys, "--prompt", "w1", "--dtype", "bfloat16")
    assert (status, err.count("\n")) == (2, 1)
    assert "--device cpu cannot be used with bfloat16; here: cpu" in err and not recwarn.list


# How a command ends ------------------------------------------------------------------------------

@pytest.mark.parametrize("error, result", [
    (KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (MemoryError(), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "jinja2 is not installed"),
    (UnicodeEncodeError("ascii", "so \u201c", 3, 4, "not in range"),
     "takes only ascii, and the text has '\\u201c'")])
def test_what_ends_a_command_is_told_in_a_line(error, result, capsys, monkeypatch):
    def fail(args):
        raise error
    monkeypatch.setattr(jobs, "run", fail)
    status, out, err = cli(capsys, "--prompt", "w1")
    if isinstance(result, int):
        assert (status, err) == (result, "")
    else:
        assert (status, err.count("\n")) == (2, 1) and result in err


def test_standard_output_may_be_closed(monkeypatch):
    monkeypatch.setattr(jobs, "run", lambda args: 0)
    monkeypatch.setattr(sys, "stdout", None)                                            # >&-
    assert command.main(["--prompt", "w1"]) == 0


@pytest.mark.parametrize("error", [IndexError(), RuntimeError("shapes"), ValueError("a fault"),
                                   ModuleNotFoundError("x", name="runtime.jobz")])
def test_a_fault_of_this_program_is_not_hidden(error, monkeypatch):
    def fail(args):
        raise error
    monkeypatch.setattr(jobs, "run", fail)
    with pytest.raises(type(error)):
        command.main(["--prompt", "w1"])


def default_interrupt():
    """In a child: let Ctrl-C interrupt, even if the shell that started pytest ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start lorc.py on a small model without an end token; it is killed if it outlives the test."""
    raw = {k: v for k, v in RAW.items() if k != "eos_token_id"} | {"max_position_embeddings": 10**5}
    folder, started = write_checkpoint(tmp_path, raw), []

    def run(*args, stdout=subprocess.PIPE):
        words = [sys.executable, str(HERE / "lorc.py"), "--model", str(folder), "--prompt", "w1"]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}   # as users have it
        started.append(subprocess.Popen([*words, *args], stdout=stdout, stderr=subprocess.PIPE,
                                        bufsize=0, env=env, preexec_fn=default_interrupt))
        return started[-1]
    yield run
    for process in started:
        with process:
            process.kill()


def test_ctrl_c_a_closed_pipe_and_a_full_disk_end_without_a_traceback(start):
    """130 with the text so far and the report; 141 after `| head -c 1`; 2 with one line when
    standard output is full."""
    stopped = start("--max-new-tokens", "100000", "--cache", "bibranch")
    closed = start("--json")
    with open("/dev/full", "w") as full:
        disk = start("--json", stdout=full)
    closed.stdout.close()
    text = stopped.stdout.read(1)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and text == b" " and out.endswith(b"\n")
    said = int(re.search(rb"([\d,]+) tokens generated", err)[1].replace(b",", b""))
    assert said - len(out.split()) in (0, 1)            # the last one's text may be cut off
    assert b"bibranch " in err and b"\ninterrupted\n" in err and b"Traceback" not in err
    last = b"No space left on device\n"
    for process, status, line in ((closed, 141, b""), (disk, 2, last)):
        err = process.stderr.read()
        assert process.wait(timeout=60) == status and err.endswith(line), err
        assert err.count(b"\n") == bool(line), err


# Packages that cannot be imported, and standard error --------------------------------------------

def stand_in(tmp_path, code):
    """Environment in which `import torch` runs this code instead."""
    (tmp_path / "torch.py").write_text(code)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("script", ["lorc.py", "theory.py"])
@pytest.mark.parametrize("safe_path", [False, True])
@pytest.mark.parametrize("code, word", [
    ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
     "the package torch is not installed; run pip install -r requirements.txt"),
    ("raise ImportError('libtorch_cpu.so: failed to map segment\\nfrom shared object')",
     "cannot import torch (libtorch_cpu.so: failed to map segment); either there is too little"),
    ("raise MemoryError", "cannot import torch (MemoryError)")])
def test_a_failing_import_ends_with_one_line(code, word, safe_path, script, tmp_path):
    env = stand_in(tmp_path, code) | ({"PYTHONSAFEPATH": "1"} if safe_path else {})
    words = ["--prompt", "w1"]
    done = subprocess.run([sys.executable, script, *words], cwd=HERE, env=env, timeout=60,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"{script[:-3]}: {word}")


def test_a_failing_import_of_ours_is_not_hidden(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'runtime.jobz'", name="runtime.jobz")
    monkeypatch.setattr(command.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError):
        command.main(["--plan"])


def test_ctrl_c_while_modules_are_imported_ends_with_130_and_no_traceback(tmp_path):
    """Interrupted while `import torch` runs; it would swallow the KeyboardInterrupt."""
    env = stand_in(tmp_path, "import time\nprint('importing', flush=True)\n"
                             "try: time.sleep(60)\nexcept BaseException: raise ImportError('x')")
    with subprocess.Popen([sys.executable, "lorc.py", "--plan"], cwd=HERE, env=env,
                          preexec_fn=default_interrupt, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_the_handler_of_ctrl_c_is_as_before_after_a_command(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli(capsys, "--plan")[0] == 0 and signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # as in a job that a shell has put aside
    try:
        with command.exit_on_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words, stderr, status, lines", [
    ("--model {d}/good --perplexity {d}/text", "2>&-", 0, 1),
    ("--model {d}/good --perplexity {d}/text", "2>/dev/full", 0, 1),
    ("--nonsense", "2>&-", 2, 0), ("--nonsense", "2>/dev/full", 2, 0)])
def test_errors_never_go_to_standard_output(words, stderr, status, lines, places):
    """With a standard error that is closed or full: the result, the status, and no error."""
    line = f"exec {sys.executable} lorc.py {words.format(d=places)} {stderr}"
    done = subprocess.run(["sh", "-c", line], cwd=HERE, stdout=subprocess.PIPE, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout.count("\n")) == (status, lines)
    assert done.stdout.startswith("perplexity " if lines else "")
