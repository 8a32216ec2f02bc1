"""Text and tokens: the stream, BOS, end tokens, and chat templates as transformers renders them."""
import importlib.util
import json
import random
import resource
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as FastTokenizer, decoders, models, normalizers, pre_tokenizers

import model
from runtime.text import Stream, Tokenizer
from runtime.testing import HERE, RAW, real, write_checkpoint             # noqa: F401


def open_tokenizer(folder, tokenizer=None, **options):
    """The tokenizer of a small checkpoint in `folder`, with these options.

    tokenizer: a change of tokenizer.json, which otherwise knows the words w0 to w60.
    """
    if not (folder / "config.json").exists():
        write_checkpoint(folder, RAW)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (tokenizer or {})))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return Tokenizer(folder, model.read_config(folder))


# The stream --------------------------------------------------------------------------------------

class Wrapped:
    """A tokenizer of the library, as Stream wants it."""

    def __init__(self, fast):
        self.fast = fast


def byte_fallback():
    """As LLaMA-2's: unknown characters become one token for each byte, spaces become "▁"."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdnotw",
             "▁a", "▁no", "▁w", "�"]
    merges = [("▁", "a"), ("▁", "w"), ("n", "o"), ("▁", "no")]
    vocab.append("no")
    fast = FastTokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>",
                                    fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                            normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast


def byte_level():
    """As LLaMA-3's: text is bytes, so a token may hold a part of a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*letters, "Ġa", "áĪ"])}
    fast = FastTokenizer(models.BPE(vocab, [("Ġ", "a"), ("á", "Ī")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>"])
    return fast


def words():
    """Words that decode with a space between them, and no decoder."""
    fast = FastTokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


ALPHABETS = ["ab no w", "ሀሁሂ ሰላም", "ಕನ್ನಡ ", "🙂👩‍👩‍👧é", "ꙮ", "\n\t  ", "\ufffd", "w1 w2 "]


def random_text(rng):
    """Pieces of several scripts, most of whose characters no tokenizer here knows."""
    return "".join("".join(rng.choices(alphabet, k=rng.randrange(1, 6)))
                   for alphabet in rng.choices(ALPHABETS, k=rng.randrange(1, 4)))


def stream_differences(fast, tries, seed=0):
    """How many of so many random prompts and continuations are streamed wrongly.

    Half of the continuations are texts, half are arbitrary tokens, whose bytes are rarely valid. A
    stream is right if its pieces are one decode of all tokens after the prompt's, and if no piece
    of a valid text ends within a character.
    """
    rng, wrong, size = random.Random(seed), 0, fast.get_vocab_size()
    for _ in range(tries):
        prompt, text = fast.encode(random_text(rng)).ids, random_text(rng)
        new = fast.encode(text, add_special_tokens=False).ids
        if rng.random() < 0.5:
            text, new = None, rng.choices(range(size), k=rng.randrange(1, 12))
        stream = Stream(Wrapped(fast), prompt)
        pieces = [stream.step(token) for token in new]
        pieces.append(stream.rest())
        want = fast.decode(prompt + new)[len(fast.decode(prompt)):]
        cut = text is not None and "\ufffd" not in text and "\ufffd" in "".join(pieces)
        wrong += "".join(pieces) != want or cut
    return wrong


@pytest.mark.parametrize("tokenizer", [byte_fallback, byte_level, words])
def test_the_stream_is_one_decode_of_all_tokens(tokenizer):
    """Kills: decoding from a few last tokens of the prompt, giving up after some held tokens."""
    assert stream_differences(tokenizer(), 400) == 0


def test_the_stream_of_the_real_model_is_one_decode_of_all_tokens(real):     # noqa: F811
    """And a token is printed as soon as it comes, if it completes its character."""
    _, tokenizer, prompt = real
    assert stream_differences(tokenizer.fast, 400) == 0
    stream = Stream(tokenizer, prompt[0].tolist())
    pieces = [stream.step(token) for token in tokenizer.encode(" a big dog", special=False)]
    assert "".join(pieces) == " a big dog" and all(pieces)


def test_a_run_of_bytes_is_printed_when_another_token_ends_it():
    """An invalid byte makes the whole run replacement characters, so no part of it is final."""
    fast = byte_fallback()
    a, emoji = fast.token_to_id("a"), fast.encode("🙂", add_special_tokens=False).ids[1:]
    stream = Stream(Wrapped(fast), fast.encode("w").ids)
    assert [stream.step(i) for i in [*emoji, a, a]] == ["", "", "", "", "🙂a", "a"]
    invalid = Stream(Wrapped(fast), fast.encode("w").ids)
    assert [invalid.step(i) for i in [*emoji, emoji[0], a]][-1] == "\ufffd" * 5 + "a"


def test_a_character_of_several_tokens_is_printed_with_its_last_one():
    """Byte-level tokens decode one by one. Kills: waiting until a token is a whole character."""
    fast = byte_level()
    stream = Stream(Wrapped(fast), fast.encode("a").ids)
    pieces = [stream.step(i) for i in fast.encode("ሀ🙂é").ids]
    assert pieces == ["", "ሀ", "", "", "", "🙂", "", "é"]


def test_special_tokens_and_tokens_without_a_name_print_nothing():
    fast = byte_fallback()
    a, bos = fast.token_to_id("a"), fast.token_to_id("<s>")
    stream = Stream(Wrapped(fast), [bos, fast.token_to_id("▁w")])
    assert [stream.step(i) for i in (bos, a, 10**6, a)] == ["", "a", "", "a"]
    assert stream.rest() == ""


# BOS, end tokens, and settings of the tokenizer ---------------------------------------------------

BOS = {"post_processor": {
    "type": "TemplateProcessing",
    "special_tokens": {"w1": {"id": "w1", "ids": [1], "tokens": ["w1"]}},
    "single": [{"SpecialToken": {"id": "w1", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}}


@pytest.mark.parametrize("tokenizer, wanted, ids", [
    (BOS, None, [1, 5]), (BOS, True, [1, 5]), (BOS, False, [5]),
    ({}, None, [5]), ({}, True, [1, 5]), ({}, False, [5])])
def test_a_text_has_one_bos_exactly_if_the_tokenizer_adds_it(tokenizer, wanted, ids, tmp_path):
    """tokenizer.json adds BOS or not; add_bos_token, if given, overrides it. A chat never has it.

    Kills: BOS doubled, missing, or added to a rendered chat template, which contains its own.
    """
    options = {} if wanted is None else {"add_bos_token": wanted}
    for bos in ("w1", {"content": "w1"}):
        t = open_tokenizer(tmp_path, tokenizer, bos_token=bos, **options,
                           chat_template="{{ bos_token }} {{ messages[0]['content'] }}")
        assert t.encode("w5") == ids and t.encode("w5", special=False) == [5]
        assert t.chat("w5") == [1, 5]
    assert t.encode("w1 w5") == ([1, 1, 5] if len(ids) == 2 else [1, 5])


def test_all_named_end_tokens_end_the_text_and_impossible_ones_are_ignored(tmp_path):
    """config.json has 2, the others name 5, 7 and 9; 61 is beyond the vocabulary."""
    write_checkpoint(tmp_path, RAW)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7, 61, -1, true, 1e3]}')
    assert open_tokenizer(tmp_path, eos_token_id=9).ends == {2, 5, 7, 9}


def test_truncation_and_padding_in_tokenizer_json_are_ignored(tmp_path):
    """They are settings of training."""
    t = open_tokenizer(tmp_path, {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "w0"}})
    assert t.encode("w1 w2 w3") == [1, 2, 3] and t.encode("w1") == [1]


def test_a_closed_standard_error_does_not_stop_the_tokenizer(tmp_path):
    """2>&- closes the file descriptor to which a panic of the library would write."""
    folder = write_checkpoint(tmp_path, RAW)
    program = ("import os, sys\nos.close(2)\nimport model\nfrom runtime.text import Tokenizer\n"
               f"t = Tokenizer({str(folder)!r}, model.read_config({str(folder)!r}))\n"
               "print(t.encode('w5'))")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[5]\n")


# Chat templates ----------------------------------------------------------------------------------

LOOP = "{% for m in messages %}w3 {{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template, want", [
    (LOOP + "{% if add_generation_prompt %} w4{% endif %}", [3, 9, 4]),
    ([{"name": "tool_use", "template": "w1"}, {"name": "default", "template": "w2"}], [2]),
    ([{"name": "tool_use", "template": "w1"}], "no chat template"),
    (3, "no chat template"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ self.__init__.__globals__ }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ raise_exception('no') }}", "rendered: ValueError: no"),
    ("{% include 'x' %}", "no loader"),
    ("{{", "TemplateSyntaxError"),
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ("{{ 'w' * 10**10 }}", "MemoryError"),
    ("{{ 'w' * 2**21 }}", "a million characters"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "more than 2 s or 1 GiB"),
])
def test_chat_templates_cannot_reach_python_nor_run_for_long(template, want, tmp_path):
    t = open_tokenizer(tmp_path, chat_template=template)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime              # CPU time
    if isinstance(want, list):
        assert t.chat("w9") == want
    else:
        with pytest.raises(model.UserError, match=want):
            t.chat("w9")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 4


def test_chat_template_jinja_takes_precedence(tmp_path):
    t = open_tokenizer(tmp_path, chat_template="w1")
    assert t.chat("w9") == [1]
    (tmp_path / "chat_template.jinja").write_text("w2")
    assert t.chat("w9") == [2]


SPECIAL = {"bos_token": "w1", "eos_token": {"__type": "AddedToken", "content": "w2"},
           "unk_token": "w3", "pad_token": "w4"}
TEMPLATES = {
    "special tokens": "{{ bos_token }} {{ eos_token }} {{ unk_token }} {{ pad_token }}",
    "undefined tokens": "{% if cls_token is defined %}w7{% else %}w8{% endif %}",
    "no tools": "{% if tools is none and documents is none %}w5{% else %}w6{% endif %}",
    "generation": "{% for m in messages %}{% generation %}w8 {{ m.content }}{% endgeneration %}"
                  "{% endfor %}",
    "scope of generation": "{% set x = 'w5' %}{% generation %}{% set x = 'w6' %}{% endgeneration %}"
                           "{{ x }}",
    "break": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %} w{{ i }}{% endfor %}",
    "continue": "{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %} w{{ i }}"
                "{% endfor %}",
    "tojson": "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1, sort_keys=true) }}",
    "tojson escaped": "{{ 'é' | tojson(ensure_ascii=true) }}",
    "blocks": "  {% if true %}\n  w1\n  {% endif %}\nw2\n",
    "namespace": "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = 5 %}{% endfor %}"
                 "w{{ n.x }}",
}
RENDERED = {
    "special tokens": "w1 w2 w3 w4", "undefined tokens": "w8", "no tools": "w5",
    "generation": "w8 w9", "scope of generation": "w5", "break": " w0 w1 w2",
    "continue": " w0 w1 w3", "tojson": '{\n "a": [\n  1\n ],\n "b": "<é>"\n}',
    "tojson escaped": '"\\u00e9"', "blocks": "  w1\nw2", "namespace": "w5",
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Each template as Tokenizer.chat renders it; the tokenizer is replaced by the identity."""
    folder = tmp_path_factory.mktemp("templates")
    texts = {}
    for name, template in TEMPLATES.items():
        t = open_tokenizer(folder, chat_template=template, **SPECIAL)
        t.encode = lambda text, special: text
        texts[name] = t.chat("w9")
    return texts


def test_chat_templates_are_rendered_as_expected(rendered):
    assert rendered == RENDERED


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_chat_templates_are_rendered_as_transformers_renders_them(rendered, tmp_path):
    from transformers import PreTrainedTokenizerFast
    for name, template in TEMPLATES.items():
        open_tokenizer(tmp_path, chat_template=template, **SPECIAL)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        message = [{"role": "user", "content": "w9"}]
        want = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert rendered[name] == want, name
