"""Checkpoints from anyone: read as transformers reads them, or refused in one line.

A test writes a small valid checkpoint with a tokenizer of 61 words, w0 to w60, and changes it.
"""
import http.server
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from runtime import checkpoint
from runtime.testing import (HERE, LLAMA3, RAW, cli, formula_weights, full, tensor_shapes,
                       write_checkpoint)

WK = "model.layers.1.self_attn.k_proj.weight"


def assert_refused(capsys, folder, word, *flags):
    """A command on this model ends with status 2 and one line that contains `word`."""
    status, out, err = cli(capsys, "--model", folder, "--prompt", "w1", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert word in err and len(err) < 450


# What is read ------------------------------------------------------------------------------------

def test_shards_and_one_file_give_the_same_model(tmp_path):
    one = model.load(write_checkpoint(tmp_path / "one", RAW), torch.float32)
    three = model.load(write_checkpoint(tmp_path / "three", RAW, shards=3), torch.float32)
    for a, b in zip(one.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_have_the_requested_dtype_and_by_default_the_stored_one(tmp_path):
    folder = write_checkpoint(tmp_path, RAW, dtype=torch.bfloat16)
    assert {p.dtype for p in model.load(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.load(folder, torch.float32).parameters()} == {torch.float32}


def test_loading_needs_at_most_a_quarter_more_memory_than_the_weights(tmp_path):
    """Peak resident memory of loading 64 MB of bfloat16 as float32, above that of the process."""
    raw = RAW | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
                 "vocab_size": 4000}
    rng, small = np.random.default_rng(0), write_checkpoint(tmp_path / "small", RAW)
    weights = {k: rng.random(s, np.float32) for k, s in tensor_shapes(raw).items()}
    big = write_checkpoint(tmp_path / "big", raw, weights, dtype=torch.bfloat16)
    program = f"""if 1:
        import torch, model
        def status(key):
            lines = open('/proc/self/status').read().splitlines()
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))
        model.load({str(small)!r}, torch.float32)
        before = status('VmRSS')
        llama = model.load({str(big)!r}, torch.float32)
        print((status('VmHWM') - before) / sum(p.nbytes for p in llama.parameters()))"""
    ratio = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True,
                           text=True, check=True, timeout=120)
    assert 0.95 < float(ratio.stdout) < 1.25


def read(tmp_path, **change):
    """config.json with this change as a Config. A key whose value is "missing" is left out."""
    raw = {key: value for key, value in (RAW | change).items() if value != "missing"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return checkpoint.check_config(raw, tmp_path)


def test_missing_keys_of_a_llama_mean_what_they_mean_to_transformers(tmp_path):
    """theta 10,000, eps 1e-6, context 2,048, untied, as many KV heads as heads, d = D / H."""
    missing = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
               "num_key_value_heads", "head_dim", "hidden_act")
    c = read(tmp_path, **dict.fromkeys(missing, "missing"))
    assert (c.rope, c.eps, c.context) == ({"type": "default", "theta": 1e4}, 1e-6, 2048)
    assert (c.tied, c.kv_heads, c.head_dim) == (False, 4, 8)
    assert read(tmp_path, num_key_value_heads=None, head_dim=None).kv_heads == 4
    assert read(tmp_path, tie_word_embeddings=True).tied


def test_missing_keys_of_a_mistral_mean_what_they_mean_to_transformers(tmp_path):
    """8 KV heads, context 131,072, a sliding window of 4,096: 1 refused, 2 accepted."""
    mistral = {"model_type": "mistral", "num_attention_heads": 16, "rms_norm_eps": "missing",
               "num_key_value_heads": "missing", "max_position_embeddings": "missing"}
    with pytest.raises(model.UserError, match="sliding_window of 4096.*context of 131072"):
        read(tmp_path, **mistral)
    c = read(tmp_path, **mistral | {"sliding_window": None})
    assert (c.kv_heads, c.context, c.eps) == (8, 131072, 1e-6)
    assert read(tmp_path, **mistral | {"max_position_embeddings": 4096}).context == 4096
    with pytest.raises(model.UserError, match="sliding_window of 4096.*context of 4097"):
        read(tmp_path, **mistral | {"max_position_embeddings": 4097})


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_sliding_window_as_long_as_the_context_is_accepted(kind, tmp_path):
    """It hides key j from query i if j <= i - window, so a window of 64 hides none of 64 tokens."""
    assert read(tmp_path, model_type=kind, sliding_window=64).context == 64
    with pytest.raises(model.UserError, match="sliding_window of 63 tokens"):
        read(tmp_path, model_type=kind, sliding_window=63)


ORIGINAL = "original_max_position_embeddings"
LLAMA3_READ = {"type": "llama3", "theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, ORIGINAL: 16.0}
UNPINNED = {key: value for key, value in LLAMA3.items() if key != ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES = [
    ({"rope_scaling": LLAMA3}, LLAMA3_READ),
    ({"rope_scaling": UNPINNED}, LLAMA3_READ | {ORIGINAL: 64.0}),
    ({"rope_scaling": UNPINNED, "max_position_embeddings": "missing"},
     LLAMA3_READ | {ORIGINAL: 2048.0}),
    ({"rope_scaling": UNPINNED, ORIGINAL: 32}, LLAMA3_READ | {ORIGINAL: 32.0}),
    ({"rope_scaling": LLAMA3, ORIGINAL: 32}, LLAMA3_READ | {ORIGINAL: 32.0}),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, LLAMA3_READ | {"theta": 500.0}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": "missing"},
     {"type": "default", "theta": 500.0}),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "rope_scaling": LINEAR},
     {"type": "linear", "theta": 1e4, "factor": 2.0}),
    ({"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LLAMA3,
      "rope_theta": "missing"}, LLAMA3_READ),
    ({"rope_parameters": LINEAR, "rope_scaling": None},
     {"type": "linear", "theta": 1e4, "factor": 2.0}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 77.0},
     {"type": "linear", "theta": 77.0, "factor": 4.0}),
]


@pytest.mark.parametrize("change, want", ROPES)
def test_rope_is_read_with_transformers_precedence(change, want, tmp_path):
    """rope_scaling before rope_parameters; the top level's original_max_position_embeddings."""
    assert read(tmp_path, **change).rope == want


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("change", [change for change, _ in ROPES])
def test_frequencies_are_those_of_transformers(change, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = read(tmp_path, **change)
    theirs = LlamaConfig.from_pretrained(tmp_path)
    kind = theirs.rope_parameters["rope_type"]
    want = theirs.rope_parameters["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
    if kind != "default":
        want, _ = ROPE_INIT_FUNCTIONS[kind](theirs)
    assert torch.allclose(model.Rope(config).frequencies(torch.float32), want, rtol=1e-6)


def test_rope_tables_of_a_bfloat16_model_are_exact_at_long_positions(tmp_path):
    """cos and sin of 8,000 positions, to bfloat16's rounding. Kills: angles in bfloat16."""
    config = read(tmp_path)
    half, exact = model.Rope(config), model.Rope(config)
    half.reserve(8000, torch.zeros(1, dtype=torch.bfloat16))
    exact.reserve(8000, torch.zeros(1, dtype=torch.float64))
    assert half.cos.dtype == torch.bfloat16
    assert (half.cos.double() - exact.cos).abs().max() < 5e-3
    assert (half.sin.double() - exact.sin).abs().max() < 5e-3


def rewrite(folder, change):
    """Change the tensors of a checkpoint, a dict by name, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_stored_inverse_frequencies_are_ignored(tmp_path, capsys):
    """Old checkpoints store them, once or in each layer; RoPE computes its own."""
    folder = write_checkpoint(tmp_path, RAW)
    before = model.load(folder)(torch.tensor([[1, 2, 3]]), full(model.load(folder), 3))
    rewrite(folder, lambda tensors: tensors.update({
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    checkpoint.check(folder)
    llama = model.load(folder)
    assert torch.equal(llama(torch.tensor([[1, 2, 3]]), full(llama, 3)), before)
    rewrite(folder, lambda tensors: tensors.update({"model.rotary_emb.cos": torch.ones(4)}))
    assert_refused(capsys, folder, "holds the tensor 'model.rotary_emb.cos', which is not")


def test_a_stored_head_that_differs_from_a_tied_embedding_is_refused(tmp_path, capsys):
    """transformers uses such a head. One that is equal to the embedding is accepted and tied."""
    folder = write_checkpoint(tmp_path, RAW | {"tie_word_embeddings": True})
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embed.clone()}))
    checkpoint.check(folder)
    llama = model.load(folder)
    assert llama.head.weight is llama.embed.weight
    embed[-1, -1] += 1e-3
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embed}))
    assert_refused(capsys, folder, "lm_head.weight differs from the embedding; set it to false")


# What is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "'gpt2'; supported: 'llama', 'mistral'"),
    ({"model_type": "missing"}, "model_type None"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 63}, "sliding_window"),
    ({"sliding_window": True}, "sliding_window should be a positive int"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ({"num_attention_heads": 3}, "multiple"),
    ({"head_dim": 7}, "even"),
    ({"hidden_size": 2}, "even"),
    ({"vocab_size": True}, "vocab_size"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_parameters": {"full_attention": LLAMA3}}, "one flat object"),
    ({"rope_scaling": LLAMA3, ORIGINAL: "long"}, ORIGINAL),
    ({"partial_rotary_factor": 0.5}, "partial"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
])
def test_what_is_not_supported_is_refused_by_name(change, word, tmp_path, capsys):
    raw = {key: value for key, value in (RAW | change).items() if value != "missing"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_refused(capsys, tmp_path, word)


def spoil(folder, what):
    """Break one thing in a good checkpoint."""
    weights = folder / "model.safetensors"
    if what in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / what).unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "malformed":
        (folder / "config.json").write_text('{"model_type": ')
    elif what in ("gone.safetensors", "../x.safetensors"):
        index = {"weight_map": {"model.norm.weight": what}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors = load_file(weights)
        if what == "missing":
            del tensors[WK]
        tensors |= {"shape": {WK: torch.zeros(3, 3)}, "bias": {WK[:-6] + "bias": torch.zeros(16)},
                    "nan": {WK: torch.full((16, 32), torch.nan)}, "missing": {},
                    "int8": {WK: torch.zeros(16, 32, dtype=torch.int8)}}[what]
        save_file(tensors, weights)


@pytest.mark.parametrize("what, word", [
    ("config.json", "config.json"), ("tokenizer.json", "tokenizer"),
    ("model.safetensors", "model.safetensors"), ("truncated", "not a readable"),
    ("malformed", "not valid JSON"), ("gone.safetensors", "gone.safetensors"),
    ("../x.safetensors", "not a file in"), ("shape", "has shape (3, 3)"),
    ("missing", "lacks the tensor"), ("bias", "k_proj.bias"), ("nan", "NaN"), ("int8", "quantized"),
])
def test_a_broken_folder_ends_with_one_line(what, word, tmp_path, capsys):
    spoil(write_checkpoint(tmp_path, RAW), what)
    assert_refused(capsys, tmp_path, word, "--cache", "full")


# A forgery is a file name and a function from the file's old content to its new content.

def config(**change):
    return "config.json", lambda data: json.dumps(json.loads(data) | change).encode()


def index(**change):
    names = dict.fromkeys(tensor_shapes(RAW), "model.safetensors") | change.pop("names", {})
    content = json.dumps({"weight_map": names} | change).encode()
    return "model.safetensors.index.json", lambda data: content


def header(old, new):
    """Replace text in the header of the safetensors file, whose length is corrected."""
    def change(data):
        size = int.from_bytes(data[:8], "little")
        text = data[8:8 + size].replace(old, new, 1)
        assert text != data[8:8 + size]
        return len(text).to_bytes(8, "little") + text + data[8 + size:]
    return "model.safetensors", change


def weights(word):
    """Replace one number of the weights, which is not in the first tensor."""
    number = np.float32(word).tobytes()
    return "model.safetensors", lambda data: data[:-4000] + number + data[-3996:]


def file(name, content):
    return name, lambda data: content


# The key of the special token and its id differ, on which the tokenizers library panics.
PANIC = b""""post_processor": {"type": "TemplateProcessing", "pair": [],
         "single": [{"SpecialToken": {"id": "A", "type_id": 0}}],
         "special_tokens": {"B": {"id": "A", "ids": [1], "tokens": ["w1"]}}}"""
NORM = b'"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":['
HUGE = 2**31 - 1
MANY_NAMES = b'"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(10**5)) + b"},"
FORGED = [
    (config(hidden_size=0), "hidden_size should be a positive int below 2**31, not 0"),
    (config(vocab_size=2**31), "vocab_size should be"),
    (config(num_hidden_layers=HUGE), "2147483647 layers"),
    (config(num_hidden_layers=3), "lacks the tensor model.layers.2"),
    (config(num_hidden_layers=1), "'model.layers.1."),
    (config(num_attention_heads=2**30, head_dim=2**30), "beyond what a tensor can have"),
    (config(hidden_size=HUGE, intermediate_size=HUGE, head_dim=8), "beyond what a tensor can"),
    (config(vocab_size=HUGE), "has shape (61, 32), config.json implies (2147483647, 32)"),
    (config(vocab_size=60), "implies (60, 32)"),
    (config(rms_norm_eps=math.nan), "rms_norm_eps should be a positive float below 1e30, not nan"),
    (config(rms_norm_eps=0), "rms_norm_eps"),
    (config(rope_theta=1e300), "rope_theta should be"),
    (config(rope_theta=1e-9), "rope_theta and factor should be at least 1"),
    (config(rope_scaling=LLAMA3 | {"factor": 0.5}), "rope_theta and factor should be at least 1"),
    (config(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor should be below"),
    (config(max_position_embeddings=-5), "max_position"),
    (config(model_type=["llama"]), "model_type ['llama']"),
    (config(rope_scaling="x"), "should be one flat object, not 'x'"),
    (config(rope_scaling={"rope_type": ["linear"]}), "RoPE of type ['linear']"),
    (file("config.json", b"[" * 100_000), "not valid JSON"),
    (file("config.json", b'{"a":' * 100_000), "not valid JSON"),
    (file("config.json", b"[]"), "should hold a JSON object, not a list"),
    (file("config.json", b"\xff\xfe"), "not UTF-8"),
    (file("config.json", b"9" * 5000), "not valid JSON"),
    (file("config.json", b" " * (2**20 + 1)), "larger than 1 MiB"),
    (file("tokenizer_config.json", b" " * (2**22 + 1)), "larger than 4 MiB"),
    (index(names={"model.norm.weight": "../model.safetensors"}), "safetensors', which is not a"),
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
    (header(b"{", b"{" + NORM + b"0,128]},"), "a name occurs twice"),
    (header(NORM, NORM + b'0,128],"x":['), "invalid offset"),
    (header(b'"shape":[32]', b'"shape":[18446744073709551615,2]'), "not a readable"),
    (header(b"{", b"[" * 100_000), "not a readable"),
    (header(b"{", b"{" + MANY_NAMES), "its header should have"),
    (header(b"[16,32]", b"[32,16]"), "has shape (32, 16), config.json implies (16, 32)"),
    (header(b"[16,32]", b"[512]"), "has shape (512,)"),
    (("model.safetensors", lambda data: (2**62).to_bytes(8, "little") + data[8:]),
     "its header should have 4,611,686,018,427,387,904 bytes; up to 1,048,576 are supported"),
    (file("model.safetensors", b""), "not a readable"),
    (weights("nan"), "holds NaN or infinite numbers"),
    (weights("-inf"), "holds NaN or infinite numbers"),
    (("tokenizer.json", lambda data: data.replace(b'"post_processor": null', PANIC)),
     "cannot read the text: no entry found for key"),
    (file("tokenizer.json", b"{}"), "cannot be read as a tokenizer"),
    (file("tokenizer.json", b"\xff"), "not UTF-8"),
    (file("tokenizer.json", b"[" * 100_000), "cannot be read as a tokenizer"),
    (file("tokenizer_config.json", b"[]"), "should hold a JSON object"),
    (file("tokenizer_config.json", b'{"bos_token": "\\udcff"}'), "cannot read the text: 'utf-8'"),
    (file("generation_config.json", b"x"), "not valid JSON"),
    (("tokenizer.json", lambda data: data.replace(b'"w1": 1,', b'"w1": 99,')),
     "gives token 99, but config.json has vocab_size 61"),
]


@pytest.mark.parametrize("how, word", FORGED, ids=[f"{name}: {word}" for (name, _), word in FORGED])
def test_a_forged_checkpoint_ends_with_one_line(how, word, tmp_path, capfd):
    """Each changes one file; findings of the fuzzer are among them.

    capfd captures file descriptor 2, to which a panic in Rust would write.
    """
    (name, change), folder = how, write_checkpoint(tmp_path, RAW)
    path = folder / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    assert_refused(capfd, folder, word, "--cache", "full")


def test_a_tensor_in_two_shards_ends_with_one_line(tmp_path, capsys):
    folder = write_checkpoint(tmp_path, RAW, shards=2)
    (folder / "model-1.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    assert_refused(capsys, folder, "and so does another shard", "--cache", "full")


def test_the_header_of_a_file_is_parsed_once(tmp_path, monkeypatch):
    """Validating 2 files with 21 tensors opens 2 files. Kills: one open per tensor."""
    folder, opened = write_checkpoint(tmp_path, RAW, shards=2), []
    real = checkpoint.safe_open

    def counted(path, framework):
        opened.append(path)
        return real(path, framework)
    monkeypatch.setattr(checkpoint, "safe_open", counted)
    checkpoint.check(folder)
    assert len(opened) == 2


def test_finite_weights_that_have_a_large_sum_are_finite(tmp_path):
    """Numbers of 1e38, whose sum is infinite in float32. Kills: a check of the sum."""
    llama = model.load(write_checkpoint(tmp_path, RAW))
    llama.layers[0].mlp.up.weight.fill_(1e38)
    checkpoint.check_numbers(llama)
    llama.layers[0].mlp.up.weight[3, 4] = math.inf
    with pytest.raises(model.UserError, match="layers.0.mlp.up_proj.weight holds NaN or infinite"):
        checkpoint.check_numbers(llama)


# Links, and the Hub ------------------------------------------------------------------------------

OPTIONAL = {"tokenizer_config.json": "{}", "generation_config.json": "{}",
            "chat_template.jinja": "w1"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-0.safetensors",
                                  "model.safetensors.index.json", *OPTIONAL])
def test_files_may_be_links_in_the_hubs_cache_and_nowhere_else(name, tmp_path, capsys):
    """models--x/snapshots/rev/FILE -> ../../blobs/hash, as huggingface_hub makes it."""
    repository = tmp_path / "models--a--b"
    folder = write_checkpoint(repository / "snapshots" / "rev", RAW, shards=2)
    for optional, text in OPTIONAL.items():
        (folder / optional).write_text(text)
    (repository / "blobs").mkdir()
    flags = ["--cache", "full", "--max-new-tokens", 1, "--chat"]
    inside, outside = repository / "blobs" / "hash", tmp_path / "outside"
    (folder / name).rename(inside)
    (folder / name).symlink_to(os.path.relpath(inside, folder))
    assert cli(capsys, "--model", folder, "--prompt", "w1", *flags)[0] == 0
    inside.rename(outside)
    (folder / name).unlink()
    (folder / name).symlink_to(os.path.relpath(outside, folder))
    assert_refused(capsys, folder, "file in", *flags)


def test_what_is_not_a_file_is_not_opened(tmp_path, capsys):
    """Reading a pipe would wait for ever."""
    folder = write_checkpoint(tmp_path, RAW)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert_refused(capsys, folder, "config.json is not a plain file")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as a download needs: a repository's list of files, and the files."""

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
            self.reply_json([{"type": "file", "path": f, "size": len(x), "oid": f}
                             for f, x in files.items()])
        elif api:
            self.reply_json({"id": name, "sha": "a" * 40,
                             "siblings": [{"rfilename": f} for f in files]})
        else:
            self.server.asked.add(path)
            self.reply(200, {"ETag": f'"{path}"', "X-Repo-Commit": "a" * 40}, files[path])

    do_HEAD = do_GET

    def reply_json(self, value):
        self.reply(200, {}, json.dumps(value).encode())

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
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["--model", name if "/" in name else "org/" + name, "--prompt", "w1",
                           "--cache", "full", "--max-new-tokens", "2"])
    answers.append((name, status, err.getvalue().splitlines()[-1]))
print(json.dumps(answers))
"""
HUB_ANSWERS = [
    (0, ""), (2, "Hub, which was asked for a model of that name, gives access on request only"),
    (2, "there is no folder org/nothing, and the Hugging Face Hub, which was asked for a model of "
        "that name, has no such model, or it is private"),
    (2, "pickled .bin weights are never read"), (2, "answers: "),
    (0, ""), (2, "cannot be reached"), (0, ""), (2, "cannot be reached"),
]


def test_a_hub_id_downloads_what_is_read_or_says_in_one_line_why_not(tmp_path):
    """Against a server on the loopback address: a good model, a gated one, none, one without
    safetensors, an invalid name; then without the server, and with HF_HUB_OFFLINE: what was
    downloaded before still runs."""
    folder = write_checkpoint(tmp_path / "good", RAW, shards=2)
    good = {f.name: f.read_bytes() for f in folder.iterdir()}
    junk = dict.fromkeys(["pytorch_model.bin", "README.md", "onnx/model.safetensors",
                          "consolidated.safetensors"], b"x")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = set()
    server.repositories = {"org/good": good | junk, "pickled/x": {
        "config.json": good["config.json"], "pytorch_model.bin": b"x"}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                        "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", HUB_CLIENT], cwd=HERE, env=env,
                          capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for (name, status, line), (code, word) in zip(answers, HUB_ANSWERS, strict=True):
        assert status == code and word in line and len(line) < 400, (name, status, line)
    assert server.asked == set(good)


def test_mutated_checkpoints_run_or_are_refused_in_one_line():
    """300 seeds of experiments/fuzz.py, which says what must hold. A failure names its seed."""
    sys.path.insert(0, str(HERE / "experiments"))
    import fuzz
    counts, findings = fuzz.fuzz(1_000_000, 300)
    assert not findings and counts["ran"] > 50 and counts["refused"] > 150
