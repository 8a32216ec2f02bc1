"""Checkpoints from anyone: find a checkpoint and validate it before it is read.

`check` compares a folder's configuration and the headers of its weights with what model.py supports
before anything is allocated. Whatever is wrong is reported in one line, as a UserError. Afterwards
model.load can read the folder without further checks.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import model
from model import HF_CONFIG, MISSING, ROPE_NUMBERS, SUPPORTED, UserError, hf_name, read_config

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors",
             "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja"]
DTYPES = {"F64", "F32", "F16", "BF16"}
NULLABLE = {"num_key_value_heads", "head_dim", "sliding_window", "rope_theta"}
MAX_CONFIG, MAX_HEADER, MAX_JSON = 2**20, 2**20, 2**22                  # bytes


# Finding and reading files -----------------------------------------------------------------------

def find_model(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or a download from the Hugging Face Hub.

    Only HUB_FILES of a repository are downloaded, into huggingface_hub's cache. Raises UserError.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        why = "gives access on request only: ask on the model's page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "has no such model, or it is private (`hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "cannot be reached, and the model was not downloaded before"
    except Exception as e:                          # whatever else a network can do
        why = f"answers: {str(e):.100}"
    raise UserError(f"there is no folder {name}, and the Hugging Face Hub, which was asked for a "
                    f"model of that name, {why}")


def is_inside(folder: Path, path: Path) -> bool:
    """Whether path is a regular file in the folder, and not a link to a file elsewhere.

    The Hub's cache is an exception: there, snapshots/x/file links to blobs/hash.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (ValueError, RuntimeError):              # not a valid name, or a link to itself
        return False
    blobs = home.parent.parent / "blobs"
    in_hub_cache = home.parent.name == "snapshots" and blobs in target.parents
    return path.is_file() and (home in target.parents or in_hub_cache)


def read_text(folder: Path, name: str, most: int = MAX_JSON) -> str:
    """The text of one of a checkpoint's files. Raises UserError if it has more than `most` bytes.
    """
    path = folder / name
    if path.exists() and not is_inside(folder, path):
        raise UserError(f"{path} is not a plain file in this folder; copy it there")
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path} is larger than {most >> 20} MiB, which no model needs")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None


def read_json(folder: Path, name: str) -> dict:
    """The JSON object in one of a checkpoint's files. Raises UserError if there is none."""
    text = read_text(folder, name, MAX_CONFIG if name == "config.json" else MAX_JSON)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{folder / name} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{folder / name} should hold a JSON object, not a {type(value).__name__}")
    return value


# Validating a folder -----------------------------------------------------------------------------

def check(folder) -> None:
    """Raises UserError unless the folder holds a LLaMA that model.load can read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --model takes one in Hugging Face layout")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    config = check_config(read_json(folder, "config.json"), folder)
    tensors = check_files(folder)
    if config.layers > len(tensors):                # otherwise the next lines would build them all
        raise UserError(f"config.json has {config.layers} layers, "
                        f"but {folder} has only {len(tensors)} tensors")
    try:
        with torch.device("meta"):                  # shapes only: nothing is allocated
            llama = model.Llama(config)
    except (RuntimeError, TypeError, OverflowError):
        raise UserError("config.json's sizes are beyond what a tensor can have") from None
    wanted = {hf_name(name): tuple(p.shape) for name, p in llama.named_parameters()}
    check_names(folder, tensors, wanted, config.tied)
    check_shapes(tensors, wanted)
    if config.tied:
        check_tied(tensors)


def check_config(raw: dict, folder) -> model.Config:
    """The configuration, if all its numbers have the right type and size. Raises UserError."""
    for key, values in SUPPORTED.items():
        if raw.get(key) not in values:
            read_config(folder)                     # raises, and names the key
    raw = MISSING[raw["model_type"]] | raw
    for key in HF_CONFIG.values():
        check_number(raw, key, float if key == "rms_norm_eps" else int)
    check_number(raw, "sliding_window", int)
    check_rope(raw)
    config = read_config(folder)
    rope = config.rope
    if min(rope["theta"], rope.get("factor", 1)) < 1:
        raise UserError("config.json: rope_theta and factor should be at least 1")
    if rope["type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError("config.json: low_freq_factor should be below high_freq_factor")
    if config.heads % config.kv_heads or config.head_dim % 2 or config.head_dim == 0:
        raise UserError(f"config.json: {config.heads} query heads must be a multiple of "
                        f"{config.kv_heads} KV heads, and head_dim {config.head_dim} must be even")
    return config


def check_rope(raw: dict) -> None:
    """Raises UserError unless config.json describes a RoPE with valid numbers."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json: rope_scaling or rope_parameters should be one flat object, "
                        f"not {rope!r:.40}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise UserError(f"config.json has RoPE of type {kind!r:.40}; it should be a name")
    original = "original_max_position_embeddings"
    rope = {"rope_theta": raw.get("rope_theta"), original: raw["max_position_embeddings"]} | rope
    if original in raw:
        rope[original] = raw[original]
    for key in ("rope_theta", *ROPE_NUMBERS.get(kind, ())):
        check_number(rope, key, float)


def check_number(raw: dict, key: str, kind) -> None:
    """Raises UserError unless raw[key] is a positive number of this kind within bounds.

    The keys in NULLABLE may be null or missing.
    """
    value = raw.get(key)
    if value is None and key in NULLABLE:
        return
    below = 2**31 if kind is int else 1e30
    if type(value) not in {int, kind} or not 0 < value < below:
        raise UserError(f"config.json: {key} should be a positive {kind.__name__} below "
                        f"{'2**31' if kind is int else '1e30'}, not {value!r:.40}")


@dataclass
class Stored:
    """Where a tensor is stored, and its dtype and shape, from the header of its file."""

    path: Path
    dtype: str              # as in the file: "F32", "BF16", ...
    shape: tuple


def check_files(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint by name: of one file, or of the shards that its index names."""
    index = "model.safetensors.index.json"
    if not (folder / index).exists():
        path = folder / "model.safetensors"
        if not path.exists():
            raise UserError(f"{folder} holds no model.safetensors and no {index}"
                            " (pickled .bin weights are never read)")
        if not is_inside(folder, path):
            raise UserError(f"{path} is not a plain file in this folder; copy it there")
        return read_header(path)
    names, tensors = read_json(folder, index).get("weight_map"), {}
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / index} has no weight_map")
    for shard in sorted(set(map(str, names.values()))):
        if Path(shard).name != shard or not is_inside(folder, folder / shard):
            raise UserError(f"{index} names the shard {shard!r:.80}, "
                            f"which is not a file in {folder}")
        new = read_header(folder / shard)
        twice = sorted(tensors.keys() & new.keys())
        if twice:
            raise UserError(f"{shard} holds {twice[0]!r:.80}, and so does another shard")
        tensors |= new
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors in one safetensors file. Raises UserError if the library cannot read it.

    The header is parsed here once more because the library accepts a name that occurs twice.
    """
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"its header should have {size:,} bytes; up to {MAX_HEADER:,} are "
                                 "supported")
            pairs = json.loads(f.read(size), object_pairs_hook=list)
        with safe_open(path, "pt"):                 # validates the header against the file
            pass
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}; fetch it again "
                        "(with git: `git lfs pull`)") from None
    entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    if len(entries) != len(dict(entries)):
        raise UserError(f"{path} is not a readable safetensors file: a name occurs twice in it")
    return {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries}


def check_names(folder, tensors, wanted, tied) -> None:
    """Raises UserError if a tensor is missing, or if one is stored that the model does not have."""
    ignored = r"rotary_emb\.inv_freq$"
    if tied:
        ignored += r"|^lm_head\.weight$"
    for name in tensors.keys() - wanted.keys():
        if not re.search(ignored, name):
            raise UserError(f"{folder} holds the tensor {name!r:.80}, which is not supported")
    for name in wanted:
        if name not in tensors:
            raise UserError(f"{folder} lacks the tensor {name}")


def check_shapes(tensors, wanted) -> None:
    """Raises UserError for a tensor of another shape than config.json implies, or quantized."""
    for name in wanted:
        found = tensors[name]
        if found.dtype not in DTYPES:
            raise UserError(f"{found.path.name}: {name} is stored as {found.dtype}; "
                            "quantized weights are not supported")
        if found.shape != wanted[name]:
            raise UserError(f"{found.path.name}: {name} has shape {found.shape}, "
                            f"config.json implies {wanted[name]}")


def check_tied(tensors) -> None:
    """Raises UserError if the head is tied to the embedding, but another one is stored.

    transformers uses the stored head in this case, and model.load would use the embedding.
    """
    head, embed = tensors.get(hf_name("head.weight")), tensors[hf_name("embed.weight")]
    if head is None:
        return
    same = head.dtype == embed.dtype and head.shape == embed.shape
    if same:
        with safe_open(head.path, "pt") as f, safe_open(embed.path, "pt") as g:
            same = torch.equal(f.get_tensor(hf_name("head.weight")),
                               g.get_tensor(hf_name("embed.weight")))
    if not same:
        raise UserError("config.json has tie_word_embeddings true, but the stored lm_head.weight "
                        "differs from the embedding; set it to false to use this head")


def check_numbers(llama) -> None:
    """Raises UserError for a weight that is not finite in the dtype in which it was loaded."""
    for name, p in llama.named_parameters():
        if not torch.isfinite(torch.stack(torch.aminmax(p))).all():
            raise UserError(f"{hf_name(name)} holds NaN or infinite numbers "
                            f"in {str(p.dtype)[6:]}")
