"""What evaluate.py builds on, without lm-eval: batches and caches change no answer.

The naive form feeds one text, token by token, to fresh caches. lm_eval_adapter.py itself is
compared with lm-eval's own `hf` by `evaluate.py --against-hf`.
"""
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scoring
from agreement import agreement
from scoring import lorc
import model
from runtime.text import Tokenizer

CONTEXT = 40
CACHES = {"full": {}, "compressed": {}, "bibranch": {"sinks": 2, "window": 3},
          "4 bits": {"sinks": 1, "window": 2, "bits": 4}}


@pytest.fixture(scope="module", params=CACHES)
def case(request):
    """tiny/, made for 40 positions only; its tokenizer; a text; empty caches of one kind."""
    torch.set_grad_enabled(False)
    folder = scoring.Path(lorc.__file__).parent / "tiny"
    llama = model.load(folder, torch.float32)
    llama.config = dataclasses.replace(llama.config, context=CONTEXT)
    tokenizer, bases = Tokenizer(folder, llama.config), lorc.compress(llama, kept=0.6)[1]
    kind = request.param if request.param in ("full", "compressed") else "bibranch"

    def make(capacity, B, **strict):
        return lorc.new_caches(llama, kind, capacity, bases, B, **CACHES[request.param], **strict)
    text = "One day, a little dog went to the park with Tom. He saw a big red ball and was happy. "
    return llama, tokenizer, tokenizer.encode(4 * text), make


def decoded(llama, tokens, make):
    """Log-probabilities (T, V) of what follows each token, fed one by one."""
    caches = make(len(tokens), 1)
    logits = [llama(torch.tensor([[token]]), caches)[0, 0] for token in tokens]
    return torch.stack(logits).double().log_softmax(-1)


def test_continuations_in_batches_score_as_they_do_token_by_token(case):
    """ln p(continuation | context) in the decode regime, whatever shares a batch or a context; a
    text beyond the model's context loses its left."""
    llama, _, text, make = case
    spans = [(0, 9, 12), (0, 9, 10), (0, 1, 30), (3, 25, 26), (5, 35, 45), (0, 50, 53)]
    pairs = [(text[a:b], text[b:c]) for a, b, c in spans]
    greedy = decoded(llama, text[:9], make)[-1].argmax().item()
    pairs += [(text[:9], [y]) for y in (1, 2, greedy)]                 # one context, three answers
    rows = [decoded(llama, (x + y)[-CONTEXT - 1:-1], make)[-len(y):] for x, y in pairs]
    for budget in (1, 90, 10**6):
        found = scoring.continuation_scores(
            llama, pairs, lambda n, B: make(n, B, simulate_decoding=True), budget)
        for (_, y), p, (nats, likeliest) in zip(pairs, rows, found, strict=True):
            want = p.gather(-1, torch.tensor(y)[:, None]).sum().item()
            assert math.isclose(nats, want, rel_tol=2e-5)              # float32, as testing.close
            assert likeliest == (p.argmax(-1).tolist() == y)
        assert found[-1][1] and not all(likeliest for _, likeliest in found)


def test_a_prompt_that_attends_exactly_would_be_scored_by_the_full_model(case):
    """Why the adapter is strict: by CSKV's prefill rule the choices would be the full model's."""
    llama, _, text, make = case

    def score(caches):
        return scoring.continuation_scores(llama, [(text[:30], text[30:31])], caches)[0][0]
    full = score(lambda n, B: lorc.new_caches(llama, "full", n, B=B))
    loose, strict = score(make), score(lambda n, B: make(n, B, simulate_decoding=True))
    two_branches = hasattr(make(8, 1)[-1], "ring_k")
    assert math.isclose(loose, full if two_branches else strict, rel_tol=2e-5)
    assert math.isclose(strict, full, rel_tol=1e-3) == (not hasattr(make(8, 1)[-1], "c_k"))


def test_a_text_goes_on_greedily_up_to_the_first_stop(case):
    """Equal to generating everything and cutting; at an end token the text is over without it."""
    llama, tokenizer, text, make = case

    def go_on(prompt=text[:20], n=12, stops=()):
        return scoring.continue_until(llama, tokenizer, prompt, make, n, stops)
    tokens = [t.item() for t in lorc.generate(llama, make(31, 1), torch.tensor([text[:20]]), 12)]
    whole = tokenizer.fast.decode(tokens)
    assert go_on() == whole
    assert go_on(stops=[whole[-2:], whole[7:9]]) == whole[:whole.index(whole[7:9])]
    assert go_on(text[:60]) == go_on(text[:60][-CONTEXT + 12:])
    tokenizer.ends = {tokens[5]}
    before = tokens[:tokens.index(tokens[5])]
    assert go_on() == tokenizer.fast.decode(before)


@given(st.lists(st.integers(1, 60)), st.integers(1, 200))
def test_batches_hold_every_text_once_and_fit_the_budget(lengths, budget):
    texts = [range(n) for n in lengths]
    parts = list(scoring.batches(texts, budget))
    assert sorted(map(len, sum(parts, []))) == sorted(lengths)
    assert all(len(part) == 1 or len(part) * max(map(len, part)) <= budget for part in parts)
    assert all(len(a) > 0 and len(a[-1]) >= len(b[0]) for a, b in zip(parts, parts[1:]))


def test_agreement_by_hand():
    """6 of 8 agree; chance gives (5 * 5 + 3 * 3) / 8 = 4.25: kappa is (6 - 4.25) / (8 - 4.25)."""
    assert agreement("11111000", "11110001") == (0.75, 1.75 / 3.75)
    assert agreement("0123", "0123") == (1, 1)
