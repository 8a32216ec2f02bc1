"""One model over several processes, started by torchrun: each process computes some of the layers.

Every process holds the embedding, the norm and the head, and its own layers with their caches.
Hidden states pass from process to process, and the last one broadcasts its result. In a single
process, without torchrun, the functions here communicate nothing.
"""
import os
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

import model


@contextmanager
def process_group():
    """Join the other processes if torchrun started this one. Only rank 0 prints.

    The first process that fails raises its error. Those that fail after it, usually because of it,
    exit silently with status 2.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The default backends are NCCL for tensors on GPUs and gloo for those on CPUs.
    dist.init_process_group(store=store, rank=rank, world_size=world_size)
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null if rank else sys.stdout), \
                redirect_stderr(null if rank else sys.stderr):
            yield
    except Exception:
        if store.add("failed", 1) == 1:
            raise
        time.sleep(1)      # torchrun ends all processes after the first exit: let that be the cause
        raise SystemExit(2) from None
    dist.destroy_process_group()


def rank_and_world_size():
    """The number of this process and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_layers(layers: int) -> slice:
    """Which of the model's layers this process computes. Shares differ by at most one layer."""
    rank, world_size = rank_and_world_size()
    return slice(layers * rank // world_size, layers * (rank + 1) // world_size)


def gather(own: list) -> list:
    """The lists of all processes joined in the order of ranks, for example one item per layer."""
    rank, world_size = rank_and_world_size()
    lists = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(lists, own)
    return [item for one in lists for item in one]


def run_on_rank_0(function):
    """Call function() on rank 0 only and return its result on every rank."""
    rank, _ = rank_and_world_size()
    return gather([function()] if rank == 0 else [])[0]


def broadcast(x: torch.Tensor) -> torch.Tensor:
    """Replace x by rank 0's. Equal inputs do not guarantee equal results on different devices."""
    if rank_and_world_size()[1] > 1:
        dist.broadcast(x, 0)
    return x


def load(folder, dtype, device):
    """The model in a folder, with this process's layers only, connected to the other processes."""
    rank, world_size = rank_and_world_size()
    config = model.read_config(folder)
    if world_size > config.layers:
        raise model.UserError(f"{world_size} processes for a model of {config.layers} layers: "
                              f"start at most {config.layers}")
    llama = model.load(folder, dtype, device, local_layers(config.layers))
    if world_size > 1:
        llama.blocks = pipeline(llama.blocks, rank, world_size)
    return llama


def pipeline(own_blocks, rank, world_size):
    """Llama.blocks over the layers of all processes; `own_blocks` runs those of this process."""
    def blocks(x, caches, block=model.Block.__call__):
        x = x.contiguous()
        if rank > 0:
            dist.recv(x, rank - 1)
        x = own_blocks(x, caches, block).contiguous()
        if rank < world_size - 1:
            dist.send(x, rank + 1)
        dist.broadcast(x, world_size - 1)
        return x
    return blocks
