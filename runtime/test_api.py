"""The public API: what a caller gets, what a wrong call raises, and how exact the numbers are.

The paper files are used here as a library, as in a notebook; the command line has its own tests.
"""
import ast
import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import cache
import lorc
import model
from cache import Basis
from runtime import scoring
from runtime.testing import (HERE, RAW, REAL, TOKENS, VARIANTS, Text, close, full, small_model,
                             write_checkpoint)
from runtime.testing import real, small  # noqa: F401 (fixtures)

KINDS = ["full", "compressed", "bibranch"]
PROMPT = torch.tensor([[1, 2, 3]])


def small_caches(kind, capacity, B=1, **options):
    """Caches of the small model; the bi-branch cache compresses from the fourth token on."""
    llama = small_model()
    bases = lorc.compress(llama, d_min=4, schedule="uniform")[1]
    if kind == "bibranch":
        options = {"sinks": 1, "window": 2} | options
    return lorc.new_caches(llama, kind, capacity, bases, B=B, **options)


# What a caller gets ------------------------------------------------------------------------------

def test_the_example_in_the_docstring_runs(monkeypatch):
    """Five lines as in a notebook: a plan of about 60 %, one cache per layer, 50 new tokens."""
    monkeypatch.chdir(HERE)
    example = re.search(r"^    import lorc, model\n(    .+\n)+", lorc.__doc__, re.M)[0]
    names = {"prompt": torch.tensor([[5, 6, 7]])}
    exec(textwrap.dedent(example), names)
    assert abs(names["plan"].kept - 0.6) < 0.01
    assert [cache.length for cache in names["caches"]] == [3 + 50 - 1] * 8
    assert [token.shape for token in names["tokens"]] == [(1,)] * 50


def test_importing_the_paper_files_has_no_side_effects():
    """Nothing is printed, gradients stay on, threads stay as they are, runtime/ is not imported."""
    program = ("import sys, torch; threads = torch.get_num_threads(); "
               "import cache, lorc, model, theory; "
               "assert torch.is_grad_enabled() and torch.get_num_threads() == threads; "
               "assert not any(name.split('.')[0] == 'runtime' for name in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["lorc", "cache", "model", "theory", "test_lorc"])
def test_the_paper_files_have_short_functions_and_import_only_each_other(name):
    """Lines of at most 100 columns, functions of at most 35 lines. The command line, processes and
    runtime/ are imported by the two program entries only, not on import."""
    source = (HERE / f"{name}.py").read_text()
    assert max(map(len, source.splitlines())) <= 100
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 35, node.name
    found = set()
    for node in tree.body:                                      # entries are in a function or an if
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    if name != "test_lorc":
        assert not found & {"argparse", "subprocess", "torch.distributed"}
        assert not any(module.split(".")[0] in ("runtime", "experiments") for module in found)


def test_ranks_of_wide_models_are_multiples_of_8():
    """From d_max = 1,024 on, if d_max is one; a budget less than half a step away is reached."""
    def ranks(d_max, **options):
        return lorc.make_plan([(1.0, 1.0)], d_max, schedule="uniform", **options).ranks
    for d_max, d_c in ((1016, 410), (1024, 408), (1026, 410), (5120, 408)):
        assert ranks(d_max, d_min=410) == [(d_c, d_c)] and ranks(d_max, kept=1) == [(d_max, d_max)]
    assert ranks(1016, d_min=409.2, pairs=True) == [(410, 409)]
    assert ranks(1024, kept=4.5 / 1024) == [(8, 8)]
    with pytest.raises(ValueError, match="cannot be reached"):
        ranks(1024, kept=3.5 / 1024)


# What a wrong call raises ------------------------------------------------------------------------

MISUSE = {
    "'compresed'": lambda llama, bases: lorc.new_caches(llama, "compresed", 9, bases),
    "compressed cache needs bases": lambda llama, bases: lorc.new_caches(llama, "compressed", 9),
    "bibranch cache needs bases": lambda llama, bases: lorc.new_caches(llama, "bibranch", 9),
    "2 layers": lambda llama, bases: lorc.new_caches(llama, "compressed", 9, bases[:1]),
    "8": lambda llama, bases: lorc.new_caches(llama, "bibranch", 9, bases, bits=8),
    "-1": lambda llama, bases: lorc.new_caches(llama, "bibranch", 9, bases, sinks=-1),
    "-2": lambda llama, bases: lorc.new_caches(llama, "bibranch", 9, bases, window=-2),
    "'linear'": lambda llama, bases: lorc.compress(llama, schedule="linear"),
    "-3": lambda llama, bases: lorc.compress(llama, d_min=-3),
    "17": lambda llama, bases: lorc.compress(llama, d_min=17),
    "not nan": lambda llama, bases: lorc.compress(llama, d_min=math.nan),
    "0.05 cannot be reached": lambda llama, bases: lorc.compress(llama, kept=0.05),
    "nan cannot be reached": lambda llama, bases: lorc.compress(llama, kept=math.nan),
    "moments must be finite": lambda llama, bases: lorc.compress(
        llama, kept=0.7, moments=[torch.ones(32), torch.full((32,), math.nan)]),
    "threshold nan": lambda llama, bases: lorc.compress(llama, threshold=math.nan),
    "skip -1": lambda llama, bases: lorc.compress(llama, skip=-1),
    "temperature -0.5": lambda llama, bases: next(
        lorc.generate(llama, full(llama, 9), PROMPT, 1, temperature=-0.5)),
    "temperature nan": lambda llama, bases: next(
        lorc.generate(llama, full(llama, 9), PROMPT, 1, temperature=math.nan)),
    "top_p 0": lambda llama, bases: next(
        lorc.generate(llama, full(llama, 9), PROMPT, 1, temperature=1, top_p=0)),
    "top_p -0.1": lambda llama, bases: next(
        lorc.generate(llama, full(llama, 9), PROMPT, 1, temperature=1, top_p=-0.1)),
    "'pca'": lambda llama, bases: lorc.calibrated_moments(llama, torch.tensor(TOKENS), "pca"),
    "more than 40": lambda llama, bases: lorc.calibrated_moments(
        llama, torch.tensor(TOKENS), "asvd", sinks=40),
}


@pytest.mark.parametrize("message", MISUSE)
def test_a_wrong_argument_raises_a_value_error_that_names_it(small, message):
    """Nothing is silently replaced by something else."""
    bases = lorc.compress(small, d_min=4, schedule="uniform")[1]
    with pytest.raises(ValueError, match=message):
        MISUSE[message](small, bases)


def test_one_sort_says_what_can_be_kept(monkeypatch):
    """At least one step of each matrix."""
    monkeypatch.setattr(lorc, "rank_multiple", lambda d_max: 4)
    factors = [((torch.eye(16), torch.eye(16)),) * 2] * 3
    assert lorc.sort_ranks(factors, 0.25) == [(4, 4)] * 3
    with pytest.raises(model.UserError, match="0.25 to 1"):
        lorc.sort_ranks(factors, 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_refuses_what_it_was_not_made_for_and_stays_as_it_was(small, kind):
    """Too many tokens, in one call or one by one, and another batch size. The next call, with what
    fits, gives the same logits as if nothing had happened."""
    tokens = torch.tensor([TOKENS[:8], TOKENS[8:16]])
    want = [small(part, small_caches(kind, 8, B=2)) for part in (tokens, tokens[:, :5])]
    caches = small_caches(kind, 8, B=2)
    for wrong, message in ((torch.tensor([TOKENS[:9]] * 2), "capacity of 8"),
                           (tokens[:1], "batch"), (tokens[[0, 0, 1]], "batch")):
        with pytest.raises(ValueError, match=message):
            small(wrong, caches)
    assert torch.equal(small(tokens, caches), want[0])
    with pytest.raises(ValueError, match="capacity of 8"):
        small(tokens[:, :1], caches)


@pytest.mark.parametrize("kind", ["compressed", "bibranch"])
@pytest.mark.parametrize("change, message", [({"dtype": torch.float32}, "dtype"),
                                             ({"device": "meta"}, "device")])
def test_bases_of_another_dtype_or_device_are_refused(small, kind, change, message):
    """Bases in float32 for a model in float64; bases on another device than the model."""
    bases = [tuple(Basis(b.down.to(**change), b.up.to(**change)) for b in pair)
             for pair in lorc.compress(small, d_min=4, schedule="uniform")[1]]
    with pytest.raises(ValueError, match=message):
        small(PROMPT, lorc.new_caches(small, kind, 9, bases))


@pytest.mark.parametrize("n, room, message", [(8, 9, "9"), (62 + 1, 90, "64")])
def test_generating_beyond_the_caches_or_the_context_raises(small, n, room, message):
    """3 + n - 1 tokens are stored: 10 do not fit into 9, 65 are beyond the context of 64. One fewer
    is generated."""
    with pytest.raises(ValueError, match=message):
        next(lorc.generate(small, full(small, room), PROMPT, n))
    assert len(list(lorc.generate(small, full(small, room), PROMPT, n - 1))) == n - 1


# Generation -------------------------------------------------------------------------------------

def tokens_of(steps):
    """The tokens of the only sequence in a batch."""
    return [token.item() for token in steps]


def test_generation_is_greedy_or_drawn_by_the_seed(small):
    """Temperature 0 takes the largest logit, else the seed decides; an end token is the last."""
    def draw(**options):
        return tokens_of(lorc.generate(small, full(small, 30), PROMPT, 20, **options))
    greedy = draw()
    logits = small(torch.tensor([[1, 2, 3, *greedy[:-1]]]), full(small, 30))
    assert greedy == logits[0, 2:].argmax(-1).tolist()
    drawn = draw(temperature=1.0, seed=3)
    assert drawn == draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw(temperature=1e-310) == greedy
    ended = draw(ends={greedy[4]})
    assert ended == greedy[:greedy.index(greedy[4]) + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_generates_what_each_prompt_generates_alone(small, kind):
    """B = 3 prompts of the same length, greedily: each row of the steps is that prompt's text."""
    prompts = torch.tensor([TOKENS[:9], TOKENS[9:18], TOKENS[20:29]])
    batch = torch.stack(list(lorc.generate(small, small_caches(kind, 28, B=3), prompts, 20)), 1)
    alone = [tokens_of(lorc.generate(small, small_caches(kind, 28), prompt[None], 20))
             for prompt in prompts]
    assert batch.tolist() == alone and len(set(map(tuple, alone))) == 3


def test_a_batch_goes_on_until_every_sequence_has_ended(small):
    """End token 9: the first sequence ends at its second token, the second at its fourth, and the
    steps stop there. Kills: any for all; ends that are forgotten in the next step."""
    planned = torch.tensor([[5, 6], [9, 8], [7, 5], [7, 9], [9, 9]])
    steps = iter(F.one_hot(planned, 61).double())
    got = lorc.generate(small, full(small, 40, B=2), torch.tensor([[1], [2]]), 5, ends={9},
                        step=lambda tokens: next(steps))
    assert torch.equal(torch.stack(list(got)), planned[:4])


@pytest.mark.parametrize("temperature, top_p, want", [
    (1, 1, [0.15, 0.5, 0.05, 0.3]), (1, 0.7, [0, 0.625, 0, 0.375]), (1, 0.5, [0, 1, 0, 0]),
    (2, 1, None), (0.5, 1, None), (2, 0.6, None),
])
def test_tokens_are_drawn_at_the_temperature_from_the_top_p(temperature, top_p, want):
    """p^(1/temperature), then the fewest most likely tokens that together reach top_p: frequencies
    of 20,000 draws lie within four standard errors. Kills: p^temperature; top_p applied before the
    temperature; the token that crosses top_p left out; tokens in sorted order."""
    p, n = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64), 20_000
    if want is None:
        want, total = [0.0] * 4, 0.0
        scaled = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        for i in (1, 3, 0, 2):                                 # from the most to the least likely
            if total < top_p:
                want[i], total = scaled[i].item(), total + scaled[i].item()
        want = [x / total for x in want]
    generator = torch.Generator().manual_seed(0)
    drawn = lorc.sample(p.log().expand(n, 4), temperature, top_p, generator)
    for token, expected in enumerate(want):
        share = (drawn == token).double().mean().item()
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / n)


# Scoring ----------------------------------------------------------------------------------------

def negative_log_likelihood_by_decoding(llama, tokens, caches):
    """Sum of -ln p of each token but the first, fed one by one."""
    logits = torch.cat([llama(token[None, None], caches)[0] for token in tokens[:-1]])
    return F.cross_entropy(logits, tokens[1:], reduction="sum").item()


@pytest.mark.parametrize("kind, options", [("full", {}), ("bibranch", {"bits": 16}),
                                           ("bibranch", {"bits": 4})])
def test_a_long_window_is_scored_as_it_is_decoded(small, kind, options):
    """A window of 600 tokens, over 256 and 512, and a shorter second one: the sum over both of what
    token-by-token decoding gives."""
    tokens = torch.randint(61, (700,), generator=torch.Generator().manual_seed(0))
    simulate = {"simulate_decoding": True} if kind == "bibranch" else {}
    nats, count = scoring.negative_log_likelihood(
        small, tokens, 600, lambda T: small_caches(kind, T, **options, **simulate))
    want = sum(negative_log_likelihood_by_decoding(small, x, small_caches(kind, len(x), **options))
               for x in tokens.split(600))
    assert count == 599 + 99 and math.isclose(nats, want, rel_tol=1e-6)


# Blocks -----------------------------------------------------------------------------------------

def test_a_text_is_split_into_windows_and_a_shorter_last_one():
    """150 tokens in windows of 64; a last window of at most `exact` tokens is left out."""
    def shapes(windows, exact):
        return [tuple(x.shape) for x in lorc.split_windows(torch.arange(150), 64, windows, exact, "")]
    assert shapes(9, 4) == [(1, 64), (1, 64), (1, 22)] and shapes(9, 22) == [(1, 64), (1, 64)]
    assert shapes(1, 4) == [(1, 64)]
    with pytest.raises(ValueError, match="no window of 64 in 150 tokens has more than 150"):
        shapes(9, 150)


def test_keys_rebuilt_in_several_blocks_give_the_same_attention(monkeypatch):
    """70 tokens, in one block and in blocks of 32. Kills: a block's values or positions shifted."""
    text = Text(0, [69, 1])
    K, V = text.basis(5), text.basis(3)
    want = text.attend(text.compressed_cache(K, V), [1] * 70)
    monkeypatch.setitem(cache.REBUILT_BYTES, "cpu", 1)
    store = text.compressed_cache(K, V)
    assert close(text.attend(store, [1] * 70), want)
    part = cache.LowRank(K, V, store.c_k, store.c_v, text.rope, slice(0, 70))
    assert [span.stop for span, _ in part.blocks(1)] == [32, 64, 70]


# Precision --------------------------------------------------------------------------------------

# transformers 5.23.0, torch 2.13.0, CPU, float32: python experiments/parity.py --record
RECORDED = {
    "grouped": [1.256649, 0.3095955, 0.0957707, 1.2057213, 53.8348808],
    "multi_head": [0.9087702, 1.0655012, -0.4124058, 0.9549236, 52.4298782],
    "implied_kv_heads": [0.9087702, 1.0655012, -0.4124058, 0.9549236, 52.4298782],
    "wide_heads": [0.2415797, -0.3176998, -1.1197716, -0.9939173, 52.4133759],
    "tied": [-0.3496349, 0.0657149, 0.5772218, -1.3637154, 53.5293198],
    "mistral": [1.256649, 0.3095955, 0.0957707, 1.2057213, 53.8348808],
    "linear": [-0.6027638, 0.6452584, 1.212697, -0.9940771, 53.7635155],
    "llama3": [1.0911802, 0.48917, -0.1710702, 1.2838705, 53.9673157],
    "llama3_new": [0.8529122, 0.5937719, -0.0938003, 1.2942505, 53.9238052],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_that_transformers_gave(variant, tmp_path):
    """Four logits of the last token and the norm of all, in float32."""
    llama = model.load(write_checkpoint(tmp_path, RAW | VARIANTS[variant]), torch.float32)
    logits = llama(torch.tensor([TOKENS]), full(llama, 40))[0]
    got = torch.tensor([*logits[-1, :4], logits.norm()])
    want = torch.tensor(RECORDED[variant])
    assert ((got - want).abs() / want.abs()[-1]).max() < 1e-6
    assert abs(got[-1] / want[-1] - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_close_to_float32(real, dtype, kind):
    """Logits of every cache, token by token and in one pass, to 10 % of their norm, and finite."""
    llama, _, tokens = real
    bases, half = lorc.compress(llama, kept=0.8)[1], model.load(REAL, dtype)
    halved = [pair and tuple(Basis(b.down.to(dtype), b.up.to(dtype)) for b in pair)
              for pair in bases]
    options = {"sinks": 1, "window": 2, "bits": 4} if kind == "bibranch" else {}
    n = tokens.shape[1]
    for chunks in ([n], [1] * n):
        both = []
        for m, b in ((llama, bases), (half, halved)):
            caches = lorc.new_caches(m, kind, n, b, **options)
            logits = [m(chunk, caches) for chunk in tokens.split(chunks, 1)]
            both.append(torch.cat(logits, 1).float())
        assert (both[0] - both[1]).norm() < 0.1 * both[0].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_four_bits_keep_a_channel_of_small_range_in_half_precision(dtype):
    """A range of 4e-4 over 15 is below float16's smallest normal number and comes back to a step.
    Kills: a scale clamped at that number, which lost the channel."""
    c = torch.linspace(0, 4e-4, 32).view(1, 32, 1).to(dtype)
    assert (cache.dequantize(*cache.quantize(c)) - c).abs().max() <= 4e-4 / 15


def test_angles_of_late_positions_are_not_computed_in_bfloat16():
    """cos and sin of 600 positions, rounded to bfloat16 at the end only: right to 2^-8. Angles in
    bfloat16 would be wrong by more than 1 there."""
    config = small_model().config
    tables = []
    for dtype in (torch.bfloat16, torch.float64):
        rope = model.Rope(config)
        rope.reserve(600, torch.zeros(1, dtype=dtype))
        tables.append(torch.cat((rope.cos, rope.sin)).double())
    assert (tables[0] - tables[1]).abs().max() < 2**-8


def test_observing_removes_its_hooks_even_after_an_error(small):
    """observe_projections leaves the model as it was. Kills: hooks that stay after an error."""
    seen = []
    with pytest.raises(KeyError):
        with scoring.observe_projections(small, lambda *args: seen.append(args)):
            small(PROMPT, full(small, 3))
            raise KeyError
    assert [(layer, name) for layer, name, *_ in seen] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    for _, _, x, y in seen:
        assert x.shape == (1, 3, 32) and y.shape == (1, 3, 16)
    small(PROMPT, full(small, 3))
    assert len(seen) == 4
