"""Every flag does what --help says, and the defaults are the documented ones."""
import inspect
import json
import math

import pytest
import torch

import lorc
import model
from runtime import cli as command, jobs
from runtime.commuting import CommutingBasis

from runtime.testing import RAW, cli, formula_weights, write_checkpoint

TEXT = " ".join(f"w{(3 * i * i + i // 5) % 61}" for i in range(200))
SHAPE = RAW | {"num_hidden_layers": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of four layers and 64 positions, with a text in it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("flags"), SHAPE)
    (folder / "text").write_text(TEXT)
    return folder


def run_json(capsys, folder, *words):
    status, out, err = cli(capsys, "--model", folder, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def plan(capsys, folder, *words):
    """[(d_k, d_v)] of each layer."""
    rows = run_json(capsys, folder, "--plan", *words)["plan"]
    return [(row["d_k"], row["d_v"]) for row in rows]


def arguments(*words):
    parser = command.command_line()
    return command.validate_flags(parser, parser.parse_args([str(word) for word in words]))


# What is compressed ------------------------------------------------------------------------------

def test_kept_is_the_fraction_of_all_numbers(folder, capsys):
    for kept in (0.55, 0.75, 0.9):
        ranks = plan(capsys, folder, "--kept", kept)
        assert sum(map(sum, ranks)) / (4 * 2 * 16) == pytest.approx(kept, abs=0.5 / 16)
        assert ranks[0] == (16, 16) and ranks[-1] < ranks[1] < ranks[0]


def test_d_min_is_the_rank_of_the_last_layer(folder, capsys):
    for d_min in (3, 11):
        assert plan(capsys, folder, "--d-min", d_min)[-1] == (d_min, d_min)


def test_the_uniform_schedule_gives_every_layer_the_same_rank(folder, capsys):
    assert plan(capsys, folder, "--schedule", "uniform", "--d-min", 5) == [(5, 5)] * 4
    assert plan(capsys, folder, "--schedule", "uniform", "--kept", 0.25) == [(4, 4)] * 4


def test_a_positive_split_moves_rank_from_keys_to_values(folder, capsys):
    uniform = ["--schedule", "uniform", "--d-min", 8]
    assert plan(capsys, folder, *uniform, "--split", "0.25") == [(4, 12)] * 4
    assert plan(capsys, folder, *uniform, "--split", "-1.25e-1") == [(10, 6)] * 4


def test_skip_leaves_the_first_layers_full(folder, capsys):
    ranks = plan(capsys, folder, "--schedule", "uniform", "--d-min", 8, "--skip", 3)
    assert ranks == [(16, 16)] * 3 + [(8, 8)]


def test_layers_above_the_threshold_stay_full(folder, capsys):
    """ln kappa~ falls with depth: a threshold between two layers' values leaves the upper ones."""
    rows = run_json(capsys, folder, "--plan")["plan"]
    values = [row["log_kappa_tilde"] for row in rows]
    threshold = (values[1] + values[2]) / 2
    words = ["--schedule", "uniform", "--d-min", 8, "--threshold"]
    assert plan(capsys, folder, *words, threshold) == [(16, 16)] * 2 + [(8, 8)] * 2
    assert plan(capsys, folder, *words, "-inf") == [(16, 16)] * 4
    assert plan(capsys, folder, *words, "-1e-1") == [(16, 16)] * 4
    assert plan(capsys, folder, *words, "inf") == [(8, 8)] * 4


def chosen_bases(folder, *words):
    """(the model in float64, plan, bases) as the flags choose them."""
    args = arguments("--model", folder, "--plan", "--schedule", "uniform", "--d-min", 5, *words)
    llama = model.load(folder, torch.float64)
    tokenizer = jobs.Tokenizer(folder, llama.config)
    return llama, *jobs.choose_bases(args, llama, tokenizer)


def first_inputs(llama, sinks):
    """Inputs (N, D) of layer 0's Wk for TEXT, in windows of 64 without their first `sinks`."""
    tokens = torch.tensor([int(word[1:]) for word in TEXT.split()])
    x = llama.layers[0].attn_norm(llama.embed(tokens))
    return torch.cat([window[sinks:] for window in x.split(64)])


def same_subspace(basis, W, C):
    """Whether a basis spans the top eigenvectors of W C W^T, which are computed here directly."""
    U = torch.linalg.eigh(W @ C @ W.T)[1].flip(1)[:, :basis.d_c]
    return torch.allclose(basis.up @ basis.down, U @ U.T, atol=1e-8)


@pytest.mark.parametrize("sinks", [4, 9])
@pytest.mark.parametrize("name", ["svd", "norm", "asvd", "whitened"])
def test_each_basis_has_its_own_second_moment(name, sinks, folder):
    """C = I, gamma^2, mean |x| (to the power 1) and E[x x^T], after the sinks of each window."""
    words = ["--basis", name]
    if name in ("asvd", "whitened"):
        words += ["--calibrate", folder / "text", "--sinks", sinks]
    llama, _, bases = chosen_bases(folder, *words)
    layer = llama.layers[0]
    x = first_inputs(llama, sinks)
    C = {"svd": torch.eye(32, dtype=torch.float64), "norm": (layer.attn_norm.weight**2).diag(),
         "asvd": x.abs().mean(0).diag(), "whitened": x.T @ x / len(x)}
    for W, basis in zip((layer.attn.Wk.weight, layer.attn.Wv.weight), bases[0]):
        assert [same_subspace(basis, W, C[other]) for other in C] == [o == name for o in C]


def test_the_commuting_basis_is_one_for_keys_and_whitened_for_values(folder):
    words = ["--basis", "commuting", "--split", "-0.1"]
    for more, whitened in ([], False), (["--calibrate", folder / "text"], True):
        llama, plan, bases = chosen_bases(folder, *words, *more)
        x = first_inputs(llama, 4)
        C = x.T @ x / len(x) if whitened else torch.eye(32, dtype=torch.float64)
        assert all(isinstance(K, CommutingBasis) for K, _ in bases)
        assert plan.ranks == [(K.d_c, V.d_c) for K, V in bases] == [(6, 3)] * 4      # not (7, 3)
        assert same_subspace(bases[0][1], llama.layers[0].attn.Wv.weight, C)


def test_defaults_depend_on_calibration():
    plain = arguments("--plan")
    assert (plain.cache, plain.basis, plain.schedule, plain.kept) == ("compressed", "svd",
                                                                      "progressive", 0.6)
    assert (plain.sinks, plain.window, plain.bits, plain.threshold) == (4, 32, 16, math.inf)
    assert (plain.max_new_tokens, plain.temperature, plain.top_p, plain.seed) == (128, 0, 1, 0)
    calibrated = arguments("--plan", "--calibrate")
    assert (calibrated.basis, calibrated.calibrate) == ("loss", command.BUNDLED_TEXT)
    whitened = arguments("--plan", "--calibrate", "x", "--basis", "whitened")
    assert (whitened.schedule, whitened.calibrate) == ("uniform", "x")
    assert arguments("--plan", "--calibrate", "-").calibrate == "-"


def test_the_metric_of_the_loss_is_given_what_the_flags_say(folder, capsys, monkeypatch):
    seen = []

    def compress_for_loss(llama, tokens, kept, **options):
        seen.append((tokens, kept, options))
        return lorc.compress(llama, kept=0.5, schedule="uniform")
    monkeypatch.setattr(lorc, "compress_for_loss", compress_for_loss)
    words = ["--calibrate", folder / "text", "--sinks", 3, "--window", 7, "--kept", 0.2]
    ranks = plan(capsys, folder, *words)
    (tokens, kept, options), = seen
    assert tokens.tolist() == [int(word[1:]) for word in TEXT.split()] and kept == 0.2
    assert (options["sinks"], options["window"]) == (3, 7) and ranks == [(8, 8)] * 4


def test_calibrated_bases_are_the_losss_and_come_back_from_their_file(folder, capsys, tmp_path):
    """Kept to within one number, ranks that differ between layers, and the same text again."""
    words = ["--prompt", "w1 w2 w3", "--cache", "bibranch", "--sinks", 1, "--window", 2]
    made = run_json(capsys, folder, *words, "--calibrate", folder / "text", "--kept", 0.4,
                    "--save", tmp_path / "b")
    used = run_json(capsys, folder, *words, "--bases", tmp_path / "b")
    assert used["plan"] == [pytest.approx(row) for row in made["plan"]]
    assert (used["text"], used["divergence"]) == (made["text"], pytest.approx(made["divergence"]))
    assert made["cache"]["kept"] == pytest.approx(0.4, abs=1 / 128)
    assert len({(row["d_k"], row["d_v"]) for row in made["plan"]}) > 1


@pytest.mark.parametrize("function, windows", [
    (lorc.fisher_factors, command.LOSS_WINDOWS), (lorc.calibrated_moments, command.MOMENT_WINDOWS)])
def test_the_command_line_reads_as_much_text_as_the_functions_do(function, windows):
    parameters = inspect.signature(function).parameters
    assert parameters["windows"].default == windows
    assert parameters["context"].default == command.CALIBRATION_CONTEXT


@pytest.mark.parametrize("basis", ["loss", "whitened"])
def test_calibrating_a_model_that_overflows_ends_with_one_line(basis, tmp_path, capsys):
    weights = {name: x * 300 for name, x in formula_weights(SHAPE).items()}
    folder = write_checkpoint(tmp_path, SHAPE, weights)
    (folder / "text").write_text(TEXT)
    status, out, err = cli(capsys, "--model", folder, "--plan", "--dtype", "float16",
                           "--calibrate", folder / "text", "--basis", basis)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the model overflows in float16" in err


@pytest.mark.parametrize("raises", [True, False])
def test_gradients_that_overflow_end_with_one_line(raises, folder, capsys, monkeypatch):
    """NaN among the factors: eigh raises for it on a CPU, and need not do so on every device."""
    def nan_factors(G):
        return torch.full((2, 16, 16), torch.nan, dtype=torch.float64)

    def nan_bases(llama, *args, **options):
        plan, bases = lorc.compress(llama)
        bases[2][1].up[0, 0] = torch.nan
        return plan, bases
    if raises:
        monkeypatch.setattr(lorc, "kronecker_factors", nan_factors)
    else:
        monkeypatch.setattr(lorc, "compress_for_loss", nan_bases)
    status, out, err = cli(capsys, "--model", folder, "--plan", "--calibrate", folder / "text")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the gradients of the loss overflow or vanish in float32" in err


def test_calibration_needs_tokens_beyond_the_exact_ones_of_each_window(folder, tmp_path, capsys):
    """16 of them, the width of the keys: a window of 64 less its exact tokens."""
    short = tmp_path / "short"
    short.write_text(" ".join(TEXT.split()[:60]))
    for basis, sinks, n in ("whitened", 44, 16), ("whitened", 45, 15), ("loss", 12, 16), (
            "loss", 13, 15):
        status, out, err = cli(capsys, "--model", folder, "--plan", "--calibrate", short,
                               "--basis", basis, "--sinks", sinks)
        assert status == (0 if n >= 16 else 2), err
        assert n >= 16 or f"gives {n} tokens" in err


def test_a_basis_of_the_loss_is_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(jobs.distributed, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(model.UserError, match="--save DIR.*--bases DIR"):
        jobs.check_processes(arguments("--plan", "--calibrate"))
    with pytest.raises(model.UserError, match="--compile works in one process"):
        jobs.check_processes(arguments("--prompt", "a", "--compile"))
    jobs.check_processes(arguments("--plan", "--calibrate", "--basis", "whitened"))


# The cache ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("new", [2, 30])
def test_bytes_of_the_bibranch_cache_follow_sinks_window_and_bits(bits, new, folder, capsys):
    """float32: sinks and window exactly, and the tokens between as d_k + d_v numbers, of 16 bits in
    groups of 8 tokens; or of 4 bits with minimum and scale per 32 tokens, up to 32 unrounded."""
    sinks, window, d_k, d_v = 3, 7, 6, 10
    got = run_json(capsys, folder, "--prompt", "w9 " * 34, "--max-new-tokens", new, "--cache",
                   "bibranch", "--sinks", sinks, "--window", window, "--bits", bits,
                   "--d-min", 8, "--split", 0.125, "--schedule", "uniform")
    between = 34 + new - 1 - sinks - window
    groups = between // 32
    late = 4 * -(-between // 8) * 8 if bits == 16 else 16 * groups + 8 * groups + 4 * 32
    if bits == 4 and between < 32:
        late = 4 * between
    exact = 4 * 2 * (sinks + window) * 16
    assert got["cache"]["bytes"] == 4 * (exact + late * (d_k + d_v))
    assert got["cache"]["full_bytes"] == 4 * 4 * 2 * (34 + new - 1) * 16


def test_cache_full_keeps_everything(folder, capsys):
    got = run_json(capsys, folder, "--prompt", "w1", "--max-new-tokens", 4, "--cache", "full")
    assert got["cache"]["bytes"] == got["cache"]["full_bytes"] == 4 * 4 * 2 * 4 * 16
    assert got["cache"]["stored_bytes"] == got["cache"]["bytes"]         # stored in float32 too
    assert got["cache"]["kept"] == 1 and got["plan"] == []


# Generation and scoring --------------------------------------------------------------------------

def next_logits(folder, text):
    llama = model.load(folder, torch.float32)
    tokens = torch.tensor([[int(word[1:]) for word in text.split()]])
    return llama(tokens, lorc.new_caches(llama, "full", tokens.shape[1]))[0, -1].double()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.4),
                                                (2.0, 0.7)])
def test_the_distribution_that_is_sampled_is_that_of_temperature_and_top_p(
        temperature, top_p, folder, capsys, monkeypatch):
    """p_i^(1/t), normalised; then the fewest largest ones whose sum reaches top_p, normalised."""
    seen = []

    def multinomial(p, n, generator=None):
        seen.append(p)
        return torch.zeros(len(p), 1, dtype=torch.long)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    run_json(capsys, folder, "--prompt", "w3 w8 w4", "--cache", "full", "--max-new-tokens", 1,
             "--temperature", temperature, "--top-p", top_p)
    p = next_logits(folder, "w3 w8 w4").softmax(-1) ** (1 / temperature)
    p = sorted((p / p.sum()).tolist(), reverse=True)
    n = next(i for i in range(1, 62) if sum(p[:i]) >= top_p - 1e-9)
    want = torch.tensor(p[:n] + [0.0] * (61 - n), dtype=torch.float64)
    got = (seen[0][0] / seen[0][0].sum()).sort(descending=True).values
    assert torch.allclose(got, want / want.sum(), atol=1e-6)
    assert n < 61 or top_p == 1


def test_the_seed_chooses_the_sample(folder, capsys):
    def text(*words):
        return run_json(capsys, folder, "--prompt", "w1", "--cache", "full", *words)["text"]
    warm = ["--temperature", 1.5, "--max-new-tokens", 20]
    assert text(*warm) == text(*warm, "--seed", 0) != text(*warm, "--seed", 1)
    assert text(*warm, "--top-p", 1e-6) == text("--max-new-tokens", 20)      # only the likeliest


def test_max_tokens_and_context_cut_the_text_that_is_scored(folder, capsys):
    words = ["--perplexity", folder / "text", "--cache", "full"]
    assert run_json(capsys, folder, *words)["tokens"] == 200 - 4         # windows of 64
    assert run_json(capsys, folder, *words, "--context", 20)["tokens"] == 200 - 10
    got = run_json(capsys, folder, *words, "--context", 20, "--max-tokens", 50)
    assert got["tokens"] == 50 - 3
    assert got["cache"]["full_bytes"] == 4 * 4 * 2 * 20 * 16             # that of one window


@pytest.mark.parametrize("name, digits", [("float32", 6), ("bfloat16", 2), ("float16", 3)])
def test_dtype_is_that_of_the_computation(name, digits, folder, capsys):
    words = ["--perplexity", folder / "text", "--cache", "full"]
    got = run_json(capsys, folder, *words, "--dtype", name)
    want = run_json(capsys, folder, *words)
    assert got["cache"]["dtype"] == name and got["cache"]["stored_dtype"] == "float32"
    assert got["perplexity"] == pytest.approx(want["perplexity"], rel=10**-digits)
