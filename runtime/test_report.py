"""The report: what is measured, what is printed, and the command that is suggested next."""
import itertools
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch

import lorc
import model
from runtime import advice, cli as command, jobs, report, scoring
from runtime.testing import RAW, cli, small_model, write_checkpoint
from runtime.text import Tokenizer

TEXT = " ".join(f"w{7 * i * i % 61}" for i in range(1, 50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 64 positions, and in it two texts."""
    folder = write_checkpoint(tmp_path_factory.mktemp("report"), RAW, dtype=torch.bfloat16)
    (folder / "text").write_text(TEXT)
    (folder / "other").write_text(TEXT[::-1].replace("w", "") + TEXT)
    return folder


def arguments(*words):
    parser = command.command_line()
    return command.validate_flags(parser, parser.parse_args([str(word) for word in words]))


def run_json(capsys, *words):
    status, out, err = cli(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


# Bytes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ["--cache", "full"], ["--cache", "compressed"], ["--cache", "bibranch", "--bits", 4],
    ["--cache", "bibranch", "--sinks", 3, "--window", 5]])
def test_bytes_are_those_of_caches_in_the_precision_of_the_stored_weights(flags, folder, capsys):
    """Against caches of a model loaded in that precision; 4-bit codes are the same in any."""
    words = ["--model", folder, "--prompt", TEXT, "--max-new-tokens", 5, "--d-min", 8]
    words = [word for word in words if "full" not in flags or word not in ("--d-min", 8)] + flags
    found = run_json(capsys, *words)["cache"]
    llama, args = model.load(folder), arguments(*words)
    setup = jobs.Setup(args, llama, None, torch.bfloat16, None, [None, None])
    if "full" not in flags:
        setup.bases = lorc.compress(llama, d_min=8)[1]
    capacity = len(TEXT.split()) + 4
    caches = setup.new_caches(args.cache, capacity)
    assert (found["stored_dtype"], found["dtype"]) == ("bfloat16", "float32")
    assert found["stored_bytes"] == sum(cache.nbytes for cache in caches) < found["bytes"]
    assert found["stored_full_bytes"] == lorc.full_cache_bytes(llama, capacity)


def test_the_table_gives_bytes_and_fraction_in_the_stored_precision(folder, capsys):
    words = ["--model", folder, "--prompt", TEXT, "--cache", "bibranch", "--bits", 4, "--window", 4,
             *PLAN]
    found = run_json(capsys, *words)["cache"]
    status, _, err = cli(capsys, *words)
    rows = {line.split()[0]: line.split() for line in err.splitlines() if line.strip()}
    assert status == 0 and "bytes in bfloat16" in err
    assert rows["full"][1:3] == [f"{found['stored_full_bytes']:,}", "100.0%"]
    fraction = found["stored_bytes"] / found["stored_full_bytes"]
    assert rows["bibranch"][1:3] == [f"{found['stored_bytes']:,}", f"{fraction:.1%}"]
    assert fraction != pytest.approx(found["bytes"] / found["full_bytes"], rel=0.01)


# Divergence and perplexity -----------------------------------------------------------------------

def log_probabilities(llama, tokens, kind, bases, **options):
    """(T, V) in float64, the tokens fed one by one to a cache that is not told about the others."""
    caches = lorc.new_caches(llama, kind, len(tokens), bases, **options)
    return torch.cat([llama(token[None], caches)[0] for token in tokens.split(1)]).log_softmax(-1)


def expected(folder, tokens, kind, d_min=5, **options):
    """(KL from the full cache, negative log-likelihood) in nats, summed over predicted tokens."""
    llama = model.load(folder, torch.float64)
    bases = lorc.compress(llama, d_min=d_min, schedule="uniform")[1]
    p = log_probabilities(llama, tokens, "full", None)[:-1]
    q = log_probabilities(llama, tokens, kind, bases, **options)[:-1]
    nats = -q.gather(1, tokens[1:, None]).sum()
    return (p.exp() * (p - q)).sum().item(), nats.item()


PLAN = ["--d-min", 5, "--schedule", "uniform"]
KINDS = [("compressed", [], {}),
         ("bibranch", ["--sinks", 2, "--window", 3], {"sinks": 2, "window": 3}),
         ("bibranch", ["--sinks", 1, "--window", 2, "--bits", 4],
          {"sinks": 1, "window": 2, "bits": 4})]


@pytest.mark.parametrize("kind, flags, options", KINDS)
def test_perplexity_and_divergence_are_those_of_decoding_token_by_token(
        kind, flags, options, folder, capsys):
    """The mean of sum p (ln p - ln q) over the predicted tokens, in windows of 40 and 9 tokens."""
    got = run_json(capsys, "--model", folder, "--perplexity", folder / "text", "--context", 40,
                   "--cache", kind, *flags, *PLAN)
    tokens = torch.tensor([int(word[1:]) for word in TEXT.split()])
    sums = [expected(folder, window, kind, **options) for window in tokens.split(40)]
    divergence, nats = (sum(x) / (len(tokens) - 2) for x in zip(*sums))
    full = sum(expected(folder, window, "full")[1] for window in tokens.split(40))
    assert got["tokens"] == got["divergence_tokens"] == len(tokens) - 2
    exact = options["sinks"] + options["window"] if options else 0
    assert got["exact"] == 2 * exact / len(tokens)
    assert got["divergence"] == pytest.approx(divergence, rel=1e-3) and divergence > 0.01
    assert got["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert got["full_perplexity"] == pytest.approx(math.exp(full / (len(tokens) - 2)), rel=1e-4)


@pytest.mark.parametrize("kind, flags, options", KINDS)
@pytest.mark.parametrize("limit", [1024, 12])
def test_the_divergence_of_generated_text_is_that_of_decoding_it(
        kind, flags, options, limit, folder, capsys, monkeypatch):
    """Prompt and generated text are fed to both caches; at most the first `limit` tokens."""
    monkeypatch.setattr(jobs, "DIVERGENCE_TOKENS", limit)
    words = ["--model", folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 20, *flags, *PLAN]
    got = run_json(capsys, *words, "--cache", kind)
    text = torch.tensor([int(word[1:]) for word in f"w5 w6 w7 {got['text']}".split()])[:limit]
    want = expected(folder, text, kind, **options)[0] / (len(text) - 1)
    assert got["divergence_tokens"] == len(text) - 1 == min(limit, 23) - 1
    assert got["divergence"] == pytest.approx(want, rel=1e-3) and want > 0.01


def test_compare_measures_every_cache_on_the_text_of_the_full_one(folder, capsys):
    got = run_json(capsys, "--model", folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 20,
                   "--compare", "--sinks", 2, "--window", 3, *PLAN)["compare"]
    text = torch.tensor([int(w[1:]) for w in f"w5 w6 w7 {got[0]['text']}".split()])
    for found, (kind, _, options) in zip(got[1:], KINDS):
        want = expected(folder, text, kind, **options)[0] / (len(text) - 1)
        assert found["divergence"] == pytest.approx(want, rel=1e-3)
    assert got[0]["divergence"] == 0


def test_the_divergence_of_several_prompts_is_the_mean_over_all_their_tokens(folder, capsys):
    words = ["--model", folder, "--max-new-tokens", 4, "--cache", "compressed", *PLAN]
    prompts = ["w5 w6 w7 w8 w9 w10", "w50"]
    one = [run_json(capsys, *words, "--prompt", prompt) for prompt in prompts]
    both = run_json(capsys, *words, "--prompt", prompts[0], "--prompt", prompts[1])
    assert both["divergence_tokens"] == 9 + 4
    assert both["divergence"] == pytest.approx((9 * one[0]["divergence"]
                                                + 4 * one[1]["divergence"]) / 13)


def test_perplexity_prints_the_full_caches_beside_the_chosen_one(folder, capsys):
    words = ["--model", folder, "--perplexity", folder / "text", *PLAN]
    got = run_json(capsys, *words)
    status, out, err = cli(capsys, *words)
    change = got["perplexity"] / got["full_perplexity"] - 1
    assert status == 0 and out == (f"perplexity {got['perplexity']:.4f}; full cache "
                                   f"{got['full_perplexity']:.4f} ({change:+.2%})\n")
    rows = {line.split()[0]: line.split() for line in err.splitlines() if line.strip()}
    assert rows["full"][3:5] == ["0", f"{got['full_perplexity']:.4f}"]
    assert rows["compressed"][3:5] == [f"{got['divergence']:.4f}", f"{got['perplexity']:.4f}"]
    status, out, err = cli(capsys, "--model", folder, "--perplexity", folder / "text",
                           "--cache", "full")
    assert status == 0 and out == f"perplexity {got['full_perplexity']:.4f}\n"


def test_a_text_at_the_end_of_the_context_is_measured_within_it(folder, capsys):
    """A prompt of 64 tokens, the model's context, and one more: only the first 64 can be fed."""
    prompt = " ".join(["w3"] * 64)
    got = run_json(capsys, "--model", folder, "--prompt", prompt, *PLAN)
    assert (got["tokens"], got["status"], got["divergence_tokens"]) == (1, "context", 63)


def test_scoring_asks_for_few_logits_at_a_time(folder, monkeypatch):
    """No more than CHUNK rows of the vocabulary's width exist at once, however long the window."""
    llama = model.load(folder, torch.float32)
    rows, head = [], llama.head.forward
    monkeypatch.setattr(llama.head, "forward", lambda h: rows.append(len(h)) or head(h))
    monkeypatch.setattr(scoring, "CHUNK", 7)
    scores = scoring.score_text(llama, torch.arange(40), 30, ["full"],
                                lambda kind, n: lorc.new_caches(llama, kind, n), {})
    assert max(rows) == 7 and sum(rows) == scores["full"].count == 38


def test_every_token_of_a_long_window_is_scored(tmp_path):
    """300 tokens in one window: the sum of -ln p over the last 299."""
    raw = RAW | {"max_position_embeddings": 300}
    llama = model.load(write_checkpoint(tmp_path, raw), torch.float64)
    x = torch.randint(61, (300,), generator=torch.Generator().manual_seed(0))

    def full(T):
        return lorc.new_caches(llama, "full", T)
    nats, count = scoring.negative_log_likelihood(llama, x, 300, full)
    p = llama(x[None], full(300))[0, :-1].softmax(-1)
    assert count == 299
    assert nats == pytest.approx(-p.gather(1, x[1:, None]).log().sum().item(), rel=1e-6)


# Errors of keys and values -----------------------------------------------------------------------

def test_errors_are_those_of_keys_and_of_values_over_all_calls():
    """||v - U U^T v|| / ||v|| over two calls, with the values' own basis. Layer 0 sees no cache."""
    llama = small_model()
    bases = lorc.compress(llama, d_min=4, schedule="uniform")[1]
    texts = torch.tensor([range(3, 12)]), torch.tensor([range(30, 51)])
    meter = scoring.ErrorMeter(llama, bases)
    with meter.observe():
        for x in texts:
            llama.hidden(x, lorc.new_caches(llama, "full", x.shape[1]))
    layer = llama.layers[0]
    x = torch.cat([layer.attn_norm(llama.embed(x))[0] for x in texts])
    for got, W, basis in zip(meter.errors()[0], (layer.attn.Wk, layer.attn.Wv), bases[0]):
        y = W(x)
        want = (y - y @ basis.up @ basis.up.T).norm() / y.norm()
        assert got == pytest.approx(want.item(), rel=1e-9)


def test_the_table_shows_the_largest_error_of_all_prompts(folder, capsys):
    words = ["--model", folder, "--max-new-tokens", 1, *PLAN]
    prompts = ["w5 w6 w7", "w50 w51", "w9"]
    each = [run_json(capsys, *words, "--prompt", prompt)["plan"] for prompt in prompts]
    every = [word for prompt in prompts for word in ("--prompt", prompt)]
    for row, *rows in zip(run_json(capsys, *words, *every)["plan"], *each):
        for name in ("error_k", "error_v"):
            assert row[name] == pytest.approx(max(r[name] for r in rows))
            assert row[name] > min(r[name] for r in rows)


def test_the_table_of_layers_is_printed_by_plan_and_verbose_only(folder, capsys):
    words = ["--model", folder, "--prompt", "w1 w2", "--max-new-tokens", 2, *PLAN]
    assert "ln kappa" not in "".join(cli(capsys, *words)[1:])
    status, out, err = cli(capsys, *words, "--verbose")
    assert status == 0 and "ln kappa" not in out and "|k-k~|/|k|" in err
    assert err.count("\n    0  ") == err.count("\n    1  ") == 1
    out = cli(capsys, "--model", folder, "--plan")[1]
    assert "ln kappa(Wk)" in out and "|k-k~|/|k|" not in out


# What else the report says -----------------------------------------------------------------------

@pytest.mark.parametrize("flags, note", [
    (["--sinks", 4, "--window", 46], "compressed nothing on this text"),
    (["--sinks", 10, "--window", 20], "60% of the bi-branch cache's tokens were exact"),
    (["--sinks", 4, "--window", 21], None)])
def test_the_report_says_when_most_tokens_were_exact(flags, note, folder, capsys):
    """Of 49 + 2 - 1 = 50 tokens in the cache."""
    words = ["--model", folder, "--prompt", TEXT, "--max-new-tokens", 2, "--cache", "bibranch"]
    err = cli(capsys, *words, *flags)[2]
    assert note in err if note else "exact" not in err.split("To keep")[0]
    got = run_json(capsys, *words, *flags)
    assert got["exact"] == sum(flag for flag in flags if type(flag) is int) / 50


def test_exact_tokens_of_a_scored_text_are_counted_in_every_window(folder, capsys):
    got = run_json(capsys, "--model", folder, "--perplexity", folder / "text", "--context", 20,
                   "--cache", "bibranch", "--sinks", 2, "--window", 10)
    assert got["exact"] == (12 + 12 + 9) / 49


def test_a_cache_that_is_far_from_the_full_one_is_called_unreliable(folder, tmp_path, capsys):
    words = ["--model", folder, "--prompt", TEXT, "--compare", "--max-new-tokens", 2]
    found = run_json(capsys, *words)["compare"]
    err = cli(capsys, *words)[2]
    assert found[1]["divergence"] > 0.1 > found[2]["divergence"] > 0
    assert "With a KL above 0.1 the compressed cache is unreliable on this text." in err
    assert err.count("unreliable") == 1 and "meant for the bi-branch cache" not in err
    cli(capsys, "--model", folder, "--save", tmp_path)
    assert "meant for the bi-branch cache" in cli(capsys, *words, "--bases", tmp_path)[2]


def test_layers_that_bits_do_not_apply_to_are_named(folder, capsys):
    words = ["--model", folder, "--prompt", "w1", "--max-new-tokens", 1, "--cache", "bibranch"]
    only_keys = ["--d-min", 12, "--split", "-0.5"]
    for plan, n in (["--skip", 1], 1), (["--d-min", 16], 2), ([*only_keys, *PLAN[2:]], 0):
        for bits in (4, 16):
            err = cli(capsys, *words, *plan, "--bits", bits)[2]
            note = f"{n} of 2 layers are not compressed: --bits 4 does not apply"
            if n > 0 and bits == 4:
                assert note in err
            else:
                assert "not compressed" not in err


def test_a_fraction_that_the_schedule_cannot_reach_is_refused_with_the_one_that_can(
        folder, capsys):
    words = ["--model", folder, "--plan"]
    status, out, err = cli(capsys, *words, "--kept", 0.4)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "kept 0.4 cannot be reached" in err and "--schedule uniform reaches 0.4" in err
    assert cli(capsys, *words, "--kept", 0.4, "--schedule", "uniform")[0] == 0
    for flags in (["--kept", 0.4, "--skip", 1], ["--kept", 0.01, "--schedule", "uniform"]):
        status, out, err = cli(capsys, *words, *flags)
        assert (status, err.count("\n")) == (2, 1) and "uniform reaches" not in err


def test_times_of_prefill_and_decode_are_told_apart(folder, capsys, monkeypatch):
    """With a clock that a token moves: the first by 5 seconds, each later one by 1."""
    now = [0.0]
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now[0])

    def steps():
        for seconds in (5, 1, 1, 1):
            now[0] += seconds
            yield torch.tensor([7])
    llama = small_model()
    tokenizer = Tokenizer(folder, llama.config)
    meter = scoring.ErrorMeter(llama, [None, None])
    ids, text, status, clock = jobs.stream_tokens(steps(), meter, tokenizer, [1], lambda t: None)
    assert (ids, text, status, clock) == ([7] * 4, " w7 w7 w7 w7", "ok", [0, 5, 8])
    monkeypatch.setattr(jobs, "stream_tokens", lambda *args: (ids, text, status, clock))
    seconds = run_json(capsys, "--model", folder, "--prompt", "w1")["seconds"]
    assert (seconds["prefill"], seconds["decode"]) == (5, 3)


def test_agreement_counts_leading_tokens_of_every_prompt():
    def result(kind, ids):
        return jobs.Result({"kind": kind}, len(ids), 0, 0, [], 0.0, ids=ids)
    results = [result("full", [1, 2, 3]), result("full", [4, 5]),
               result("compressed", [1, 9, 3]), result("compressed", [4, 5])]
    assert report.agreement(results, "compressed") == [1, 2]
    assert report.agreement_text(results, "compressed") == "1 of 3, 2 of 2"


def test_the_closest_cache_has_the_smallest_divergence_and_of_equal_ones_the_fewest_bytes():
    def result(kind, divergence, stored_bytes):
        cache = {"kind": kind, "stored_bytes": stored_bytes, "full_bytes": 9}
        return jobs.Result(cache, 5, 5, 0, [], 0.0, divergence=divergence, divergence_tokens=5)
    full = result("full", 0.0, 1)
    for compressed, bibranch, want in (((0.5, 3), (0.1, 4), "bibranch"),
                                       ((0.1, 4), (0.5, 3), "compressed"),
                                       ((0.2, 3), (0.2, 4), "compressed"),
                                       ((0.2, 4), (0.2, 3), "bibranch")):
        results = [full, result("compressed", *compressed), result("bibranch", *bibranch)]
        assert report.closest_kind(results) == want
    assert report.closest_kind([full]) is None


# The next command --------------------------------------------------------------------------------

TASKS = [["--prompt", "w1"], ["--prompt=-x", "--prompt", "it's\n$HOME"], ["--perplexity", "text"],
         ["--plan"], ["--save", "DIR"], ["--save", "DIR", "--prompt", "w1"]]
CACHES = [[], ["--cache", "full"], ["--cache", "bibranch", "--sinks", "2"], ["--compare"],
          ["--cache", "bibranch", "--bits", "4", "--window", "3"], ["--sinks", "0"]]
BASES = [[], ["--kept", "0.7"], ["--kept", "0.2", "--schedule", "uniform"], ["--d-min", "4"],
         ["--calibrate"], ["--calibrate", "FILE", "--basis", "whitened", "--split", "-0.1"],
         ["--bases", "SAVED"], ["--basis", "commuting"], ["--kept", "1"]]
REST = [[], ["--json"], ["--verbose"], ["--model", "a b"], ["--temperature", "1", "--seed", "7"]]


def suggestions():
    """(words of a command that is accepted, words of the command that is suggested after it)."""
    rest = itertools.cycle(REST)
    for words in itertools.product(TASKS, CACHES, BASES):
        words = sum(words, []) + next(rest)
        try:
            args = arguments(*words)
        except SystemExit:                                  # they cannot be combined
            continue
        reason, line = advice.suggest(args, "bibranch" if args.compare else None)
        assert reason[0].isupper() and "\n" not in reason
        yield words, shlex.split(line)


def test_every_suggested_command_is_accepted_and_differs_from_the_one_before(capsys):
    found = list(suggestions())
    for words, (python, script, *following) in found:
        args = arguments(*following)
        assert (python, script) == (Path(sys.executable).name, "lorc.py")
        assert args.prompt or args.perplexity
        assert following != words and args.given != arguments(*words).given
        assert args.model == arguments(*words).model and not args.json and not args.verbose
        if args.temperature:
            assert args.seed == 7
    assert len(found) > 90
    capsys.readouterr()


def next_words(*words, closest=None):
    return " ".join(shlex.split(advice.suggest(arguments(*words), closest)[1])[2:])


def test_what_is_suggested_in_each_situation(monkeypatch):
    calibrated = "--kept 0.4 --calibrate --cache bibranch --bits 4"
    assert next_words("--prompt", "Once") == "--prompt Once " + calibrated
    assert next_words("--model", "M", "--perplexity", "f", "--cache", "full") == (
        "--model M --perplexity f " + calibrated)
    assert next_words("--prompt", "a", "--compare", closest="compressed") == (
        "--prompt a " + calibrated)
    assert next_words("--prompt", "a", "--kept", 0.3, "--schedule", "uniform") == (
        "--prompt a " + calibrated.replace("0.4", "0.3"))
    after = ["--prompt", "a", "--calibrate", "--kept", 0.4, "--cache", "bibranch", "--bits", 4]
    assert next_words("--model", "x/M", *after) == (
        "--model x/M --prompt a --save M-bases " + calibrated)
    assert next_words(*after, "--save", "D") == "--prompt a --bases D --cache bibranch --bits 4"
    assert next_words("--prompt", "a", "--calibrate", "--compare", closest="compressed") == (
        "--prompt a --save tiny-bases --calibrate --cache compressed")
    assert next_words("--prompt", "a", "--bases", "D", "--compare", closest="bibranch") == (
        "--prompt a --bases D --cache bibranch")
    assert next_words("--plan", "--threshold", "-inf", "--d-min", 3) == (
        "--prompt Once upon a time --compare --d-min 3 --threshold -inf")
    assert next_words("--save", "D", "--kept", 0.7) == (
        "--prompt Once upon a time --compare --bases D")


def test_under_torchrun_torchrun_is_suggested_without_the_basis_that_it_refuses(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = advice.suggest(arguments("--prompt", "a"))[1]
    assert line == ("torchrun --nproc-per-node 2 lorc.py --prompt a --kept 0.4 --basis whitened "
                    "--calibrate --cache bibranch --bits 4")


def test_the_script_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some where/lorc.py"])
    assert " '/some where/lorc.py' --prompt a " in advice.suggest(arguments("--prompt", "a"))[1]


def test_a_prompt_from_standard_input_is_written_out_in_the_suggestion(
        folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "in").write_text("w1 w2")
    with open(tmp_path / "in") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        err = cli(capsys, "--model", folder, "--prompt", "-", "--max-new-tokens", 2)[2]
    assert "--prompt 'w1 w2' --kept" in err.splitlines()[-1]


@pytest.mark.parametrize("words", [
    ["--prompt", "w1 w2"], ["--prompt", "w1 w2", "--compare"], ["--plan"], ["--save", "DIR"],
    ["--perplexity", "FILE"], ["--perplexity", "FILE", "--compare"], ["--prompt", "w1", "--json"],
    ["--prompt", "w1", "--prompt", "w2", "--cache", "full"]])
def test_every_mode_ends_with_a_command_to_try_next_that_runs(
        words, folder, tmp_path, capsys, monkeypatch):
    """The suggested command is run, and so is the one that it suggests in turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "BUNDLED_TEXT", str(folder / "other"))
    monkeypatch.setattr(advice, "BUNDLED_TEXT", str(folder / "other"))
    names = {"DIR": str(tmp_path / "saved"), "FILE": str(folder / "text")}
    words = ["--model", folder, *(names.get(word, word) for word in words)]
    for _ in range(3):
        status, out, err = cli(capsys, *words)
        assert status == 0, err
        line = json.loads(out)["next"] if "--json" in words else err.splitlines()[-1].strip()
        words = shlex.split(line)[2:]
        assert words[:2] == ["--model", str(folder)]
