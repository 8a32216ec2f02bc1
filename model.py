r"""A LLaMA forward pass in plain PyTorch, and a loader for safetensors: Sec. 3 of the LoRC paper.

    paper                              here
    Eq. 1, softmax(Q K^T / sqrt(d)) V  cache.attention; `attend` of the layer's cache calls it
    Eq. 2, heads joined by W_o         Attention.forward
    Eq. 3, projections of one head     Attention.forward, for all heads at once
    Eq. 20, the rotation R_n           Rope

    tokens -> embed -> [ norm -> Wq, Wk, Wv -> cache.attend -> Wo -> + -> norm -> MLP -> + ] -> head
                       \______________________________ x L ______________________________/

Not included: training, dropout, biases, sliding windows, mixtures of experts, quantized weights.
A checkpoint that needs one of the last four is rejected. Otherwise `load` trusts its folder, which
the command line validates first with runtime/checkpoint.py.

In shapes, B is the number of sequences and T that of new tokens; Config has the other letters.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


class UserError(ValueError):
    """An error caused by the user's input. Its message says what is wrong and how to fix it."""


@dataclass(frozen=True)
class Config:
    """The sizes of one LLaMA. D, N and d are the letters of the paper's Sec. 3."""

    vocab: int            # V
    width: int            # D, model dimension
    layers: int           # L
    heads: int            # H, query heads
    kv_heads: int         # G, key and value heads: h in Eq. 4
    head_dim: int         # d
    mlp: int              # inner width of the MLP
    context: int          # N, largest number of positions
    eps: float            # in RMSNorm
    tied: bool            # whether the output head shares its weight with the embedding
    rope: dict            # type and theta of RoPE, and the numbers that the type needs

    @property
    def kv_width(self) -> int:
        """G*d: the rows of Wk and Wv, the size of one token's keys, and d_max of Eq. 13 [E10]."""
        return self.kv_heads * self.head_dim


# The forward pass --------------------------------------------------------------------------------

class Rope:
    """The rotation R_n of Eq. 20: components j and j + d/2 of a head turn by n * frequency_j."""

    def __init__(self, config: Config):
        self.config, self.cos, self.sin = config, torch.empty(0), torch.empty(0)

    def frequencies(self, dtype) -> torch.Tensor:
        """Radians per position of each pair of components (d/2,), scaled as the checkpoint asks."""
        d, rope = self.config.head_dim, self.config.rope
        freq = 1.0 / rope["theta"] ** (torch.arange(0, d, 2, dtype=torch.int64).to(dtype) / d)
        if rope["type"] == "linear":
            freq = freq / rope["factor"]
        if rope["type"] == "llama3":     # keeps high frequencies, divides low ones, blends between
            turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            freq = keep * freq + (1 - keep) * freq / rope["factor"]
        return freq

    def reserve(self, length: int, like: torch.Tensor) -> None:
        """Extend the tables to positions 0 .. length-1, with the dtype and device of `like`."""
        if length > len(self.cos) or self.cos.dtype != like.dtype or self.cos.device != like.device:
            # Angles in float32 at least: bfloat16 has no number between 256 and 258.
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            angle = torch.outer(torch.arange(length, dtype=wide), self.frequencies(wide))
            cos, sin = angle.cos(), angle.sin()                            # (length, d/2)
            self.cos = torch.cat((cos, cos), -1)[:, None].to(like)         # (length, 1, d)
            self.sin = torch.cat((-sin, sin), -1)[:, None].to(like)        # with the signs of R_n

    def __call__(self, x: torch.Tensor, positions, components=slice(None)) -> torch.Tensor:
        """Rotate x (B, T, heads, d) to its positions, a slice or an index tensor (T,).

        components: the component of a head as which each number of x turns (commuting basis).
        """
        cos, sin = self.cos[positions][..., components], self.sin[positions][..., components]
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Multi-head or grouped-query attention, Eqs. 1-3 and Sec. 4.3. The cache computes Eq. 1."""

    def __init__(self, config: Config):
        super().__init__()
        D, H, G, d = config.width, config.heads, config.kv_heads, config.head_dim
        self.d = d
        self.Wq = nn.Linear(D, H * d, bias=False)      # weights are (out, in): K = X Wk^T  [E1]
        self.Wk = nn.Linear(D, G * d, bias=False)
        self.Wv = nn.Linear(D, G * d, bias=False)
        self.Wo = nn.Linear(H * d, D, bias=False)

    def forward(self, x, cache, rope):
        """x (B, T, D) -> (B, T, D); appends the keys and values of these T tokens to the cache."""
        q = self.Wq(x).unflatten(-1, (-1, self.d))     # (B, T, H, d)   Eq. 3
        k = self.Wk(x).unflatten(-1, (-1, self.d))     # (B, T, G, d)
        v = self.Wv(x).unflatten(-1, (-1, self.d))     # (B, T, G, d)
        heads = cache.attend(q, k, v, rope)            # (B, T, H, d)   Eq. 1
        return self.Wo(heads.flatten(2))               # (B, T, D)      Eq. 2


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). It is a product and therefore not Lipschitz [E15]."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp, bias=False)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class Block(nn.Module):
    """One layer: attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, config.eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, cache, rope):
        x = x + self.attn(self.attn_norm(x), cache, rope)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The whole model. Its caller passes one cache per layer; what a cache stores is up to it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.rope = config, Rope(config)
        table = torch.empty(config.vocab, config.width)       # not drawn at random: that is slow
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def blocks(self, x, caches, block=Block.__call__):
        """Pass x (B, T, D) through all layers. `block` may be a compiled Block."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = block(layer, x, cache, self.rope)
        return x

    def hidden(self, tokens, caches, block=Block.__call__):
        """Final normed states (B, T, D) of tokens (B, T), which follow those in the caches."""
        x = self.embed(tokens)                                                         # (B, T, D)
        self.rope.reserve(caches[0].capacity, x)
        return self.norm(self.blocks(x, caches, block))

    def forward(self, tokens, caches):
        """Logits (B, T, V) of tokens (B, T)."""
        return self.head(self.hidden(tokens, caches))


# Reading a Hugging Face folder -------------------------------------------------------------------

HF_CONFIG = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "head_dim": "head_dim", "mlp": "intermediate_size",
             "context": "max_position_embeddings", "eps": "rms_norm_eps"}
HF_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
            "layers": "model.layers", "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm", "attn": "self_attn",
            "Wq": "q_proj", "Wk": "k_proj", "Wv": "v_proj", "Wo": "o_proj",
            "mlp": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SUPPORTED = {"model_type": ("llama", "mistral"), "hidden_act": ("silu", None),
             "attention_bias": (False, None), "mlp_bias": (False, None),
             "quantization_config": (None,)}
ROPE_NUMBERS = {"default": (), "linear": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                           "original_max_position_embeddings")}
# What transformers assumes for a missing key. A key that is null is not missing.
MISSING = {"llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
           "mistral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                       "num_key_value_heads": 8, "sliding_window": 4096}}


def read_rope(raw: dict, context: int) -> dict:
    """Type and numbers of RoPE, with transformers' precedence: rope_scaling before rope_parameters,
    rope_theta inside before outside, original_max_position_embeddings outside before inside."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_NUMBERS:
        raise UserError(f"config.json has RoPE of type {kind!r:.40}; "
                        f"supported: {', '.join(map(repr, ROPE_NUMBERS))}")
    if given.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
        raise UserError("config.json has a partial_rotary_factor other than 1; supported: 1")
    theta = given.get("rope_theta") or raw.get("rope_theta") or 1e4
    original = raw.get("original_max_position_embeddings")
    outside = {"original_max_position_embeddings": original} if original else {}
    given = {"original_max_position_embeddings": context} | given | outside
    numbers = {name: float(given[name]) for name in ROPE_NUMBERS[kind]}
    return {"type": kind, "theta": float(theta)} | numbers


def read_config(folder) -> Config:
    """config.json as a Config. Raises UserError for a feature that is not supported."""
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for key, values in SUPPORTED.items():
        if raw.get(key) not in values:
            raise UserError(f"config.json has {key} {raw.get(key)!r:.40}; "
                            f"supported: {', '.join(map(repr, values))}")
    raw = MISSING[raw["model_type"]] | raw
    sizes = {ours: raw.get(key) for ours, key in HF_CONFIG.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_dim"] = sizes["head_dim"] or sizes["width"] // sizes["heads"]
    sizes["eps"], context, window = float(sizes["eps"]), sizes["context"], raw.get("sliding_window")
    if window is not None and window < context:            # a longer one never hides a token
        raise UserError(f"config.json has a sliding_window of {window} tokens; supported: null, or "
                        f"at least the context of {context}")
    tied = raw.get("tie_word_embeddings") is True
    return Config(**sizes, tied=tied, rope=read_rope(raw, context))


def hf_name(name: str) -> str:
    """Hugging Face's name of our parameter: layers.0.attn.Wk -> model.layers.0.self_attn.k_proj."""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor: one file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = {}
    for shard in shards:
        with safe_open(folder / shard, "pt") as f:
            files.update(dict.fromkeys(f.keys(), folder / shard))
    return files


def read_tensor(files: dict, name: str, shape, dtype, device) -> torch.Tensor:
    """One parameter in `dtype` on `device`. Its file is opened for it alone, because the pages that
    are mapped count as memory until the file is closed."""
    with safe_open(files[hf_name(name)], "pt") as f:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.device.type == "cpu" and len(shape) == 2 and shape[0] > shape[1]:
            tensor = tensor.view(shape[1], shape[0]).t()      # a CPU multiplies long rows fastest
        return tensor.copy_(f.get_tensor(hf_name(name)))


def load(folder, dtype=None, device="cpu", layers=slice(None)) -> Llama:
    """The model in a Hugging Face folder, in `dtype` (default: as stored), on `device`.

    Only the layers that the slice `layers` selects are read; the model then has no others.
    """
    config, files = read_config(folder), find_tensors(Path(folder))
    with safe_open(files[hf_name("embed.weight")], "pt") as f:
        dtype = dtype or f.get_tensor(hf_name("embed.weight")).dtype
    with torch.device("meta"):                          # shapes only: nothing is allocated yet
        llama = Llama(config)
    selected = tuple(f"layers.{i}." for i in range(config.layers)[layers])
    state = {name: read_tensor(files, name, p.shape, dtype, device)
             for name, p in llama.named_parameters()
             if name.startswith(selected) or not name.startswith("layers.")}
    llama.load_state_dict(state, strict=False, assign=True)
    if config.tied:
        llama.head.weight = llama.embed.weight
    llama.layers = llama.layers[layers]
    return llama.eval().requires_grad_(False)
