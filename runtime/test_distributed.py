"""Several processes give bit for bit what one process gives. Started with torchrun, on the CPU."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorc
import model
from runtime import cli as command, distributed, jobs
from runtime.testing import HERE, RAW, write_checkpoint

CACHES = {"full": ("full", {}), "compressed": ("compressed", {}), "bibranch": ("bibranch", {}),
          "4 bits": ("bibranch", {"bits": 4})}


def logits_step_by_step(kind, **options):
    """Logits of tiny/ for a prompt of 80 tokens and for 9 more, one by one."""
    llama = distributed.load(HERE / "tiny", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(llama.config.vocab, (2, 89), generator=generator)
    kappas = distributed.gather(lorc.log_kappas(llama))
    plan = lorc.make_plan(kappas, llama.config.kv_width, kept=0.6)
    own = distributed.local_layers(llama.config.layers)
    caches = lorc.new_caches(llama, kind, 89, lorc.make_bases(llama, plan.ranks[own]), B=2,
                             **options)
    hidden = [llama.hidden(new, caches) for new in tokens.split([80] + 9 * [1], 1)]
    return llama.head(torch.cat(hidden, 1))


def run_everything(folder):
    """Run commands that print JSON and save bases to `folder`. Returns the logits by cache."""
    ask, text = ["--prompt", "Once upon a time", "--max-new-tokens", "9"], str(HERE / "LICENSE")
    for words in ([*ask, "--compare", "--temperature", "1", "--window", "3", "--bits", "4"],
                  [*ask, "--calibrate", text, "--basis", "whitened", "--skip", "1",
                   "--save", str(folder)],
                  [*ask, "--bases", str(folder)],
                  ["--perplexity", text, "--max-tokens", "300", "--context", "200",
                   "--cache", "bibranch"],
                  ["--plan"]):
        parser = command.command_line()
        jobs.run(command.validate_flags(parser, parser.parse_args([*words, "--json"])))
    return {name: logits_step_by_step(kind, **options)
            for name, (kind, options) in CACHES.items()}


def one_of_two(folder):
    """What torchrun starts: everything above, then a command that fails in both processes."""
    real = jobs.run

    def run(args):
        jobs.run = real
        logits = run_everything(folder)
        if distributed.rank_and_world_size()[0] == 0:
            torch.save(logits, Path(folder) / "logits")
        return real(args)
    jobs.run = run
    return command.main(["--prompt", "Once", "--kept", "0.05"])


def read_lines(out):
    """The JSON objects in an output, without the times and the command to try next."""
    def keep(found):
        return {name: x for name, x in found.items() if name not in ("seconds", "next")}
    return [json.loads(line, object_hook=keep) for line in out.splitlines()]


def test_two_processes_give_bit_for_bit_what_one_gives(tmp_path, capsys):
    """Logits of every cache; texts, plans, errors, bytes, perplexity and saved bases; one message.

    Kills: layers that start one late, errors or bytes of one process only, printing in both.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    program = (f"import sys\nsys.path.append({str(HERE)!r})\nfrom runtime import test_distributed\n"
               f"sys.exit(test_distributed.one_of_two({str(two)!r}))")
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", "--no-python", sys.executable, "-c", program],
                          cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as started:
        want = run_everything(one)
        out, err = started.communicate(timeout=300)
    expected = read_lines(capsys.readouterr().out)
    assert len(expected) == 5 and read_lines(out) == expected, err
    got = torch.load(two / "logits")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    a, b = (load_file(folder / "bases.safetensors") for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
    assert err.count("lorc: ") == 1 and "lorc: kept 0.05 cannot" in err and started.returncode == 1


@pytest.mark.parametrize("layers, world_size", [(5, 3), (7, 2), (8, 8), (30, 4), (1, 1)])
def test_layers_that_do_not_divide_are_shared_in_order(layers, world_size, monkeypatch):
    """Every layer is in one share, in order, and sizes of shares differ by at most one.

    Kills: layers // world_size for each process, which leaves the last layers out.
    """
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (rank, world_size))
        shares.append(list(range(layers))[distributed.local_layers(layers)])
    assert [layer for share in shares for layer in share] == list(range(layers))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_more_processes_than_layers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 3))
    with pytest.raises(model.UserError, match="3 processes for a model of 2 layers"):
        distributed.load(write_checkpoint(tmp_path, RAW), None, "cpu")


def test_one_process_communicates_nothing():
    assert distributed.rank_and_world_size() == (0, 1)
    assert distributed.gather([1, 2]) == [1, 2] and distributed.run_on_rank_0(lambda: "x") == "x"
    x = torch.ones(2)
    assert distributed.broadcast(x) is x
