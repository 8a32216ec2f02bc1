"""torchrun: the layers of one model spread over several processes, and what they tell each other.

Every process holds the embedding, the norm and the head, and its share of the layers with their
caches. Hidden states are handed on; the last process's are given back to all. One process needs
none of this, and every function here then does nothing.
"""
import os
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

import model


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


def load(folder, dtype, device):
    """This process's share of the model in a folder; its blocks wait for those before them."""
    rank, n = place()
    config = model.read_config(folder)
    if n > config.layers:
        raise model.UserError(f"{n} processes for {config.layers} layers: each needs one; "
                              "start fewer")
    llama = model.load(folder, dtype, device, share(config.layers))
    if n > 1:
        llama.blocks = handing_on(llama.blocks, rank, n)
    return llama


def handing_on(own, rank, n):
    """Llama.blocks over all processes; `own` are those of this one."""
    def blocks(x, caches, block=model.Block.__call__):
        x = x.contiguous()
        if rank > 0:
            dist.recv(x, rank - 1)
        x = own(x, caches, block).contiguous()
        if rank < n - 1:
            dist.send(x, rank + 1)
        dist.broadcast(x, n - 1)
        return x
    return blocks


def agreed(x: torch.Tensor) -> torch.Tensor:
    """The first process's x in all: equal numbers on equal cards are no promise."""
    if place()[1] > 1:
        dist.broadcast(x, 0)
    return x
