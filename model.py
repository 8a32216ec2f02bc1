r"""A LLaMA forward pass in plain PyTorch, read straight from safetensors: Sec. 3 of the paper.

Reading order, bottom up:
    Config      config.json in our names, each with its letter in the paper
    Rope        the rotation R_n of App. C, one function for queries and keys
    Attention   Eqs. 1-3, except that the cache answers: `cache.attend(q, k, v, rope)`
    Llama       embed, L blocks, norm, head
    load        a Hugging Face folder -> Llama, tensor by tensor

    tokens -> embed -> [ norm -> Wq, Wk, Wv -> cache.attend -> Wo -> + -> norm -> MLP -> + ] -> head
                       \______________________________ x L ______________________________/

Does NOT include: training, dropout, biases, sliding windows, mixtures of experts,
quantized weights. A checkpoint that asks for one of these is refused by name. `load` trusts its
folder; the command line holds a stranger's folder against runtime/checkpoint.py first.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


class UserError(ValueError):
    """Something the person at the keyboard can mend: its message is one line that says how."""


@dataclass(frozen=True)
class Config:
    """The shape of one LLaMA; letters as in the paper's Sec. 3 and Table 3."""

    vocab: int            # V
    width: int            # D, model dimension
    layers: int           # L
    heads: int            # H, query heads
    kv_heads: int         # G, key and value heads: h in Eq. 4
    head_dim: int         # d
    mlp: int              # inner width of the MLP
    context: int          # N, positions the model was made for
    eps: float            # in RMSNorm
    tied: bool            # the output head is the embedding
    rope: dict            # type, theta and that type's own numbers

    @property
    def kv_width(self) -> int:
        """G*d: the rows of Wk and Wv, the numbers a full cache keeps of one key, d_max [E10]."""
        return self.kv_heads * self.head_dim


# The forward pass --------------------------------------------------------------------------------

class Rope:
    """Rotary position embedding R_n of Eq. 20: a head's pair (j, j + d/2) turns by n * frequency_j.

    The only place where anything is rotated. Tables hold cos and sin with the sign of the rotation
    folded into sin, so that a rotation is two products and a sum.
    """

    def __init__(self, config: Config):
        self.config, self.cos, self.sin = config, torch.empty(0), torch.empty(0)

    def frequencies(self, dtype) -> torch.Tensor:
        """Radians per position of each component pair (d/2,); linear and llama3 scaling applied."""
        d, rope = self.config.head_dim, self.config.rope
        freq = 1.0 / rope["theta"] ** (torch.arange(0, d, 2, dtype=torch.int64).to(dtype) / d)
        if rope["type"] == "linear":
            freq = freq / rope["factor"]
        if rope["type"] == "llama3":  # long waves slowed by `factor`, short kept, blended between
            turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            freq = keep * freq + (1 - keep) * freq / rope["factor"]
        return freq

    def reserve(self, length: int, like: torch.Tensor) -> None:
        """Make the tables long enough for positions 0 .. length-1, with like's dtype and device."""
        if length > len(self.cos) or self.cos.dtype != like.dtype or self.cos.device != like.device:
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            angle = torch.outer(torch.arange(length, dtype=wide), self.frequencies(wide))
            cos, sin = angle.cos(), angle.sin()
            self.cos = torch.cat((cos, cos), -1)[:, None].to(like)         # (length, 1, d)
            self.sin = torch.cat((-sin, sin), -1)[:, None].to(like)

    def __call__(self, x: torch.Tensor, positions, columns=slice(None)) -> torch.Tensor:
        """x (B, T, heads, d) rotated to its positions: a slice, or an index tensor (T,).

        columns: for each component of x the component of a head that it turns with, when x is not
        heads but latents that turn as heads do (Basis.turns).
        """
        cos, sin = self.cos[positions][..., columns], self.sin[positions][..., columns]
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Multi-head and grouped-query attention (Eqs. 1-3, Sec. 4.3); softmax lives in the cache."""

    def __init__(self, config: Config):
        super().__init__()
        D, H, G, d = config.width, config.heads, config.kv_heads, config.head_dim
        self.heads = (-1, d)
        self.Wq = nn.Linear(D, H * d, bias=False)      # weights are (out, in): K = X Wk^T  [E1]
        self.Wk = nn.Linear(D, G * d, bias=False)
        self.Wv = nn.Linear(D, G * d, bias=False)
        self.Wo = nn.Linear(H * d, D, bias=False)

    def forward(self, x, cache, rope):
        q, k, v = (W(x).unflatten(-1, self.heads) for W in (self.Wq, self.Wk, self.Wv))
        return self.Wo(cache.attend(q, k, v, rope).flatten(2))  # q (B, T, H, d); k, v (B, T, G, d)


class MLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x). A product, so not Lipschitz [E15]."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp, bias=False)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class Block(nn.Module):
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
    """The whole model. It is handed one cache per layer and does not know what they keep."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.rope = config, Rope(config)
        table = torch.empty(config.vocab, config.width)        # else drawn, which loads a compiler
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def blocks(self, x, caches, block=Block.__call__):
        """x (B, T, D) through all layers. `block` may be a compiled Block."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = block(layer, x, cache, self.rope)
        return x

    def hidden(self, tokens, caches, block=Block.__call__):
        """tokens (B, T) following what the caches hold -> last hidden states (B, T, D), normed."""
        x = self.embed(tokens)                                                         # (B, T, D)
        self.rope.reserve(caches[0].capacity, x)
        return self.norm(self.blocks(x, caches, block))

    def forward(self, tokens, caches):
        """tokens (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(tokens, caches))


# Reading a Hugging Face folder --------------------------------------------------------------------

HF_CONFIG = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "head_dim": "head_dim", "mlp": "intermediate_size",
             "context": "max_position_embeddings", "eps": "rms_norm_eps"}
HF_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
            "layers": "model.layers", "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm", "attn": "self_attn",
            "Wq": "q_proj", "Wk": "k_proj", "Wv": "v_proj", "Wo": "o_proj",
            "mlp": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NOT_COMPUTED = {"attention_bias": "biases in attention", "mlp_bias": "biases in the MLP",
                "sliding_window": "a sliding window", "quantization_config": "quantized weights"}
ROPE_NUMBERS = {"default": (), "linear": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                           "original_max_position_embeddings")}


def read_rope(raw: dict) -> dict:
    """RoPE's type and numbers in either spelling: rope_theta + rope_scaling, or rope_parameters."""
    given = {"rope_theta": raw.get("rope_theta") or 1e4, "original_max_position_embeddings":
             raw.get("max_position_embeddings"), "partial_rotary_factor":
             raw.get("partial_rotary_factor")}
    given |= (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_NUMBERS:
        raise UserError(f"config.json asks for RoPE of type {kind!r:.40}; "
                        f"computed here: {', '.join(ROPE_NUMBERS)}")
    if given["partial_rotary_factor"] not in (None, 1.0):
        raise UserError("config.json asks for a partial rotation, which is not computed here")
    numbers = {k: float(given[k]) for k in ROPE_NUMBERS[kind]}
    return {"type": kind, "theta": float(given["rope_theta"])} | numbers


def read_config(folder) -> Config:
    """config.json as a Config. Raises UserError for whatever we would have to ignore."""
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") not in ("llama", "mistral"):
        raise UserError(f"{folder} holds a {raw.get('model_type')!r:.40} model; "
                        "llama and mistral are read here")
    for key, what in NOT_COMPUTED.items():
        if raw.get(key):
            raise UserError(f"config.json asks for {what} ({key}), which is not computed here")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json asks for the activation {raw['hidden_act']!r:.40}; "
                        "only silu is computed here")
    heads = raw["num_attention_heads"]
    implied = {"kv_heads": heads, "head_dim": max(1, raw["hidden_size"] // heads), "context": 2048,
               "eps": 1e-6}
    shape = {ours: implied.get(ours) if raw.get(theirs) is None else raw[theirs]
             for ours, theirs in HF_CONFIG.items()}
    shape["eps"] = float(shape["eps"])
    return Config(**shape, tied=raw.get("tie_word_embeddings") is True, rope=read_rope(raw))


def hf_name(name: str) -> str:
    """Our parameter's Hugging Face name: layers.0.attn.Wk -> model.layers.0.self_attn.k_proj."""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor: one file, or the shards that the index names."""
    index, files = folder / "model.safetensors.index.json", {}
    shards = (set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
              if index.exists() else ["model.safetensors"])
    for shard in shards:
        with safe_open(folder / shard, "pt") as f:
            files |= dict.fromkeys(f.keys(), folder / shard)
    return files


def read_tensor(path: Path, name: str, shape, dtype, device) -> torch.Tensor:
    """One tensor, in the wanted dtype and on the wanted device.

    The file is mapped for this tensor only: mapped pages count as memory until they are let go.
    """
    with safe_open(path, "pt") as f:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.device.type == "cpu" and len(shape) == 2 and shape[0] > shape[1]:
            tensor = tensor.view(shape[1], shape[0]).t()      # a CPU multiplies long rows fastest
        return tensor.copy_(f.get_tensor(name))


def load(folder, dtype=None, device="cpu", layers=slice(None)) -> Llama:
    """The model in a Hugging Face folder, in `dtype` (the checkpoint's own when None), on `device`.

    `layers` are the ones that are read, all by default; the others stay out of the model.
    """
    folder = Path(folder)
    config, files = read_config(folder), find_tensors(folder)
    with safe_open(files[hf_name("embed.weight")], "pt") as f:
        dtype = dtype or f.get_tensor(hf_name("embed.weight")).dtype
    with torch.device("meta"):                          # shapes only: nothing is allocated yet
        llama = Llama(config)
    skipped = set(range(config.layers)) - set(range(config.layers)[layers])
    state = {name: read_tensor(files[hf_name(name)], hf_name(name), p.shape, dtype, device)
             for name, p in llama.named_parameters()
             if not (name.startswith("layers.") and int(name.split(".")[1]) in skipped)}
    llama.load_state_dict(state, strict=False, assign=True)
    if config.tied:
        llama.head.weight = llama.embed.weight
    llama.layers = llama.layers[layers]
    return llama.eval().requires_grad_(False)
