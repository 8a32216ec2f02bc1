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


# Sec. 3: reading checkpoints -------------------------------------------------------- by hand ---

def test_shards_and_one_file_give_the_same_model(tmp_path):
    one = model.load(write_checkpoint(tmp_path / "one", RAW), torch.float32)
    many = model.load(write_checkpoint(tmp_path / "many", RAW, shards=3), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_weights_come_in_the_wanted_dtype_and_by_default_in_their_own(tmp_path):
    folder = write_checkpoint(tmp_path, RAW, dtype=torch.bfloat16)
    assert {p.dtype for p in model.load(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.load(folder, torch.float32).parameters()} == {torch.float32}


def test_loading_needs_at_most_a_quarter_more_memory_than_the_weights(tmp_path):
    """Peak resident memory of loading 64 MB of bfloat16 as float32, over what the process held before."""
    raw = RAW | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4000}
    rng, small = np.random.default_rng(0), write_checkpoint(tmp_path / "small", RAW)
    weights = {k: rng.random(s, np.float32) for k, s in tensor_shapes(raw).items()}
    big = write_checkpoint(tmp_path / "big", raw, weights, dtype=torch.bfloat16)
    program = f"""if 1:
        import torch, model
        def status(key):
            return next(int(x.split()[1]) * 1024 for x in open('/proc/self/status') if x.startswith(key))
        model.load({str(small)!r}, torch.float32)
        before = status('VmRSS')
        llama = model.load({str(big)!r}, torch.float32)
        print((status('VmHWM') - before) / sum(p.nbytes for p in llama.parameters()))"""
    ratio = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True)
    assert 0.95 < float(ratio.stdout) < 1.25


@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "gpt2"), ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 63}, "sliding_window"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"type": "linear"}}, "factor"), ({"hidden_size": -1}, "hidden_size"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers"), ({"num_attention_heads": 3}, "multiple"),
    ({"head_dim": 7}, "even"), ({"vocab_size": True}, "vocab_size"), ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"rope_scaling": [1]}, "rope_scaling"), ({"partial_rotary_factor": 0.5}, "partial"),
])
def test_what_is_not_computed_is_refused_by_name(change, word, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RAW | change))
    status, out, err = cli(capsys, "--model", tmp_path, "--prompt", "w1")
    assert status == 2 and out == "" and word in err and err.count("\n") == 1


def spoil(folder, what):
    """Break one thing in a good checkpoint."""
    weights = folder / "model.safetensors"
    if what in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / what).unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "malformed":
        (folder / "config.json").write_text('{"model_type": ')
    elif what == "shard":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    elif what == "outside":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "../x.safetensors"}}')
    else:
        tensors = {k: torch.tensor(v) for k, v in formula_weights(RAW).items()}
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors |= {"shape": {name: torch.zeros(3, 3)}, "bias": {name[:-6] + "bias": torch.zeros(16)},
                    "nan": {name: torch.full((16, 32), torch.nan)}, "int8": {name: torch.zeros(16, 32, dtype=torch.int8)},
                    "missing": {}}[what]
        if what == "missing":
            del tensors[name]
        save_file(tensors, weights)


@pytest.mark.parametrize("what, word", [
    ("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "model.safetensors"),
    ("truncated", "not a readable"), ("malformed", "not valid JSON"), ("shard", "gone.safetensors"),
    ("outside", "not a file in"), ("shape", "has shape (3, 3)"), ("missing", "lacks the tensor"),
    ("bias", "k_proj.bias"), ("nan", "NaN"), ("int8", "quantized"),
])
def test_a_broken_folder_ends_with_one_line(what, word, tmp_path, capsys):
    spoil(write_checkpoint(tmp_path, RAW), what)
    status, out, err = cli(capsys, "--model", tmp_path, "--prompt", "w1", "--cache", "full")
    assert status == 2 and out == "" and word in err and err.count("\n") == 1


def config(**change):
    return "config.json", lambda data: json.dumps(json.loads(data) | change).encode()


def index(**change):
    names = dict.fromkeys(tensor_shapes(RAW), "model.safetensors") | change.pop("names", {})
    return "model.safetensors.index.json", lambda data: json.dumps({"weight_map": names} | change).encode()


def header(old, new, count=1):
    """A change of the text that precedes the weights in a safetensors file; its length is kept right."""
    def change(data):
        size = int.from_bytes(data[:8], "little")
        text = data[8:8 + size].replace(old, new, count)
        assert text != data[8:8 + size]
        return len(text).to_bytes(8, "little") + text + data[8 + size:]
    return "model.safetensors", change


def weights(word):
    """One number of the weights, not in the first tensor alone."""
    return "model.safetensors", lambda data: data[:-4000] + np.float32(word).tobytes() + data[-3996:]


def file(name, content):
    return name, lambda data: content


PANIC = b""""post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "A", "type_id": 0}}], "pair": [],
         "special_tokens": {"B": {"id": "A", "ids": [1], "tokens": ["w1"]}}}"""                  # the key and the id differ
NORM = b'"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":['
FORGED = [
    (config(hidden_size=0), "hidden_size should be a positive int below 2**31, not 0"),
    (config(vocab_size=2**31), "vocab_size should be"),
    (config(num_hidden_layers=2**31 - 1), "2147483647 layers"),
    (config(num_hidden_layers=3), "lacks the tensor model.layers.2"),
    (config(num_hidden_layers=1), "'model.layers.1."),
    (config(num_attention_heads=2**30, head_dim=2**30), "beyond what a tensor can have"),
    (config(hidden_size=2**31 - 1, intermediate_size=2**31 - 1, head_dim=8), "beyond what a tensor can have"),
    (config(vocab_size=2**31 - 1), "has shape (61, 32), config.json implies (2147483647, 32)"),
    (config(vocab_size=60), "implies (60, 32)"),
    (config(rms_norm_eps=float("nan")), "rms_norm_eps should be a positive float below 1e30, not nan"),
    (config(rms_norm_eps=0), "rms_norm_eps"),
    (config(rope_theta=1e300), "rope_theta should be"),
    (config(rope_theta=1e-9), "rope_theta and factor should be at least 1"),
    (config(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor should be below"),
    (config(max_position_embeddings=-5), "max_position"),
    (config(model_type=["llama"]), "model_type ['llama']; it should be a name"),
    (config(rope_scaling="x"), "should be one flat object, not 'x'"),
    (file("config.json", b"[" * 100_000), "not valid JSON"),
    (file("config.json", b'{"a":' * 100_000), "not valid JSON"),
    (file("config.json", b"[]"), "should hold a JSON object, not a list"),
    (file("config.json", b"\xff\xfe"), "not UTF-8"),
    (file("config.json", b"9" * 5000), "not valid JSON"),
    (file("config.json", b" " * (2**26 + 1)), "larger than 64 MiB"),
    (index(names={"model.norm.weight": "../model.safetensors"}), "'../model.safetensors', which is not a file in"),
    (index(names={"model.norm.weight": "/etc/passwd"}), "'/etc/passwd', which is not"),
    (index(names={"model.norm.weight": "."}), "not a file in"),
    (index(names={"model.norm.weight": "a\0b"}), "not a file in"),
    (index(names={"model.norm.weight": "\ud800"}), "not a file in"),
    (index(names={"model.norm.weight": None}), "'None', which is not a file"),
    (index(names={"model.norm.weight": "config.json"}), "not a readable"),
    (index(weight_map=[1]), "has no weight_map"),
    (index(weight_map={}), "has no weight_map"),
    (header(NORM, NORM[:-1] + b"[" * 9), "not a readable safetensors file"),
    (header(b'"F32"', b'"F16"'), "not a readable"),
    (header(b'"F32"', b'"F99"'), "not a readable"),
    (header(NORM, NORM + b"-"), "not a readable"),
    (header(NORM, NORM + b"9" * 20), "not a readable"),
    (header(b"{", b"{" + NORM + b"0,128]},"), "a name comes twice"),
    (header(NORM, NORM + b'0,128],"x":['), "invalid offset"),
    (header(b'"shape":[32]', b'"shape":[18446744073709551615,2]'), "not a readable"),
    (header(b"{", b"[" * 100_000), "not a readable"),
    (header(b"[16,32]", b"[32,16]"), "has shape (32, 16), config.json implies (16, 32)"),
    (header(b"[16,32]", b"[512]"), "has shape (512,)"),
    (("model.safetensors", lambda data: (2**62).to_bytes(8, "little") + data[8:]), "not a readable"),
    (file("model.safetensors", b""), "not a readable"),
    (weights("nan"), "holds NaN or infinite numbers"),
    (weights("-inf"), "holds NaN or infinite numbers"),
    (("tokenizer.json", lambda data: data.replace(b'"post_processor": null', PANIC)), "cannot read the text: no entry found for key"),
    (file("tokenizer.json", b"{}"), "cannot be read as a tokenizer"),
    (file("tokenizer.json", b"\xff"), "not UTF-8"),
    (file("tokenizer.json", b"[" * 100_000), "cannot be read as a tokenizer"),
    (file("tokenizer_config.json", b"[]"), "should hold a JSON object"),
    (file("tokenizer_config.json", b'{"bos_token": "\\udcff"}'), "cannot read the text: 'utf-8' codec"),
    (file("generation_config.json", b"x"), "not valid JSON"),
    (("tokenizer.json", lambda data: data.replace(b'"w1": 1,', b'"w1": 99,')), "gives token 99, config.json has vocab_size 61"),
]


@pytest.mark.parametrize("how, word", FORGED, ids=[f"{name}: {word}" for (name, _), word in FORGED])
def test_a_forged_checkpoint_ends_with_one_line(how, word, tmp_path, capfd):
    """Each a change of one file; those that fuzzing found are among them. File 2 is read, where a panic in Rust would write."""
    (name, change), folder = how, write_checkpoint(tmp_path, RAW)
    path = folder / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    status, out, err = cli(capfd, "--model", folder, "--prompt", "w1", "--cache", "full")
    assert (status, out, err.count("\n")) == (2, "", 1) and word in err and len(err) < 450


def test_a_tensor_in_two_shards_ends_with_one_line(tmp_path, capsys):
    folder = write_checkpoint(tmp_path, RAW, shards=2)
    (folder / "model-1.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    status, out, err = cli(capsys, "--model", folder, "--prompt", "w1", "--cache", "full")
    assert status == 2 and "and so does another shard" in err and err.count("\n") == 1


def test_weights_may_be_links_in_the_hubs_cache_and_nowhere_else(tmp_path, capsys):
    """models--x/snapshots/rev/model.safetensors -> ../../blobs/hash, as huggingface_hub makes it."""
    repository = tmp_path / "models--a--b"
    folder = write_checkpoint(repository / "snapshots" / "rev", RAW)
    (repository / "blobs").mkdir()
    for target, word in ((repository / "blobs" / "hash", None), (tmp_path / "elsewhere", "is not a plain file in this folder")):
        (folder / "model.safetensors").resolve().rename(target)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors").symlink_to(os.path.relpath(target, folder))
        status, _, err = cli(capsys, "--model", folder, "--prompt", "w1", "--cache", "full", "--max-new-tokens", 1)
        assert (status, err.count("\n")) == (2, 1) and word in err if word else status == 0
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    status, _, err = cli(capsys, "--model", folder, "--prompt", "w1")
    assert status == 2 and "config.json is not a plain file" in err


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as a download needs: what is in a repository, and its files."""

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        files, path = self.server.repositories.get(name, {}), "/".join(parts[4:])
        if name == "org/gated":
            self.reply(403, {"X-Error-Code": "GatedRepo"})
        elif not files:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif api and "tree" in parts:
            self.reply(200, {}, json.dumps([{"type": "file", "path": f, "size": len(x), "oid": f} for f, x in files.items()]).encode())
        elif api:
            self.reply(200, {}, json.dumps({"id": name, "sha": "a" * 40, "siblings": [{"rfilename": f} for f in files]}).encode())
        else:
            self.server.asked.add(path)
            self.reply(200, {"ETag": f'"{path}"', "X-Repo-Commit": "a" * 40}, files[path])

    do_HEAD = do_GET

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for item in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*item)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *args):
        pass


HUB_CLIENT = """
import contextlib, io, json, sys
from runtime import cli
import huggingface_hub.constants as hub
answers = []
for name in "good gated nothing pickled/x a--b good gone good gone".split():
    if len(answers) == 5:
        hub.ENDPOINT = "http://127.0.0.1:9"                # nobody listens there
    hub.HF_HUB_OFFLINE = len(answers) >= 7
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["--model", name if "/" in name else "org/" + name, "--prompt", "w1", "--max-new-tokens", "2"])
    answers.append((name, status, err.getvalue().splitlines()[-1]))
print(json.dumps(answers))
"""


def test_a_hub_id_downloads_what_is_read_and_else_says_in_one_line_why_not(tmp_path):
    """Against a server on the loopback address: there, gated, not there, without safetensors, no valid name;
    then with the server gone, and with HF_HUB_OFFLINE: what was downloaded before still runs."""
    folder = write_checkpoint(tmp_path / "good", RAW, shards=2)
    good = {f.name: f.read_bytes() for f in folder.iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, junk = set(), dict.fromkeys(["pytorch_model.bin", "README.md", "onnx/model.safetensors", "consolidated.safetensors"], b"x")
    server.repositories = {"org/good": good | junk, "pickled/x": {"config.json": good["config.json"], "pytorch_model.bin": b"x"}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", HUB_CLIENT], cwd=HERE, env=env, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    want = [(0, ""), (2, "ask on its page"), (2, "has none of that name"), (2, "pickled .bin weights are never read"),
            (2, "the Hub says: "), (0, ""), (2, "cannot be reached"), (0, ""), (2, "cannot be reached")]
    for (name, status, line), (code, word) in zip(json.loads(done.stdout), want, strict=True):
        assert status == code and word in line and len(line) < 400, (name, status, line)
    assert server.asked == set(good)


def test_mutated_checkpoints_run_or_are_refused_in_one_line():
    """300 seeds of experiments/fuzz.py, which says what must hold; a failure prints the seed and its fault."""
    sys.path.insert(0, str(HERE / "experiments"))
    import fuzz
    counts, findings = fuzz.fuzz(1_000_000, 300)
    assert not findings and counts["ran"] > 50 and counts["refused"] > 150


# Sec. 3: text and generation ---------------------------------------------------------------------

def test_the_stream_of_text_is_the_text(real):
    """Pieces joined are the decoded whole, across characters of several bytes and leading spaces."""
    _, tokenizer, prompt = real
    new = tokenizer.encode("naïve 日本語 🙂  two spaces\n\nend", special=False)
    stream = Stream(tokenizer, prompt[0].tolist())
    pieces = [stream.step(t) for t in new]
    whole = tokenizer.fast.decode(prompt[0].tolist() + new)
    assert "".join(pieces) == whole[len(tokenizer.fast.decode(prompt[0].tolist())):]
    assert not any("\ufffd" in p for p in pieces) and len(pieces) > 5


def test_bos_is_added_exactly_when_the_tokenizer_says_so(tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    for options, first in [({}, 5), ({"add_bos_token": True, "bos_token": "w1"}, 1),
                           ({"add_bos_token": False, "bos_token": {"content": "w1"}}, 5)]:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
        assert Tokenizer(folder, model.read_config(folder)).encode("w5 w6")[0] == first


@pytest.mark.parametrize("template, want", [
    ("{% for m in messages %}w3 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w4{% endif %}", [3, 9, 4]),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"), ("{{ self.__init__.__globals__ }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os }}", "SecurityError"), ("{{ raise_exception('no') }}", "rendered: ValueError: no"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{% include 'x' %}", "no loader"), ("{{", "TemplateSyntaxError"), (3, "no chat template"),
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"), ("{{ 'w' * 10**10 }}", "MemoryError"),
    ("{{ 'w' * 2**21 }}", "a million characters"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s or 1 GiB"),
])
def test_chat_templates_are_rendered_and_cannot_reach_python_nor_run_on(template, want, tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer(folder, model.read_config(folder))
    if isinstance(want, list):
        assert tokenizer.chat("w9") == want
    else:
        with pytest.raises(model.UserError, match=want):
            tokenizer.chat("w9")


def test_every_named_end_token_ends_the_text(tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert Tokenizer(folder, model.read_config(folder)).ends == {2, 5, 7}


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


def test_truncation_and_padding_of_the_tokenizer_file_are_not_the_models(tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer(folder, model.read_config(folder)).encode("w1 w2 w3") == [1, 2, 3]


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


@pytest.mark.parametrize("plan", [["--kept", 0.7], ["--d-min", 1]])
def test_saved_bases_give_the_same_text_and_fit_no_other_model(plan, tmp_path, capsys):
    ask = ["--model", REAL, "--prompt", "Once upon a time", "--max-new-tokens", 12, "--json"]
    first = json.loads(cli(capsys, *ask, *plan, "--save", tmp_path / "b")[1])
    again = json.loads(cli(capsys, *ask, "--bases", tmp_path / "b")[1])
    assert again["text"] == first["text"]
    assert again["plan"] == [pytest.approx(row, rel=1e-5) for row in first["plan"]]     # errors in float32
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["bases.safetensors"]
    other = write_checkpoint(tmp_path / "other", RAW)
    status, out, err = cli(capsys, "--model", other, "--prompt", "w1", "--bases", tmp_path / "b")
    assert status == 2 and "another model" in err and err.count("\n") == 1


# Many processes ---------------------------------------------------------------------- by hand ---

def logits_step_by_step(kind, **options):
    """tiny/'s logits for a prompt of 80 tokens and 9 more, one by one; None but in the last process."""
    llama = distributed.load(HERE / "tiny", torch.float32, "cpu")
    tokens = torch.randint(llama.config.vocab, (2, 89), generator=torch.Generator().manual_seed(0))
    plan = lorc.make_plan(distributed.gather(lorc.log_kappas(llama)), llama.config.kv_width, kept=0.6)
    bases = lorc.make_bases(llama, plan.ranks[distributed.local_layers(llama.config.layers)])
    caches = lorc.new_caches(llama, kind, 89, bases, B=2, **options)
    return llama.head(torch.cat([llama.hidden(t, caches) for t in tokens.split([80] + 9 * [1], 1)], 1))


def everything_in_these_processes(folder):
    """Commands, whose JSON goes to standard output and bases to `folder`; returns logits by cache."""
    ask, text = ["--prompt", "Once upon a time", "--max-new-tokens", "9"], str(HERE / "LICENSE")
    for words in ([*ask, "--compare", "--temperature", "1", "--window", "3", "--bits", "4"],
                  [*ask, "--calibrate", text, "--skip", "1", "--save", str(folder)], [*ask, "--bases", str(folder)],
                  ["--perplexity", text, "--max-tokens", "300", "--context", "200", "--cache", "bibranch"],
                  ["--plan"]):
        parser = command.command_line()
        running.run(command.settle(parser, parser.parse_args([*words, "--json"])))
    caches = {"full": ("full", {}), "compressed": ("compressed", {}), "bibranch": ("bibranch", {}),
              "4 bits": ("bibranch", {"bits": 4})}
    return {name: logits_step_by_step(kind, **options)
            for name, (kind, options) in caches.items()}


def untimed(found):
    return {name: x for name, x in found.items() if name != "seconds"}


def one_of_two(folder):
    """What torchrun starts: all of that, the last process's logits to a file, and then an error in both."""
    def run(args, run=running.run):
        running.run = run
        found = everything_in_these_processes(folder)
        if distributed.rank_and_world_size()[0] == 0:
            torch.save(found, Path(folder) / "logits")
        return run(args)
    running.run = run
    return command.main(["--prompt", "Once", "--kept", "0.05"])


def test_two_processes_say_what_one_says_bit_for_bit(tmp_path, capsys):
    """Logits of every cache; texts, plans, errors, bytes, perplexity, saved bases. And a wrong flag gives one
    line. Kills: a share that starts a layer late, errors or bytes of one process only, two that speak."""
    one, two = tmp_path / "one", tmp_path / "two"
    program = f"import sys; sys.path.append('runtime'); import test_runtime; sys.exit(test_runtime.one_of_two({str(two)!r}))"
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "--no-python", sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as started:
        want = everything_in_these_processes(one)
        out, err = started.communicate()
    said = [[json.loads(line, object_hook=untimed) for line in lines.splitlines()] for lines in (capsys.readouterr().out, out)]
    assert len(said[0]) == 5 and said[1] == said[0], err
    got = torch.load(two / "logits")
    assert all(torch.equal(got[name], want[name]) for name in want) and len(want) == 4
    saved = [load_file(folder / "bases.safetensors") for folder in (one, two)]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(x, saved[1][name]) for name, x in saved[0].items())
    assert err.count("lorc: ") == 1 and "lorc: kept 0.05 cannot" in err and started.returncode == 1


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

def test_a_save_that_fails_leaves_what_was_there(places, tmp_path, capsys, monkeypatch):
    """A limit of 1,000 bytes a file stands for a full disk; then a folder that may not be written; then no rename."""
    save = ["--model", places / "good", "--save", tmp_path / "b"]
    path = tmp_path / "b" / "bases.safetensors"
    assert cli(capsys, *save)[0] == 0
    before = path.read_bytes()
    umask = os.umask(0o027)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def fails(word):
        status, out, err = cli(capsys, *save, "--d-min", 3)
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err
        assert [f.name for f in path.parent.iterdir()] == [path.name] and path.read_bytes() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        fails("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, "replace", refuse)
    fails("Read-only file system")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    fails("Read-only file system")


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
