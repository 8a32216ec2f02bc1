"""Bases in a file: what --save writes and --bases reads, for the model that they were computed for.
"""
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from cache import Basis
from lorc import Plan, log_kappa_tilde
from model import UserError
from runtime import distributed
from runtime.checkpoint import read_header
from runtime.commuting import CommutingBasis

PROBES = 16
CLOSE, ROUNDED = 1e-6, 2**-8         # largest difference of probes: in one dtype, in another dtype


def probe(W):
    """A fingerprint (17,) of W (m, n): 16 sums of all its numbers with fixed weights, and its norm.

    If W changes by a fraction e of its norm, so does each sum, approximately. Rounding to bfloat16
    changes it by less than 0.002 of the norm.
    """
    W = W.detach().double()
    j = torch.arange(1, PROBES + 1, dtype=torch.float64, device=W.device)
    left, right = (2**0.5 * torch.cos(torch.outer(torch.arange(n, device=W.device) ** 2, j))
                   for n in W.shape)                                     # (m, 16), (n, 16)
    sums = (W @ right * left).sum(0)
    return torch.cat((sums, W.norm()[None])).cpu()


def projections(llama):
    """Wk and Wv of every layer of this process."""
    return [W.weight for layer in llama.layers for W in (layer.attn.Wk, layer.attn.Wv)]


def belongs_to(llama, metadata, tensors) -> bool:
    """Whether saved bases were computed for this model: same configuration, same Wk and Wv.

    The dtype may differ from that of the model at the time. Files without probes hold the first 16
    numbers of each matrix instead.
    """
    if metadata["model"] != repr(llama.config):
        return False
    if "probes" not in tensors:
        numbers = distributed.gather([W[0, :16].float().cpu() for W in projections(llama)])
        return torch.allclose(tensors["model"], torch.stack(numbers), 0.01, 1e-4)
    probes = torch.stack(distributed.gather([probe(W) for W in projections(llama)]))
    norms = probes[:, -1].clamp(min=1e-300)
    difference = (probes - tensors["probes"]).square().mean(1).sqrt() / norms
    return bool(difference.max() < (CLOSE if metadata["dtype"] == dtype_name(llama) else ROUNDED))


def dtype_name(llama) -> str:
    return str(llama.norm.weight.dtype)[6:]


def save_bases(folder, llama, plan, bases):
    """Write bases and plan to folder/bases.safetensors atomically. Raises UserError.

    bases: those of this process's layers, None for a layer that stays full; plan: of all layers.
    """
    tensors = {"probes": torch.stack(distributed.gather([probe(W) for W in projections(llama)]))}
    on_cpu = [pair and [basis_tensors(b) for b in pair] for pair in bases]
    for i, pair in enumerate(distributed.gather(on_cpu)):
        for kind, parts in zip("kv", pair or ()):
            tensors |= {f"layers.{i}.{kind}.{name}": x for name, x in parts.items()}
    metadata = {"model": repr(llama.config), "dtype": dtype_name(llama),
                "plan": json.dumps({"log_kappa": plan.log_kappa, "ranks": plan.ranks})}
    if distributed.rank_and_world_size()[0] == 0:
        write_atomically(Path(folder) / "bases.safetensors", save(tensors, metadata))


def check_writable(folder):
    """Raise UserError if bases cannot be written to this folder. Nothing is left behind."""
    path = Path(folder) / "bases.probe"
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        write_atomically(path, b"")
    finally:
        for remove in (path.unlink, *(parent.rmdir for parent in created)):
            with suppress(OSError):                             # of what was not made
                remove()


def write_atomically(path: Path, data: bytes):
    """Write a file so that its old content stays if anything fails. Raises UserError.

    What a save that was killed has left behind is removed.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.stem}.*.tmp"):
            process = old.suffixes[0][1:]
            if process.isdecimal() and not is_running(int(process)):
                old.unlink()
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"--save {path.parent}: {e.strerror or e}; give a folder that can be "
                        "written to") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_running(process: int) -> bool:
    """Whether there is a process with this number."""
    try:
        os.kill(process, 0)                          # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                          # there is, and it belongs to someone else
        return True
    return True


def basis_tensors(basis) -> dict[str, torch.Tensor]:
    """The tensors of a basis by their names in the file, contiguous and on the CPU."""
    tensors = {"down": basis.down, "up": basis.up}
    if isinstance(basis, CommutingBasis):
        tensors["turns"] = basis.components
    return {name: x.cpu().clone(memory_format=torch.contiguous_format)
            for name, x in tensors.items()}


def load_bases(folder, llama):
    """(plan, bases of this process's layers) from folder/bases.safetensors.

    Raises UserError if the file is damaged or was written for another model.
    """
    path = Path(folder) / "bases.safetensors"
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file; give the folder that holds {path.name}")
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name}; give the folder that --save wrote")
    try:
        read_header(path)
        with safe_open(path, "pt") as f:
            metadata, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
        if not belongs_to(llama, metadata, tensors):
            raise UserError(f"{path} was made for another model; make new ones with --save")
        plan = read_plan(json.loads(metadata["plan"]), llama.config)
        own = distributed.local_layers(llama.config.layers)
        bases = [read_pair(tensors, i, ranks, llama)
                 for i, ranks in list(enumerate(plan.ranks))[own]]
    except UserError:
        raise
    except Exception:                               # anything at all can be wrong with a file
        raise UserError(f"{path} holds no bases that can be read; make some with --save") from None
    return plan, bases


def read_plan(saved, config) -> Plan:
    """The plan that was saved, if its numbers are valid for this model. Raises ValueError."""
    log_kappa = [(k, v) for k, v in saved["log_kappa"]]
    ranks = [(d_k, d_v) for d_k, d_v in saved["ranks"]]
    if not len(log_kappa) == len(ranks) == config.layers:
        raise ValueError("another number of layers")
    if not all(type(x) is float and 0 <= x < 1e9 for pair in log_kappa for x in pair):
        raise ValueError("ln kappa is not a number of at least 0")
    if not all(type(d) is int and 1 <= d <= config.kv_width for pair in ranks for d in pair):
        raise ValueError("ranks are not between 1 and d_max")
    return Plan(log_kappa, log_kappa_tilde(log_kappa), ranks, config.kv_width)


def read_pair(tensors, layer, ranks, llama):
    """(K, V) of one layer, or None if it stays full. Raises ValueError, KeyError."""
    config = llama.config
    if ranks == (config.kv_width, config.kv_width):
        return None
    return tuple(read_basis(tensors, f"layers.{layer}.{kind}", d_c, llama)
                 for kind, d_c in zip("kv", ranks))


def read_basis(tensors, name, d_c, llama) -> Basis:
    """One basis of rank d_c in the model's dtype. Raises ValueError or KeyError if invalid."""
    config, like = llama.config, llama.norm.weight
    down, up = tensors[f"{name}.down"], tensors[f"{name}.up"]
    components = tensors.get(f"{name}.turns")
    for x, shape in ((down, (d_c, config.kv_width)), (up, (config.kv_width, d_c))):
        if tuple(x.shape) != shape or not x.is_floating_point():
            raise ValueError(f"{name} should have shape {shape} and a floating-point dtype")
    down, up = down.to(like), up.to(like)
    if not (down @ up).isfinite().all():
        raise ValueError(f"{name} is not finite")
    if components is None:
        return Basis(down, up)
    check_components(components, d_c, config.head_dim)
    return CommutingBasis(down, up, components.to(like.device))


def check_components(components, d_c, head_dim):
    """Raises ValueError unless both numbers of a pair (i, i + d_c/2) follow one pair of a head."""
    first, half = components[:d_c // 2], head_dim // 2
    if components.dtype != torch.int64 or not ((first >= 0) & (first < half)).all():
        raise ValueError("components are not numbers below d/2")
    if not torch.equal(components, torch.cat((first, first + half))):
        raise ValueError("components do not come in pairs")
