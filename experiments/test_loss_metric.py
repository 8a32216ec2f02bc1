"""The parts of loss_metric.py and distill.py, against naive forms.

test_experiments.py runs these scripts as a whole.
"""
import math

import pytest
import torch

import study as shared
from study import lorc, model

import distill
import loss_metric
from runtime.bounds import own_text
from runtime.text import Tokenizer

TINY = shared.HERE.parent / "tiny"


@pytest.fixture(scope="module")
def tiny():
    """tiny/ in float64, and 128 tokens that it drew."""
    with torch.no_grad():
        llama = model.load(TINY, torch.float64)
        return llama, own_text(llama, Tokenizer(TINY, llama.config).encode("Once"), 128)[0]


def test_training_starts_from_the_bases_and_ranks_of_the_loss_metric(tiny):
    """distill.start: the same ranks and, to the rounding of float32, the same maps up down as
    lorc.compress_for_loss. Kills: C and M exchanged; a triangular factor not transposed."""
    llama, text = tiny
    plan, factors = distill.start(llama, text.view(-1, 64), 0.4)
    want, bases = lorc.compress_for_loss(llama, text, 0.4, context=64, windows=2)
    assert plan == want
    for pair, others in zip(distill.bases_of(factors), bases):
        for b, other in zip(pair, others):
            A, B = (x.up.double() @ x.down.double() for x in (b, other))
            assert (A - B).norm() < 1e-4 * B.norm()


@pytest.mark.parametrize("batches, recompute", [(1, True), (1, False)])
def test_the_factors_depend_on_neither_batches_nor_recomputation(tiny, batches, recompute,
                                                                 monkeypatch):
    """Two windows in one batch and one by one, with and without the activations of all layers, for the
    likeliest labels. Kills: gradients of all windows of a batch in one sum."""
    llama, text = tiny
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, n, **_: p.topk(n).indices)
    want = lorc.fisher_factors(llama, text, context=64, window=8)
    monkeypatch.setattr(lorc, "split_windows", lambda tokens, *_: tokens.view(-1, 64).chunk(batches))
    found = lorc.fisher_factors(llama, text, window=8, recompute=recompute)
    for one, other in zip(found, want):
        for A, B in zip((*one[0], *one[1]), (*other[0], *other[1])):
            assert torch.allclose(A, B, rtol=1e-8, atol=1e-12 * B.norm())


def test_the_measured_divergence_is_the_mean_over_tokens(tiny):
    """Against the sum over the vocabulary of p ln(p / q), one window at a time."""
    llama, text = tiny
    study = type("Study", (), {"llama": llama, "text": text[:100], "context": 64,
                               "caches": shared.Study.caches})()
    exact, bases = {"sinks": 2, "window": 8}, lorc.compress(llama, kept=0.6)[1]
    total = 0.0
    for x in study.text.split(64):
        p, q = (llama(x[None], caches)[0].softmax(-1) for caches in (
            lorc.new_caches(llama, "full", len(x)),
            lorc.new_caches(llama, "bibranch", len(x), bases, simulate_decoding=True, **exact)))
        total += (p * (p / q).log()).sum().item()
    assert math.isclose(loss_metric.divergence(study, bases, exact), total / 100, rel_tol=1e-6)
