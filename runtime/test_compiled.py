"""The decode step of fixed shape (--compile) against the eager one."""
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorc
import model
from runtime import commuting, compiled
from runtime.testing import Text, close, full
from runtime.testing import small  # noqa: F401 (fixture)


@settings(max_examples=5)
@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(0, 40), st.integers(45, 80))
def test_the_step_of_fixed_shape_is_the_eager_one(seed, sinks, window, T):
    """Every cache, at every position once sinks and window are full: what --compile compiles.
    Kills: a slot, position or group edge off by one; a mask that shows what is not stored yet."""
    text = Text(seed, [T], B=3)
    K, V = text.basis(), text.basis()
    commute = commuting.commuting_basis(text.randn(text.G * text.d, 7), 4, text.d)
    makers = [text.full_cache, lambda: text.compressed_cache(K, V),
              lambda: text.compressed_cache(commute, V)]
    for basis in (K, commute):
        for bits in (16, 4):
            makers.append(lambda basis=basis, bits=bits: text.bibranch_cache(
                basis, V, sinks=sinks, window=window, bits=bits))
    first = sinks + window
    for make in makers:
        eager, static = make(), make()
        for i, (q, k, v) in enumerate(text.pieces([first] * (first > 0) + [1] * (T - first))):
            want = eager.attend(q, k, v, text.rope)
            if i == 0 and first:
                static.attend(q, k, v, text.rope)
                continue
            assert compiled.ready(static)
            position = torch.tensor([eager.length - 1])
            assert close(compiled.CompiledCache(static, position).attend(q, k, v, text.rope), want)


def forty_tokens(llama, kind, compile, prompt=12, **plan):
    """Tokens that follow a prompt, with --compile or without. Nothing is compiled twice, except for
    layers of other ranks. The prompt is longer than the six tokens of sinks and window, or not."""
    bases = lorc.compress(llama, **({"kept": 0.7, "schedule": "uniform"} | plan))[1]
    options = {"sinks": 2, "window": 4, "bits": 4} if kind == "bibranch" else {}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile="schedule" not in plan):
        caches = lorc.new_caches(llama, kind, prompt + 39, bases, **options)
        step = compiled.make_step(llama, caches, compile)
        steps = lorc.generate(llama, caches, torch.arange(prompt)[None], 40, step=step)
        return [token.item() for token in steps]


COMMUTING = {"key_basis": commuting.key_basis, "pairs": True}         # options of lorc.compress


@pytest.mark.parametrize("kind, plan", [
    ("full", {}), ("compressed", {}), ("compressed", COMMUTING),
    ("compressed", {"schedule": "progressive"}), ("bibranch", {}), ("bibranch", {"prompt": 3})])
def test_a_compiled_step_gives_the_same_tokens_and_is_compiled_once(small, kind, plan, monkeypatch):
    """--compile: the same tokens as the eager loop; traced, but not translated to C++."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager"))
    assert forty_tokens(small, kind, True, **plan) == forty_tokens(small, kind, False, **plan)


def test_a_step_that_cannot_be_compiled_says_what_to_do(small, monkeypatch):
    """As where no C++ compiler is found: one line, not a traceback."""
    def broken(graph, inputs):
        raise RuntimeError("no compiler")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=broken))
    torch._dynamo.reset()
    caches = full(small, 20)
    step = compiled.make_step(small, caches, True)
    with pytest.raises(model.UserError, match="no compiler.*leave out --compile"):
        list(lorc.generate(small, caches, torch.arange(9)[None], 5, step=step))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_step_translated_to_cpp_gives_the_same_tokens(small, compiled_in_cpp):
    """Two branches and 4 bits, through the whole of PyTorch's compiler, in another process."""
    out, err = compiled_in_cpp.communicate(timeout=600)
    assert compiled_in_cpp.returncode == 0, err
    assert json.loads(out) == forty_tokens(small, "bibranch", False)
