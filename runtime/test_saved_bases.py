"""Saved bases: they give the same result, fit one model only, and are written atomically."""
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorc
import model
from runtime import commuting, saved_bases
from runtime.testing import HERE, RAW, REAL, cli, formula_weights, write_checkpoint


def open_model(folder, change=lambda weights: weights, dtype=torch.float32):
    """A small model with the formula's weights, changed; d_max is 16."""
    weights = change({k: torch.tensor(v) for k, v in formula_weights(RAW).items()})
    weights = {k: W.numpy() for k, W in weights.items()}
    return model.load(write_checkpoint(folder, RAW, weights), dtype)


@pytest.fixture
def saved(tmp_path):
    """(model, plan, bases, folder that they are saved in)."""
    llama = open_model(tmp_path / "model")
    plan, bases = lorc.compress(llama, kept=0.7)
    saved_bases.save_bases(tmp_path / "bases", llama, plan, bases)
    return llama, plan, bases, tmp_path / "bases"


def rewrite(folder, tensors=lambda tensors: None, metadata=lambda metadata: None):
    """Change the tensors and the metadata of a saved file, both dicts, in place."""
    path = folder / "bases.safetensors"
    with safe_open(path, "pt") as f:
        about = f.metadata()
    found = load_file(path)
    tensors(found)
    metadata(about)
    save_file(found, path, about)


# The same result ---------------------------------------------------------------------------------

def test_bases_are_read_as_they_were_saved(saved):
    llama, plan, bases, folder = saved
    again, found = saved_bases.load_bases(folder, llama)
    assert again == plan
    for pair, other in zip(bases, found, strict=True):
        assert (pair is None) == (other is None)
        for a, b in zip(pair or (), other or (), strict=True):
            assert torch.equal(a.down, b.down) and torch.equal(a.up, b.up)


def test_commuting_bases_are_read_as_they_were_saved(saved, tmp_path):
    llama = saved[0]
    plan, bases = lorc.compress(llama, kept=0.5, pairs=True, key_basis=commuting.key_basis,
                                schedule="uniform")
    saved_bases.save_bases(tmp_path, llama, plan, bases)
    _, found = saved_bases.load_bases(tmp_path, llama)
    for (a, _), (b, v) in zip(bases, found, strict=True):
        assert isinstance(b, commuting.CommutingBasis) and torch.equal(a.components, b.components)
        assert torch.equal(a.down, b.down) and not isinstance(v, commuting.CommutingBasis)


@pytest.mark.parametrize("plan", [["--kept", 0.7], ["--d-min", 1]])
def test_saved_bases_give_the_same_text(plan, tmp_path, capsys):
    ask = ["--model", REAL, "--prompt", "Once upon a time", "--max-new-tokens", 12, "--json"]
    _, out, err = cli(capsys, *ask, *plan, "--save", tmp_path / "b")
    first, again = json.loads(out), json.loads(cli(capsys, *ask, "--bases", tmp_path / "b")[1])
    assert f"bases that keep {first['cache']['kept']:.1%} of the numbers" in err
    assert again["text"] == first["text"]
    # Errors are computed in float32.
    assert again["plan"] == [pytest.approx(row, rel=1e-5) for row in first["plan"]]
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["bases.safetensors"]


# One model only ----------------------------------------------------------------------------------

WV = "model.layers.1.self_attn.v_proj.weight"


def fine_tune(size, name=WV, first_row=0):
    """A change of one matrix by this fraction of its norm, which leaves its first rows alone."""
    def change(weights):
        W = weights[name]
        delta = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(0))
        delta[:first_row] = 0
        return weights | {name: W + delta * (size * W.norm() / delta.norm())}
    return change


@pytest.mark.parametrize("change", [
    lambda weights: {name: 1.5 * W for name, W in weights.items()},
    fine_tune(1e-4), fine_tune(1e-2, first_row=1), fine_tune(1e-2, WV.replace("v_", "k_"), 1)])
def test_a_fine_tuned_model_is_another_model(change, saved, tmp_path):
    """Kills: comparing some numbers of the first row, or the configuration only."""
    other = open_model(tmp_path / "other", change)
    with pytest.raises(model.UserError, match="was made for another model"):
        saved_bases.load_bases(saved[3], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_fit_their_model_in_every_dtype(dtype, saved, tmp_path):
    """Rounding of the weights is no fine-tuning; a change by 2 % is."""
    llama = open_model(tmp_path / "again", dtype=dtype)
    _, found = saved_bases.load_bases(saved[3], llama)
    assert all(b.up.dtype == dtype for pair in found if pair for b in pair)
    other = open_model(tmp_path / "other", fine_tune(0.02), dtype)
    with pytest.raises(model.UserError, match="another model"):
        saved_bases.load_bases(saved[3], other)


def test_a_model_of_another_shape_is_another_model(saved, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", RAW | {"tie_word_embeddings": True})
    status, out, err = cli(capsys, "--model", other, "--prompt", "w1", "--bases", saved[3])
    assert (status, out, err.count("\n")) == (2, "", 1) and "another model" in err


def make_old(folder, llama):
    """The format before there were probes: the first 16 numbers of each matrix, and no dtype."""
    rows = [W.weight[0, :16].float() for layer in llama.layers
            for W in (layer.attn.Wk, layer.attn.Wv)]

    def change(tensors):
        del tensors["probes"]
        tensors["model"] = torch.stack(rows)
    rewrite(folder, change, lambda metadata: metadata.pop("dtype"))


def test_files_of_the_old_format_are_read(saved, tmp_path):
    llama, plan, _, folder = saved
    make_old(folder, llama)
    assert saved_bases.load_bases(folder, llama)[0] == plan
    half = open_model(tmp_path / "half", dtype=torch.bfloat16)
    assert saved_bases.load_bases(folder, half)[0] == plan
    other = open_model(tmp_path / "other", fine_tune(0.1))
    with pytest.raises(model.UserError, match="another model"):
        saved_bases.load_bases(folder, other)


# Damaged files -----------------------------------------------------------------------------------

K, V = "layers.1.k", "layers.1.v"


def replaced(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_plan(**change):
    def metadata(about):
        about["plan"] = json.dumps(json.loads(about["plan"]) | change)
    return metadata


def with_number(row, column, value):
    def change(x):
        x = x.clone()
        x[row, column] = value
        return x
    return change


KAPPAS = [[1.0, 2.0], [3.0, 4.0]]
DAMAGED = {
    "3-D up": {"tensors": replaced(f"{K}.up", lambda x: x[None])},
    "1-D down": {"tensors": replaced(f"{K}.down", lambda x: x[0])},
    "transposed": {"tensors": replaced(f"{V}.up", lambda x: x.T.contiguous())},
    "complex": {"tensors": replaced(f"{V}.up", lambda x: torch.complex(x, x))},
    "integers": {"tensors": replaced(f"{V}.up", lambda x: x.long())},
    "NaN": {"tensors": replaced(f"{K}.down", with_number(0, 0, math.nan))},
    "infinite": {"tensors": replaced(f"{K}.up", with_number(3, 0, math.inf))},
    "one number less": {"tensors": replaced(f"{K}.down", lambda x: x[1:].clone())},
    "no down": {"tensors": lambda tensors: tensors.pop(f"{K}.down")},
    "probes of another shape": {"tensors": replaced("probes", lambda x: x[:, :3].clone())},
    "log_kappa NaN": {"metadata": with_plan(log_kappa=[[1.0, math.nan], [3.0, 4.0]])},
    "log_kappa infinite": {"metadata": with_plan(log_kappa=[[math.inf, 2.0], [3.0, 4.0]])},
    "log_kappa negative": {"metadata": with_plan(log_kappa=[[1.0, 2.0], [3.0, -4.0]])},
    "log_kappa a text": {"metadata": with_plan(log_kappa=[["1", 2.0], [3.0, 4.0]])},
    "a layer more": {"metadata": with_plan(log_kappa=[*KAPPAS, [5.0, 6.0]])},
    "rank 0": {"metadata": with_plan(ranks=[[16, 16], [0, 5]])},
    "rank above d_max": {"metadata": with_plan(ranks=[[16, 17], [5, 5]])},
    "rank a float": {"metadata": with_plan(ranks=[[16, 16], [5.0, 5.0]])},
    "ranks of one layer": {"metadata": with_plan(ranks=[[16, 16]])},
    "no plan": {"metadata": lambda about: about.pop("plan")},
    "no model": {"metadata": lambda about: about.pop("model")},
    "plan not JSON": {"metadata": lambda about: about.update(plan="{")},
    "plan nested": {"metadata": lambda about: about.update(plan="[" * 100_000)},
    "long header": {"metadata": lambda about: about.update(more="x" * 2**20)},
}


def test_a_basis_of_rank_0_is_refused_even_if_all_shapes_agree(saved):
    llama, plan, _, folder = saved
    ranks = [plan.ranks[0], (0, plan.ranks[1][1])]
    rewrite(folder, lambda tensors: tensors.update({f"{K}.down": torch.zeros(0, 16),
                                                    f"{K}.up": torch.zeros(16, 0)}),
            with_plan(ranks=ranks))
    with pytest.raises(model.UserError, match="holds no bases that can be read"):
        saved_bases.load_bases(folder, llama)


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(how, saved, recwarn):
    llama, plan, _, folder = saved
    rewrite(folder, **DAMAGED[how])
    with pytest.raises(model.UserError) as raised:
        saved_bases.load_bases(folder, llama)
    message = str(raised.value)
    assert "bases.safetensors" in message and "\n" not in message and not recwarn.list
    assert "holds no bases that can be read; make some with --save" in message or \
        how == "long header" and "is not a readable safetensors file" in message


@pytest.mark.parametrize("components", [
    [0, 1, 4, 6], [0, 4, 4, 8], [-1, 1, 3, 5], [0, 1, 4, 5, 2, 6], [0.0, 1.0, 4.0, 5.0]])
def test_components_that_do_not_rotate_in_pairs_are_refused(components):
    """d is 8: 0 and 4, 1 and 5, 2 and 6, 3 and 7 belong together, first all of 0 to 3."""
    saved_bases.check_components(torch.tensor([0, 3, 4, 7]), 4, 8)
    with pytest.raises(ValueError, match="components"):
        saved_bases.check_components(torch.tensor(components), 4, 8)


# Writing -----------------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    """And a folder that can is left as it was: nothing new exists after the check."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("runtime.jobs.open_model", lambda args: pytest.fail("the model was read"))
    status, out, err = cli(capsys, "--model", REAL, "--calibrate", "--save", tmp_path / "file" / "b")
    assert (status, out, err.count("\n")) == (2, "", 1) and "give a folder" in err
    saved_bases.check_writable(tmp_path / "new" / "deep")
    saved_bases.check_writable(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(model.UserError, match="No space left"):
        saved_bases.check_writable(tmp_path / "new" / "deep")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    """A limit of 1,000 bytes a file stands for a full disk; then none can be renamed or written."""
    save = ["--model", write_checkpoint(tmp_path / "model", RAW), "--save", tmp_path / "b"]
    path = tmp_path / "b" / "bases.safetensors"
    assert cli(capsys, *save)[0] == 0
    before = path.read_bytes()
    umask = os.umask(0o027)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def assert_fails(word):
        status, out, err = cli(capsys, *save, "--d-min", 3)
        assert (status, out, err.count("\n")) == (2, "", 1) and word in err
        assert [f.name for f in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert_fails("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, "replace", refuse)
    assert_fails("Read-only file system")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert_fails("Read-only file system")


def test_the_next_save_removes_what_a_killed_save_has_left(tmp_path):
    """A process gets SIGTERM before it renames its file. One that still runs keeps its own file."""
    program = ("import os, signal\nfrom pathlib import Path\nfrom runtime import saved_bases\n"
               "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGTERM)\n"
               f"saved_bases.write_atomically(Path({str(tmp_path)!r}, 'bases.safetensors'), b'x')")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, timeout=120)
    assert done.returncode == -signal.SIGTERM and len(list(tmp_path.glob("bases.*.tmp"))) == 1
    running = tmp_path / f"bases.{os.getppid()}.tmp"
    running.write_text("")
    (tmp_path / "bases.backup.tmp").write_text("")
    saved_bases.write_atomically(tmp_path / "bases.safetensors", b"new")
    assert {f.name for f in tmp_path.iterdir()} == {"bases.safetensors", running.name,
                                                    "bases.backup.tmp"}
    assert (tmp_path / "bases.safetensors").read_bytes() == b"new"
