"""What the test files share: small checkpoints, an independent LLaMA, tolerances.

    small_model()     a LLaMA with 2 layers and grouped queries, in float64
    write_checkpoint  the same, or another variant, as a Hugging Face folder
    numpy_llama       the forward pass in NumPy loops; it shares no code with model.py
    close             whether two tensors agree up to rounding
    Text, texts       random queries, keys and values for the tests of one cache
    cli               run one command in this process
    real, small       fixtures: the checkpoint that LORC_MODEL names (default: tiny/), small_model()

Importing this module sets up the tests: no gradients, one thread, and a Hypothesis profile that
draws the same examples in every run if the environment variable CI is set.
"""
import functools
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorc
import model
from cache import Basis, BiBranchCache, CompressedCache, FullCache
from runtime import cli as command
from runtime.bounds import own_text
from runtime.text import Tokenizer

HERE = Path(__file__).resolve().parent.parent                  # the repository's folder
REAL = os.environ.get("LORC_MODEL", str(HERE / "tiny"))
settings.register_profile("lorc", deadline=None, max_examples=40, print_blob=True)
settings.register_profile("lorc_ci", settings.get_profile("lorc"), derandomize=True)
settings.load_profile("lorc_ci" if os.environ.get("CI") else "lorc")
torch.set_grad_enabled(False)
torch.set_num_threads(1)                                  # the matrices are too small for more
os.environ["OMP_NUM_THREADS"] = "1"                       # also in processes that tests start


def close(a, b, scale=1.0):
    """Whether |a - b| <= scale * eps * max(1, |b|), eps = 1e-10 in float64, 2e-5 in float32."""
    eps = {torch.float64: 1e-10, torch.float32: 2e-5}[a.dtype]
    return a.shape == b.shape and (a - b).abs().max() <= scale * eps * b.abs().max().clamp(min=1)


# Small checkpoints -------------------------------------------------------------------------------

RAW = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
       "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
       "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
VARIANTS = {                                                   # changes of RAW
    "grouped": {}, "multi_head": {"num_key_value_heads": 4},
    "implied_kv_heads": {"num_key_value_heads": None}, "wide_heads": {"head_dim": 14},
    "tied": {"tie_word_embeddings": True}, "mistral": {"model_type": "mistral"},
    "linear": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3_new": {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
}
TOKENS = [(7 * i * i + 3 * i) % 61 for i in range(40)]


def tensor_shapes(raw):
    """Name and shape of every tensor of the checkpoint with this config."""
    D, V, F = raw["hidden_size"], raw["vocab_size"], raw["intermediate_size"]
    H = raw["num_attention_heads"]
    G, d = raw.get("num_key_value_heads") or H, raw.get("head_dim") or D // H
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    in_layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,),
                "self_attn.q_proj": (H * d, D), "self_attn.k_proj": (G * d, D),
                "self_attn.v_proj": (G * d, D), "self_attn.o_proj": (D, H * d),
                "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    for i in range(raw["num_hidden_layers"]):
        for name, shape in in_layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes


def formula_weights(raw):
    """Every tensor of the checkpoint from one closed formula, so that anyone can make the same."""
    weights = {}
    for t, (name, shape) in enumerate(sorted(tensor_shapes(raw).items())):
        x = np.arange(math.prod(shape), dtype=np.float64)
        wave = np.sin(x**1.5 * 0.1 + t).reshape(shape)
        weights[name] = 1 + 0.3 * wave if len(shape) == 1 else wave * (2 / shape[1]) ** 0.5
    return weights


def write_checkpoint(folder, raw, weights=None, shards=1, dtype=torch.float32):
    """A Hugging Face folder with these weights (default: the formula's) and 61 words w0 .. w60."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    weights = weights or formula_weights(raw)
    tensors = {name: torch.tensor(x).to(dtype) for name, x in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    vocabulary = {f"w{i}": i for i in range(raw["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        chosen = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        save_file(chosen, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@functools.cache
def small_model():
    """The grouped variant in float64, loaded once."""
    with tempfile.TemporaryDirectory() as folder:
        return model.load(write_checkpoint(Path(folder), RAW), torch.float64)


@functools.cache
def real_model():
    """The real checkpoint in float32, its tokenizer, and tokens (1, T) of a sentence."""
    llama = model.load(REAL, torch.float32)
    tokenizer = Tokenizer(REAL, llama.config)
    tokens = tokenizer.encode("Once upon a time there was a little girl. ")
    return llama, tokenizer, torch.tensor([tokens])


@functools.cache
def real_text():
    """512 tokens (T,) that the real checkpoint wrote."""
    llama, tokenizer, _ = real_model()
    return own_text(llama, tokenizer.encode("Once"), 512)[0]


@pytest.fixture
def small():
    return small_model()


@pytest.fixture
def real():
    return real_model()


def full(llama, capacity, B=1):
    """Full caches for this model."""
    return lorc.new_caches(llama, "full", capacity, B=B)


def cli(capsys, *args):
    """(status, standard output, standard error) of one command, in this process."""
    try:
        status = command.main([str(a) for a in args])
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


# An independent forward pass ---------------------------------------------------------------------

def numpy_rope(x, n, raw):
    """R_n x for one head x (d,) at position n: Eq. 20, with the scaling that config.json names."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = {"rope_theta": raw.get("rope_theta")} | scaling
    kind, d, out = rope.get("rope_type", rope.get("type", "default")), len(x), x.copy()
    for j in range(d // 2):
        f = rope["rope_theta"] ** (-2 * j / d)
        if kind == "linear":
            f /= rope["factor"]
        if kind == "llama3":
            old, wave = rope["original_max_position_embeddings"], 2 * math.pi / f
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wave > old / low:
                f /= rope["factor"]
            elif wave >= old / high:
                blend = (old / wave - low) / (high - low)
                f = (1 - blend) * f / rope["factor"] + blend * f
        c, s = math.cos(n * f), math.sin(n * f)
        out[j] = c * x[j] - s * x[j + d // 2]
        out[j + d // 2] = s * x[j] + c * x[j + d // 2]
    return out


def numpy_llama(raw, w, tokens):
    """Logits (T, V) of a LLaMA in loops over positions and heads: Eqs. 1-3.

    w: the tensors by their names in the checkpoint.
    """
    H, G = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    d = raw.get("head_dim") or raw["hidden_size"] // H

    def norm(x, name):
        return x / math.sqrt(float(x @ x) / len(x) + raw["rms_norm_eps"]) * w[name]
    xs = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(raw["num_hidden_layers"]):
        p, keys, values, out = f"model.layers.{i}.", [], [], []
        for n, x in enumerate(xs):
            h = norm(x, p + "input_layernorm.weight")
            q, k, v = (w[p + f"self_attn.{c}_proj.weight"] @ h for c in "qkv")
            keys.append([numpy_rope(k[g * d:g * d + d], n, raw) for g in range(G)])
            values.append([v[g * d:g * d + d] for g in range(G)])
            heads = []
            for a in range(H):
                g, query = a // (H // G), numpy_rope(q[a * d:a * d + d], n, raw)
                s = np.array([float(query @ keys[m][g]) / math.sqrt(d) for m in range(n + 1)])
                e = np.exp(s - s.max())
                heads.append(sum(e[m] / e.sum() * values[m][g] for m in range(n + 1)))
            x = x + w[p + "self_attn.o_proj.weight"] @ np.concatenate(heads)
            h = norm(x, p + "post_attention_layernorm.weight")
            gate, up = w[p + "mlp.gate_proj.weight"] @ h, w[p + "mlp.up_proj.weight"] @ h
            out.append(x + w[p + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        xs = out
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return np.stack([head @ norm(x, "model.norm.weight") for x in xs])


# Random texts for one cache -----------------------------------------------------------------------

class Text:
    """Random queries, keys and values of one layer, for a text that arrives in chunks."""

    def __init__(self, seed, chunks, B=1, G=2, R=2, d=4):
        """chunks: numbers of tokens. G key and value heads with R query heads each, of size d."""
        self.generator, self.chunks = torch.Generator().manual_seed(seed), list(chunks)
        self.B, self.T, self.G, self.d = B, sum(chunks), G, d
        self.q, self.k, self.v = (self.randn(B, self.T, heads, d) for heads in (G * R, G, G))
        rope = {"type": "default", "theta": 100.0}
        self.rope = model.Rope(model.Config(9, 8, 1, G * R, G, d, 8, 4096, 1e-5, True, rope))
        self.rope.reserve(self.T + 1, self.q)
        self.splits = [self.T], self.chunks, [1] * self.T      # one prefill, chunks, single tokens

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def randint(self, low, high):
        """A random integer in low .. high."""
        return torch.randint(low, high + 1, (), generator=self.generator).item()

    def orthogonal(self):
        """A random orthogonal matrix (G*d, G*d)."""
        return torch.linalg.qr(self.randn(self.G * self.d, self.G * self.d))[0]

    def basis(self, d_c=None):
        """A random basis of rank d_c (random by default), with orthonormal columns."""
        U = self.orthogonal()[:, :d_c or self.randint(1, self.G * self.d)]
        return Basis(U.T.contiguous(), U.contiguous())

    def full_cache(self):
        return FullCache(self.B, self.T, self.G, self.d, torch.float64)

    def compressed_cache(self, K, V):
        return CompressedCache(self.B, self.T, K, V, self.d)

    def bibranch_cache(self, K, V, **options):
        return BiBranchCache(self.B, self.T, K, V, self.d, **options)

    def pieces(self, chunks):
        """Queries, keys and values of each chunk."""
        return zip(*(x.split(chunks, 1) for x in (self.q, self.k, self.v)))

    def attend(self, cache, chunks):
        """The attention (B, T, H, d) that a cache computes if the text arrives in these chunks."""
        return torch.cat([cache.attend(*piece, self.rope) for piece in self.pieces(chunks)], 1)


def texts(max_chunks=6, max_chunk=9, **fixed):
    """A Hypothesis strategy for Text."""
    chunks = st.lists(st.integers(1, max_chunk), min_size=1, max_size=max_chunks)
    shape = {"B": st.integers(1, 2), "G": st.integers(1, 3), "R": st.integers(1, 3),
             "d": st.sampled_from([2, 4, 6, 8])}
    return st.builds(Text, st.integers(0, 2**32), chunks, **shape | fixed)
