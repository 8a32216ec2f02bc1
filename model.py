r"""A LLaMA forward pass in plain PyTorch, read straight from safetensors: Sec. 3 of the paper.

Reading order, bottom up:
    Config      config.json in our names, each with its letter in the paper
    Rope        the rotation R_n of App. C, one function for queries and keys
    Attention   Eqs. 1-3, except that the cache answers: `cache.attend(q, k, v, rope)`
    Llama       embed, L blocks, norm, head
    processes   under torchrun: each holds its share of the blocks and hands hidden states on
    load        a Hugging Face folder -> Llama, tensor by tensor
    Tokenizer   text <-> tokens, the model's own chat template, its end tokens

    tokens -> embed -> [ norm -> Wq, Wk, Wv -> cache.attend -> Wo -> + -> norm -> MLP -> + ] -> head
                       \______________________________ x L ______________________________/

Does NOT include: training, dropout, biases, sliding windows, mixtures of experts,
quantized weights. A checkpoint that asks for one of these is refused by name; of its tensors only
`inv_freq` and, where the embedding is the head, `lm_head` are not read.
"""
import inspect
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from tqdm import tqdm


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


# Reading config.json -----------------------------------------------------------------------------

HF_CONFIG = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "head_dim": "head_dim", "mlp": "intermediate_size",
             "context": "max_position_embeddings"}
ROPE_NUMBERS = {"default": (), "linear": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                           "original_max_position_embeddings")}
NOT_COMPUTED = {"attention_bias": "biases in attention", "mlp_bias": "biases in the MLP",
                "sliding_window": "a sliding window", "quantization_config": "quantized weights"}


def read_text(path: Path, most: int = 2**26) -> str:
    """A small file of a checkpoint. Raises UserError: no file, above `most` bytes, not UTF-8."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a plain file")
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path} is larger than {most >> 20} MiB, which no model needs")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError when there is none to be had."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def number(raw: dict, key: str, kind=int, default=None):
    """raw[key] as a positive number of the given kind. Raises UserError on anything else."""
    value = raw.get(key)
    value = default if value is None else value
    if kind is float and type(value) is int:
        value = float(value) if value < 1e30 else None
    if type(value) is not kind or not 0 < value < 1e30 or (kind is int and value >= 2**31):
        raise UserError(f"config.json: {key} should be a positive {kind.__name__} below "
                        f"{'2**31' if kind is int else '1e30'}, not {value!r:.40}")
    return value


def read_rope(raw: dict) -> dict:
    """RoPE's type and numbers in either spelling: rope_theta + rope_scaling, or rope_parameters."""
    given = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise UserError(f"config.json: {key} should be an object, not {raw[key]!r:.40}")
        given |= raw.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise UserError(f"config.json asks for RoPE of type {kind!r:.40}; "
                        f"computed here: {', '.join(ROPE_NUMBERS)}")
    if given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise UserError("config.json asks for a partial rotation, which is not computed here")
    given.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    theta = number({"rope_theta": given.get("rope_theta", raw.get("rope_theta"))},
                   "rope_theta", float, 1e4)
    rope = {"type": kind, "theta": theta} | {k: number(given, k, float) for k in ROPE_NUMBERS[kind]}
    if min(theta, rope.get("factor", 1)) < 1:
        raise UserError("config.json: rope_theta and factor should be at least 1")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError("config.json: low_freq_factor should be below high_freq_factor")
    return rope


def read_config(folder: Path) -> Config:
    """config.json as a Config. Raises UserError for whatever we would have to ignore."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ("llama", "mistral"):
        raise UserError(f"{folder} holds a {raw.get('model_type')!r:.40} model; "
                        "llama and mistral are read here")
    for key, what in NOT_COMPUTED.items():
        if raw.get(key):
            raise UserError(f"config.json asks for {what} ({key}), which is not computed here")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json asks for the activation {raw['hidden_act']!r:.40}; "
                        "only silu is computed here")
    heads = number(raw, "num_attention_heads")
    implied = {"kv_heads": heads, "head_dim": max(1, number(raw, "hidden_size") // heads),
               "context": 2048}
    shape = {ours: number(raw, theirs, default=implied.get(ours))
             for ours, theirs in HF_CONFIG.items()}
    config = Config(**shape, eps=number(raw, "rms_norm_eps", float, 1e-6),
                    tied=raw.get("tie_word_embeddings") is True, rope=read_rope(raw))
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(f"config.json: {config.heads} query heads must be a multiple of "
                        f"{config.kv_heads} KV heads, and head_dim {config.head_dim} must be even")
    return config


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

    def halves(self, x, positions):
        """The same rotation, the halves of the last axis apart: a compiler need not store them."""
        (x, y), (cos, _), (minus, sin) = (t.chunk(2, -1) for t in
                                          (x, self.cos[positions], self.sin[positions]))
        return x * cos + y * minus, y * cos + x * sin


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
    """The whole model. It is handed one cache per layer and does not know what they keep.

    Under torchrun `load` leaves each process its share of `layers`, and no head but in the last.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.rope = config, Rope(config)
        self.before = self.after = None                            # the neighbouring processes
        table = torch.empty(config.vocab, config.width)        # else drawn, which loads a compiler
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens, caches, block=Block.__call__):
        """tokens (B, T) following what the caches hold -> last hidden states (B, T, D), normed.

        None in all processes but the last: they hand on what their layers made of the tokens.
        """
        x = self.embed(tokens) if self.before is None else self.receive(tokens)        # (B, T, D)
        self.rope.reserve(caches[0].capacity, x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = block(layer, x, cache, self.rope)
        if self.after is None:
            return self.norm(x)
        dist.send(x.contiguous(), self.after)

    def receive(self, tokens):
        """What the process before has made of these tokens (B, T): (B, T, D)."""
        x = self.norm.weight.new_empty(*tokens.shape, self.config.width)
        dist.recv(x, self.before)
        return x

    def forward(self, tokens, caches):
        """tokens (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(tokens, caches))


# Many processes ----------------------------------------------------------------------------------

@contextmanager
def processes():
    """Join the other processes if torchrun started this one: the first is heard, the rest silent.

    Where one fails, it raises its error; in those that fail after it this is a silent SystemExit.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    store, rank, n = next(dist.rendezvous("env://"))
    dist.init_process_group(store=store, rank=rank, world_size=n)      # NCCL on GPUs, gloo on CPUs
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null if rank else sys.stdout), \
                redirect_stderr(null if rank else sys.stderr):
            yield
    except Exception:
        if store.add("failed", 1) == 1:
            raise
        time.sleep(1)                  # let the first to fail have its say: torchrun ends the rest
        raise SystemExit(2) from None
    dist.destroy_process_group()


def place():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(layers: int) -> slice:
    """Which of so many layers are this process's: consecutive, and equal to within one."""
    rank, n = place()
    return slice(layers * rank // n, layers * (rank + 1) // n)


def gather(own: list) -> list:
    """The lists of all processes, one after the other: what each knows of its layers, of all."""
    rank, n = place()
    lists = [own] * n
    if n > 1:
        dist.all_gather_object(lists, own)
    return [x for one in lists for x in one]


def from_first(read):
    """What read() gives in the first process, in all: its files, its standard input, its clock."""
    return gather([read()] if place()[0] == 0 else [])[0]


def from_last(x: torch.Tensor) -> torch.Tensor:
    """The last process's x, in all: elsewhere x is written over."""
    rank, n = place()
    if n > 1:
        dist.broadcast(x, n - 1)
    return x


# Reading weights ---------------------------------------------------------------------------------

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors",
             "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja"]
HF_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
            "layers": "model.layers", "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm", "attn": "self_attn",
            "Wq": "q_proj", "Wk": "k_proj", "Wv": "v_proj", "Wo": "o_proj",
            "mlp": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def hf_name(name: str) -> str:
    """Our parameter's Hugging Face name: layers.0.attn.Wk -> model.layers.0.self_attn.k_proj."""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def inside(folder: Path, path: Path) -> bool:
    """Is this a file, and no link out of its folder? The Hub's cache links snapshots/x to blobs."""
    try:
        real, home = path.resolve(), folder.resolve()
    except (ValueError, RuntimeError):                             # no name at all, or a loop
        return False
    blobs = home.parent.parent / "blobs"
    return path.is_file() and (home in real.parents or
                               home.parent.name == "snapshots" and blobs in real.parents)


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor: one file, or shards named by the index.

    Raises UserError also for a weight file that is a link out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        if not path.exists():
            raise UserError(f"{folder} holds no model.safetensors and no {index.name}"
                            " (pickled .bin weights are never read)")
        if not inside(folder, path):
            raise UserError(f"{path} is not a plain file in this folder; copy it there")
        return dict.fromkeys(header(path), path)
    names, files = read_json(index).get("weight_map"), {}
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map")
    for shard in sorted(set(map(str, names.values()))):
        if Path(shard).name != shard or not inside(folder, folder / shard):
            raise UserError(f"{index.name} names the shard {shard!r:.80}, "
                            f"which is not a file in {folder}")
        held = dict.fromkeys(header(folder / shard), folder / shard)
        if twice := files.keys() & held:
            raise UserError(f"{shard} holds {min(twice)!r:.80}, and so does another shard")
        files |= held
    return files


def header(path: Path) -> list[str]:
    """The names of the tensors in one safetensors file. Raises UserError when one comes twice."""
    try:
        with safe_open(path, "pt") as f, open(path, "rb") as raw:
            names, size = list(f.keys()), int.from_bytes(raw.read(8), "little")
            keys = json.loads(raw.read(size), object_pairs_hook=lambda pairs: [k for k, _ in pairs])
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}; fetch it again "
                        "(with git: `git lfs pull`)") from None
    if len(names) != sum(key != "__metadata__" for key in keys):
        raise UserError(f"{path} is not a readable safetensors file: a name comes twice in it")
    return names


def read_tensor(path: Path, name: str, shape, dtype, device) -> torch.Tensor:
    """One tensor, checked, in the wanted dtype and on the wanted device.

    The file is mapped for this tensor only: mapped pages count as memory until they are let go.
    """
    try:
        with safe_open(path, "pt") as f:
            part = f.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise UserError(f"{path.name}: {name} is stored as {part.get_dtype()}; "
                                "quantized weights are not read here")
            if tuple(part.get_shape()) != tuple(shape):
                raise UserError(f"{path.name}: {name} has shape {tuple(part.get_shape())}, "
                                f"config.json implies {tuple(shape)}")
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if tensor.device.type == "cpu" and len(shape) == 2 and shape[0] > shape[1]:
                tensor = tensor.view(shape[1], shape[0]).t()  # a CPU multiplies long rows fastest
            tensor.copy_(f.get_tensor(name))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise UserError(f"{path.name}: {name} holds NaN or infinite numbers "
                        f"in {str(tensor.dtype)[6:]}")
    return tensor


def find_model(name: str) -> Path:
    """A checkpoint's folder: `name` itself, or what the Hub has under that id. Raises UserError.

    Of a Hub repository only HUB_FILES are downloaded, into huggingface_hub's cache.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        why = "the Hub gives it to those it lets in only: ask on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "the Hub has none of that name, or not for you (`hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "the Hub cannot be reached and none was downloaded before"
    except Exception as e:                          # whatever else the network can do
        why = f"the Hub says: {str(e):.100}"
    raise UserError(f"{name} is no folder here; {why}")


def check_names(folder: Path, files: dict, wanted: dict, tied: bool) -> None:
    """Raises UserError when a tensor is missing, or is there and nothing here computes with it."""
    ignorable = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if tied else ""))
    for name in files.keys() - {hf_name(n) for n in wanted}:
        if not ignorable.search(name):
            raise UserError(f"{folder} holds the tensor {name!r:.80}, "
                            "which nothing here computes with")
    for name in wanted:
        if hf_name(name) not in files:
            raise UserError(f"{folder} lacks the tensor {hf_name(name)}")


def held_here(name: str, config: Config) -> bool:
    """Whether this process computes with our parameter `name`. The norm is in all, and is small."""
    rank, n = place()
    part, *rest = name.split(".")
    if part == "layers":
        return int(rest[0]) in range(config.layers)[share(config.layers)]
    first, last = rank == 0, rank == n - 1
    return {"embed": first or (last and config.tied), "norm": True, "head": last}[part]


def load(folder, dtype=None, device="cpu") -> Llama:
    """The model in a Hugging Face folder, in `dtype` (the checkpoint's own when None), on `device`.

    Under torchrun this process's share of it; what it does not hold stays without memory.
    Raises UserError when the folder, its config or its weights are not those of a LLaMA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --model takes one in Hugging Face layout")
    config = read_config(folder)
    files, (rank, n) = find_tensors(folder), place()
    if n > config.layers:
        raise UserError(f"{n} processes for {config.layers} layers: each needs one; start fewer")
    if config.layers > len(files):                  # else the next lines would build them all
        raise UserError(f"config.json has {config.layers} layers, "
                        f"{folder} only {len(files)} tensors")
    try:
        with torch.device("meta"):                  # shapes only: nothing is allocated yet
            model = Llama(config)
    except (RuntimeError, TypeError, OverflowError):
        raise UserError("config.json's sizes are beyond what a tensor can have") from None
    wanted = {name: p.shape for name, p in model.named_parameters()}
    check_names(folder, files, wanted, config.tied)
    if dtype is None:
        with safe_open(files[hf_name("embed.weight")], "pt") as f:
            dtype = DTYPES.get(f.get_slice(hf_name("embed.weight")).get_dtype())
    wanted = {name: shape for name, shape in wanted.items() if held_here(name, config)}
    state = {name: read_tensor(files[hf_name(name)], hf_name(name), shape, dtype, device)
             for name, shape in tqdm(wanted.items(), "loading", unit=" tensors",
                                     leave=False, disable=None)}
    model.load_state_dict(state, strict=False, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.layers = model.layers[share(config.layers)]
    model.before, model.after = rank - 1 if rank else None, rank + 1 if rank < n - 1 else None
    return model.eval().requires_grad_(False)


# Text --------------------------------------------------------------------------------------------

@contextmanager
def refusing(what: str):
    """Make a UserError of all that the tokenizers library throws.

    A damaged file can make it panic: that is no Exception in Python, and it writes lines of its own
    to file 2, which is closed to it meanwhile.
    """
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise UserError(f"{what}: {e}") from None
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(null)


class Tokenizer:
    """Text <-> tokens by the checkpoint's own files: tokenizer.json, chat template, end tokens."""

    def __init__(self, folder, config: Config):
        folder, self.config = Path(folder), config
        path = folder / "tokenizer.json"
        text = read_text(path, 2**28)
        with refusing(f"{path} cannot be read as a tokenizer"):
            self.fast = FastTokenizer.from_str(text)
        self.fast.no_truncation()                   # settings of its training, not of the model
        self.fast.no_padding()
        optional = {n: read_json(folder / n) if (folder / n).exists() else {}
                    for n in ("tokenizer_config.json", "generation_config.json")}
        self.options = optional["tokenizer_config.json"]
        ends = [c.get("eos_token_id")
                for c in (read_json(folder / "config.json"), *optional.values())]
        self.ends = {e for end in ends for e in (end if isinstance(end, list) else [end])
                     if type(e) is int}
        self.template_file = folder / "chat_template.jinja"

    def template(self) -> str:
        """The chat template's text. Raises UserError when there is none."""
        found = self.options.get("chat_template")
        if isinstance(found, list):                 # named templates: the one for plain chat
            found = next((t.get("template") for t in found
                          if isinstance(t, dict) and t.get("name") == "default"), None)
        if self.template_file.exists():
            found = read_text(self.template_file)
        if not isinstance(found, str):
            raise UserError("this model has no chat template; leave out --chat")
        return found

    def special(self, name: str) -> str:
        """The text of bos_token or eos_token, in tokenizer_config.json as text or an object."""
        token = self.options.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; begins with BOS exactly when the tokenizer says so (and `special`)."""
        with refusing("this model's tokenizer cannot read the text"):
            text.encode()                           # raises where it is not valid Unicode
            ids = self.fast.encode(text, add_special_tokens=special).ids
            bos = self.fast.token_to_id(self.special("bos_token"))
        wish = self.options.get("add_bos_token")
        if special and bos is not None and isinstance(wish, bool) and wish != (ids[:1] == [bos]):
            ids = [bos, *ids] if wish else ids[1:]
        if max(ids, default=0) >= self.config.vocab:
            raise UserError(f"tokenizer.json gives token {max(ids)}, "
                            f"config.json has vocab_size {self.config.vocab}")
        return ids

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the model's own chat template.

        The template is a program: it is rendered in a sandbox, in a process of its own that is
        given two seconds and 1 GiB. Raises UserError when it cannot be.
        """
        names = {"messages": [{"role": "user", "content": text}], "add_generation_prompt": True,
                 "tools": None, "bos_token": self.special("bos_token"),
                 "eos_token": self.special("eos_token")}
        task = json.dumps([self.template(), names]).encode()
        program = inspect.getsource(render) + "render()"
        done = subprocess.run([sys.executable, "-c", program], input=task, capture_output=True,
                              cwd=Path(__file__).resolve().parent)
        said = done.stderr.decode().splitlines() or ["it took more than 2 s or 1 GiB"]
        rendered, error = json.loads(done.stdout or json.dumps(["", said[-1]]))
        if error:
            raise UserError(f"the chat template cannot be rendered: {error}")
        return self.encode(rendered, special=False)


def render():
    """[template, names] on standard input -> [text, what went wrong] on standard output.

    Runs by itself: `Tokenizer.chat` hands the source of this function to a new Python.
    """
    import datetime
    import json
    import resource
    import sys

    from jinja2.sandbox import ImmutableSandboxedEnvironment
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))

    def refuse(message):
        raise ValueError(message)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    env.globals |= {"raise_exception": refuse,
                    "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    template, names = json.load(sys.stdin)
    try:
        text, error = env.from_string(template).render(names), ""
        if len(text) > 2**20 + len(names["messages"][0]["content"]):
            text, error = "", "it makes more than a million characters of its own"
    except Exception as e:                          # a template can fail in any way that code can
        text, error = "", f"{type(e).__name__}: {e}"[:200]
    json.dump([text, error], sys.stdout)


class Stream:
    """Text of tokens as they arrive. A character whose bytes have not all come is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.decode, self.last, self.new = tokenizer.fast.decode, prompt[-4:], []

    def step(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        self.new.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.new) < 16:
            return ""
        self.last, self.new = (self.new if text else self.last + self.new), []
        return text

    def rest(self) -> str:
        """What is still held back: decoded after the tokens before it, as spaces depend on them."""
        return self.decode(self.last + self.new)[len(self.decode(self.last)):]
