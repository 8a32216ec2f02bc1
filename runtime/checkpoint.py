"""A checkpoint may come from anyone: find it, and refuse in one line whatever is wrong with it.

`check` holds a folder's config and the headers of its weights against what model.py computes with,
before anything is allocated; model.load then reads it without a second thought. Also here: the
bases that --save writes and --bases reads.
"""
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import model
from cache import Basis
from lorc import Plan, log_kappa_tilde
from model import HF_CONFIG, ROPE_NUMBERS, UserError, hf_name, read_config
from runtime import many
from runtime.commuting import CommutingBasis

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors",
             "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja"]
DTYPES = {"F64", "F32", "F16", "BF16"}


# Finding and reading files -----------------------------------------------------------------------

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


def inside(folder: Path, path: Path) -> bool:
    """Is this a file, and no link out of its folder? The Hub's cache links snapshots/x to blobs."""
    try:
        real, home = path.resolve(), folder.resolve()
    except (ValueError, RuntimeError):                             # no name at all, or a loop
        return False
    blobs = home.parent.parent / "blobs"
    return path.is_file() and (home in real.parents or
                               home.parent.name == "snapshots" and blobs in real.parents)


# The check ---------------------------------------------------------------------------------------

def check(folder) -> None:
    """Raises UserError unless the folder holds a LLaMA that model.load can read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --model takes one in Hugging Face layout")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    config = check_config(read_json(folder / "config.json"), folder)
    files = check_files(folder)
    if config.layers > len(files):                  # else the next lines would build them all
        raise UserError(f"config.json has {config.layers} layers, "
                        f"{folder} only {len(files)} tensors")
    try:
        with torch.device("meta"):                  # shapes only: nothing is allocated
            llama = model.Llama(config)
    except (RuntimeError, TypeError, OverflowError):
        raise UserError("config.json's sizes are beyond what a tensor can have") from None
    wanted = {hf_name(name): tuple(p.shape) for name, p in llama.named_parameters()}
    check_names(folder, files, wanted, config.tied)
    check_shapes(files, wanted)


def check_config(raw: dict, folder) -> model.Config:
    """Numbers are numbers and within bounds, and model.py knows what they ask for."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise UserError(f"config.json: {key} should be an object, not {raw[key]!r:.40}")
    rope = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    for key in ("model_type", "hidden_act"):
        if not isinstance(raw.get(key, ""), str):
            raise UserError(f"config.json asks for a {raw[key]!r:.40} model, which is not known")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise UserError(f"config.json asks for RoPE of type {kind!r:.40}, which is not known")
    optional = {"num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"}
    for key in HF_CONFIG.values():
        number(raw, key, float if key == "rms_norm_eps" else int, key in optional)
    number({"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}, "rope_theta", float, True)
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    for key in ROPE_NUMBERS.get(kind, ()):
        number(rope, key, float)
    config = read_config(folder)
    if min(config.rope["theta"], config.rope.get("factor", 1)) < 1:
        raise UserError("config.json: rope_theta and factor should be at least 1")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError("config.json: low_freq_factor should be below high_freq_factor")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(f"config.json: {config.heads} query heads must be a multiple of "
                        f"{config.kv_heads} KV heads, and head_dim {config.head_dim} must be even")
    return config


def number(raw: dict, key: str, kind=int, optional=False) -> None:
    """raw[key] is a positive number of the given kind, within bounds; absent only if `optional`."""
    value = raw.get(key)
    if value is None and optional:
        return
    below = 2**31 if kind is int else 1e30
    if type(value) not in {int, kind} or not 0 < value < below:
        raise UserError(f"config.json: {key} should be a positive {kind.__name__} below "
                        f"{'2**31' if kind is int else '1e30'}, not {value!r:.40}")


def check_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor: files of this folder, or of a Hub cache, each name once."""
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


def check_names(folder, files, wanted, tied) -> None:
    """Raises UserError when a tensor is missing, or is there and nothing here computes with it."""
    ignorable = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if tied else ""))
    for name in files.keys() - wanted.keys():
        if not ignorable.search(name):
            raise UserError(f"{folder} holds the tensor {name!r:.80}, "
                            "which nothing here computes with")
    for name in wanted:
        if name not in files:
            raise UserError(f"{folder} lacks the tensor {name}")


def check_shapes(files, wanted) -> None:
    """Raises UserError for a tensor of another shape than config.json implies, or quantized."""
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as f:
            for name in wanted.keys() & set(f.keys()):
                part = f.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"{path.name}: {name} is stored as {part.get_dtype()}; "
                                    "quantized weights are not read here")
                if tuple(part.get_shape()) != wanted[name]:
                    raise UserError(f"{path.name}: {name} has shape {tuple(part.get_shape())}, "
                                    f"config.json implies {wanted[name]}")


def check_numbers(llama) -> None:
    """Raises UserError for a weight that is not finite in the dtype that was asked for."""
    for name, p in llama.named_parameters():
        if not torch.isfinite(p.sum(dtype=torch.float32)):
            raise UserError(f"{hf_name(name)} holds NaN or infinite numbers "
                            f"in {str(p.dtype)[6:]}")


# Saving bases ------------------------------------------------------------------------------------

def fingerprint(llama):
    """What ties bases to a model: its shape in words, some numbers of every Wk and Wv (2L, 16)."""
    rows = [W.weight[0, :16] for layer in llama.layers for W in (layer.attn.Wk, layer.attn.Wv)]
    return repr(llama.config), torch.stack(many.gather([row.float().cpu() for row in rows]))


def parts(b):
    """The tensors of a basis on the CPU, under their names in the file."""
    tensors = {"down": b.down.cpu(), "up": b.up.cpu()}
    if isinstance(b, CommutingBasis):
        tensors["turns"] = b.components.cpu()
    return tensors


def save_bases(folder, llama, plan, bases):
    """Write bases and plan to folder/bases.safetensors: whole or not at all. Raises UserError."""
    shape, numbers = fingerprint(llama)

    bases = many.gather([pair and tuple(parts(b) for b in pair) for pair in bases])
    if many.place()[0] > 0:
        return
    tensors = {f"layers.{i}.{kind}.{part}": x.clone(memory_format=torch.contiguous_format)
               for i, pair in enumerate(bases) if pair
               for kind, b in zip("kv", pair) for part, x in b.items()}
    about = {"model": shape,
             "plan": json.dumps({"log_kappa": plan.log_kappa, "ranks": plan.ranks})}
    path = Path(folder) / "bases.safetensors"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(save(tensors | {"model": numbers}, about))
        os.replace(beside, path)
    except OSError as e:
        raise UserError(f"--save {folder}: {e.strerror or e}; give a folder that can be "
                              "written to") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def fits(b, d_c, config):
    """Whether a basis has d_c columns for this model and numbers that can be computed with."""
    whole = b.down.shape == b.up.T.shape == (d_c, config.kv_width)
    if isinstance(b, CommutingBasis):
        first, half = b.components[:d_c // 2], config.head_dim // 2
        whole &= b.components.dtype == torch.int64
        whole &= torch.equal(b.components, torch.cat((first, first + half)))
        whole &= bool(((first >= 0) & (first < half)).all())
    return whole and (b.down @ b.up).isfinite().all()


def load_bases(folder, llama):
    """The plan and the bases in folder/bases.safetensors. Raises UserError if they do not fit."""
    path, L, d_max = Path(folder) / "bases.safetensors", llama.config.layers, llama.config.kv_width
    own = many.share(L)
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name}; give the folder that --save wrote")
    try:
        with safe_open(path, "pt") as f:
            about, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
        saved = json.loads(about["plan"])
        kappa, ranks = ([(a, b) for a, b in saved[name]] for name in ("log_kappa", "ranks"))
        shape, numbers = fingerprint(llama)
        if about["model"] != shape or not torch.allclose(tensors["model"], numbers, 0.01, 1e-4):
            raise UserError(f"{path} was made for another model; make new ones with --save")
        good = len(kappa) == len(ranks) == L
        good &= all(type(x) is float for pair in kappa for x in pair)
        if not (good and all(type(x) is int and 1 <= x <= d_max for pair in ranks for x in pair)):
            raise ValueError
        like = llama.norm.weight

        def read(name):
            down, up, turns = (tensors.get(f"{name}.{part}") for part in ("down", "up", "turns"))
            if turns is None:
                return Basis(down.to(like), up.to(like))
            return CommutingBasis(down.to(like), up.to(like), turns.to(like.device))
        bases = [None if pair == (d_max, d_max) else
                 tuple(read(f"layers.{i}.{kind}") for kind in "kv")
                 for i, pair in list(enumerate(ranks))[own]]
        if not all(fits(b, d_c, llama.config)
                   for pair, dims in zip(bases, ranks[own]) if pair for b, d_c in zip(pair, dims)):
            raise ValueError
    except UserError:
        raise
    except Exception:                               # anything at all can be wrong with a file
        raise UserError(f"{path} holds no bases that can be read; make some with --save"
                              ) from None
    return Plan(kappa, log_kappa_tilde(kappa), ranks, d_max), bases
