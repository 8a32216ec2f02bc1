"""The parts of front.py, metric.py, allocation.py, recall.py and tasks.py, against naive forms.

test_experiments.py runs these scripts as a whole.
"""
import dataclasses
import itertools
import json

import pytest
import torch

import study as shared
from study import lorc, model

import allocation
import distill
import metric
import recall
import tasks
from cache import QuantizedLatents, round_trip
from runtime.text import Tokenizer

TINY = shared.HERE.parent / "tiny"


@pytest.fixture(scope="module")
def tiny():
    """tiny/ in float64, its tokenizer, and bases that keep 0.6."""
    torch.set_grad_enabled(False)
    llama = model.load(TINY, torch.float64)
    return llama, Tokenizer(TINY, llama.config), lorc.compress(llama, kept=0.6)[1]


# Fewer bits --------------------------------------------------------------------------------------

def test_three_and_two_bits_round_and_count_as_packed():
    """At most 2**bits values per group and channel, errors of at most half a step, bytes by hand.

    Kills: levels of another number of bits, codes counted as four bits, exact tokens as packed.
    """
    c = torch.randn(1, 64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for bits in (4, 3, 2):
        with shared.rounded_to(bits):
            near = round_trip(c)
            store = QuantizedLatents(1, 64, 3, c)
            store.append(c)
        assert torch.equal(store.read(slice(0, 64)), near)
        groups, rounded = c.unflatten(1, (2, 32)), near.unflatten(1, (2, 32))
        channels = rounded[0].transpose(1, 2).flatten(0, 1)
        assert all(len(channel.unique()) <= 2**bits for channel in channels)
        step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
        assert ((groups - rounded).abs().amax(2) <= step * (0.5 + 1e-12)).all()
    assert torch.equal(round_trip(c), round_trip(c, 4))            # nothing outlives the context
    llama = shared.shape_only(dataclasses.replace(model.read_config(TINY), layers=1))
    d, N, exact = llama.config.kv_width, 4 + 32 + 96, 2 * (4 + 32)
    for bits in (4, 3, 2):
        found = shared.held(llama, "bibranch", [(d, d)], N, everywhere=True, bits=bits)
        codes, scales, pending = 2 * 96 * d * bits // 8, 2 * 2 * 3 * d * 2, 2 * 32 * d * 2
        assert found == exact * d * 2 + codes + scales + pending


# The metric of attention scores and of W_o -------------------------------------------------------

def test_query_energy_is_the_mean_over_rotations(seed=0):
    """E over independent quarter turns of each frequency of (R^T q)(R^T q)^T, for two KV heads."""
    generator = torch.Generator().manual_seed(seed)
    G, H, d, D = 2, 4, 4, 5
    Wq = torch.randn(H * d, D, dtype=torch.float64, generator=generator)
    x = torch.randn(3, D, dtype=torch.float64, generator=generator)
    expected = torch.zeros(G, d, d, dtype=torch.float64)
    turns = list(itertools.product(range(4), repeat=d // 2))
    for q in (x @ Wq.T).unflatten(1, (G, H // G, d)):                  # three tokens
        z = torch.complex(q[..., :d // 2], q[..., d // 2:])
        for turn in turns:
            w = z * torch.tensor([1j**n for n in turn])
            r = torch.cat((w.real, w.imag), -1)
            expected += torch.einsum("ghi,ghj->gij", r, r) / (3 * len(turns))
    found = metric.query_energy(Wq, x.T @ x / 3, G, d).unflatten(0, (G, d)).diag_embed()
    torch.testing.assert_close(found, expected)


def test_the_output_metric_is_the_error_after_wo():
    """e^T M e = sum over query heads h of ||W_o,h e_g||^2, where g is the KV head that h reads."""
    generator = torch.Generator().manual_seed(1)
    G, H, d, D = 2, 6, 3, 7
    Wo = torch.randn(D, H * d, dtype=torch.float64, generator=generator)
    e = torch.randn(G, d, dtype=torch.float64, generator=generator)
    after = sum((Wo[:, h * d:(h + 1) * d] @ e[h // (H // G)]).square().sum() for h in range(H))
    M = metric.output_metric(Wo, G, d)
    torch.testing.assert_close(e.flatten() @ M @ e.flatten(), after)


# Allocation --------------------------------------------------------------------------------------

def test_ranks_in_proportion_by_hand():
    """8 : 1 : 1 of 12 with at most 6: the first would get 8 and is cut to 6; the others share 6."""
    assert allocation.in_proportion([8, 1, 1], 12, 6) == [6, 3, 3]
    assert allocation.in_proportion([1, 1, 1, 1], 8, 6) == [2, 2, 2, 2]
    assert allocation.in_proportion([1, 0, 0], 4, 3) == [2, 1, 1]


# Recall ------------------------------------------------------------------------------------------

def test_records_share_no_line_and_their_prompts_have_one_length(tiny):
    lines = [(f"word-{i}", str(10**(i % 5) + i)) for i in range(24)]
    records = recall.make_records(lines, 4, 6)
    assert len({line for record, _ in records for line in record}) == 24
    tokenizer = tiny[1]
    prompts, numbers = recall.encode_records(tokenizer, "Remember these lines. " * 9, records)
    assert len(prompts) == len(numbers) == 6
    for prompt, (record, asked), candidates in zip(prompts.tolist(), records, numbers):
        text = tokenizer.fast.decode(prompt)
        assert all(f"{name}: REGISTER_CONTENT is <{number}>" in text for name, number in record)
        assert text.endswith(f"line {record[asked][0]}: REGISTER_CONTENT is <")
        assert tokenizer.fast.decode(candidates[0]).strip() == record[asked][1] + ">"
        assert len(candidates) == 4
    with pytest.raises(model.UserError):
        recall.make_records(lines, 5, 5)


@pytest.mark.parametrize("kind, bits", [("full", 16), ("compressed", 16), ("bibranch", 16),
                                        ("bibranch", 4)])
def test_continuations_are_those_of_a_token_by_token_run(tiny, kind, bits):
    """ln p of each token, and whether it is the likeliest, against sequences fed token by token.

    Kills: a prompt that sees itself exactly, copies that share a buffer, another order of rows.
    """
    llama, _, bases = tiny
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(llama.config.vocab, (2, 45), generator=generator)
    numbers = torch.randint(llama.config.vocab, (2, 3, 4), generator=generator)
    options = {"sinks": 2, "window": 5, "bits": bits} if kind == "bibranch" else {}

    def make(B, **simulate):
        return lorc.new_caches(llama, kind, 50, bases, B, **options, **simulate)
    simulate = {"simulate_decoding": True} if kind == "bibranch" else {}
    found = recall.continuations(llama, prompts, numbers, make(2, **simulate))
    texts = torch.stack([torch.cat((prompts[r], numbers[r, n]))
                         for r, n in itertools.product(range(2), range(3))])
    caches = make(6)
    logits = torch.cat([llama(token, caches) for token in texts.split(1, 1)], 1)[:, 44:-1]
    want = logits.log_softmax(-1).gather(2, texts[:, 45:, None]).view(2, 3, 4)
    torch.testing.assert_close(found[0], want, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[1], (logits.argmax(-1) == texts[:, 45:]).view(2, 3, 4))


def test_a_record_is_scored_by_hand(tiny, monkeypatch):
    """Numbers of 2, 1 and 3 tokens. exact asks for all tokens of the right one, nats leave out
    its last, the rank counts the numbers that are likelier."""
    p = torch.tensor([[[-1.0, -3.0, -50.0], [-2.0, -50.0, -50.0], [-1.0, -1.0, -3.0]]])
    best = torch.tensor([[[True, True, False], [False] * 3, [False] * 3]])
    monkeypatch.setattr(recall, "continuations", lambda *_: (p, best))
    found, = recall.measure_records(tiny[0], torch.zeros(1, 5, dtype=int),
                                    [[[7, 7], [7], [7, 7, 7]]], lambda capacity, B: None)
    assert found == {"exact": 1.0, "nats": 1.0, "rank": 2}            # -4 against -2 and -5


def test_trained_bases_are_asked_for_one_number_of_each_record(monkeypatch, tmp_path):
    """distill.exact_matches: the fraction of records that measure_records calls exact."""
    (tmp_path / "longeval").mkdir()
    lines = "".join(f"line a-{i}: REGISTER_CONTENT is <{1000 + i}>\n" for i in range(6))
    (tmp_path / "longeval" / "200_lines.jsonl").write_text(
        json.dumps({"prompt": f"Read this. record start:\n{lines}"}) + "\n")
    monkeypatch.setattr(recall, "RECORDS", 2)
    monkeypatch.setattr(distill, "LINES", 3)
    asked = []

    def measured(llama, prompts, numbers, make):
        asked.extend(numbers)
        return [{"exact": 1.0}, {"exact": 0.0}]
    monkeypatch.setattr(recall, "measure_records", measured)
    tokenizer = Tokenizer(TINY, model.read_config(TINY))
    args = distill.command_line().parse_args(["--text", "x", "--out", "x", "--data", str(tmp_path)])
    assert distill.exact_matches(None, tokenizer, args, None) == 0.5
    numbers = [tokenizer.fast.decode(number) for record in asked for number in record]
    assert len(numbers) == 2 and all(n.strip()[:3] == "100" and n[-1] == ">" for n in numbers)


def test_training_without_its_files_is_refused_before_the_model_is_read(monkeypatch, tmp_path):
    """A --data folder without records, and a text with less than two windows."""
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("the model was read"))
    words = ["distill.py", "--text", "x", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(model.UserError, match="200_lines.jsonl does not exist"):
        distill.main()
    assert not (tmp_path / "out").exists()
    (tmp_path / "short").write_text("Once upon a time")
    tokenizer = Tokenizer(TINY, model.read_config(TINY))
    with pytest.raises(model.UserError, match="128 are needed"):
        distill.read_windows(tokenizer, [tmp_path / "short"], 64, "cpu")


# Tasks -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    (" She has 3 + 4 = 7.\n#### 7\n\nQuestion: 5", "7"), (" It costs $1,250 in all.", "1250"),
    (" 3 and then 4\n\n9", "4"), (" none", None), ("\n#### -2.5 of 3", "-2.5"),
    (" 1\n#### none", "1")])
def test_the_final_number_of_an_answer(text, number):
    assert tasks.final_number(text) == number


def test_prompts_of_problems_have_one_length_and_end_with_the_problem(tiny):
    tokenizer = tiny[1]
    problems = [(f"Question: {n} dogs and a cat?\nAnswer:", f" {n} + 1 #### {n + 1}")
                for n in range(4)]
    for i in range(4):
        prompt = tasks.problem_prompt(tokenizer, problems, i)
        assert len(prompt) == tasks.PROMPT
        assert tokenizer.fast.decode(prompt).endswith(problems[i][0])


# Where results come from -------------------------------------------------------------------------

def test_a_result_names_the_command_of_its_own_script():
    """run_all.py's flags are those of every script, except --only and --measure-only."""
    said = "python experiments/run_all.py --text a --only front,recall --measure-only --tokens 64"
    assert shared.own_command(said, "front") == "python experiments/front.py --text a --tokens 64"


def test_the_shared_factors_give_the_bases_of_compress_for_loss():
    """Study's bases for two budgets against lorc.compress_for_loss for each."""
    text = str(TINY / "README.md")
    args = shared.command_line("", False).parse_args(
        ["--text", text, "--calibrate", text, "--tokens", "64", "--device", "cpu"])
    study = shared.Study(args)
    study.calibration, study.context = study.calibration[:240], 128
    for kept in (0.5, 0.3):
        ranks, bases = study.compressed(kept, "loss, sorted")
        plan, want = lorc.compress_for_loss(study.llama, study.calibration, kept,
                                            context=study.context, windows=2)
        assert ranks == plan.ranks
        for pair, other in zip(bases, want):
            assert all(torch.allclose(a.down, b.down, atol=1e-6)
                       and torch.allclose(a.up, b.up, atol=1e-6) for a, b in zip(pair, other))


def test_the_bundled_text_has_factors_of_its_own(monkeypatch):
    """Tokens and windows that the factors are measured on. Kills: `bundled` without effect."""
    text = str(TINY / "README.md")
    args = shared.command_line("", False).parse_args(
        ["--text", text, "--calibrate", text, "--tokens", "64", "--device", "cpu"])
    study, bundled = shared.Study(args), str(shared.HERE.parent / "LICENSE")
    monkeypatch.setattr(shared, "BUNDLED_TEXT", bundled)
    monkeypatch.setattr(lorc, "fisher_factors", lambda llama, tokens, windows, **_: (tokens, windows))
    for flag, path, windows in ((True, bundled, 32), (False, text, 2**17 // study.context)):
        tokens, n = study.fisher_factors(bundled=flag)
        assert n == windows and torch.equal(tokens, study.encode(path))
