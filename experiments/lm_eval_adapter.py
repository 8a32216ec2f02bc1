"""lm-evaluation-harness: this project's model, with any cache, as an lm-eval `LM`.

    lm = CachedLM(llama, tokenizer, "bibranch", bases, sinks=4, window=32)
    lm_eval.simple_evaluate(lm, tasks=["openbookqa"])

What a bi-branch cache computes depends on which tokens arrive together [E34]:

    loglikelihood, loglikelihood_rolling    Texts are scored as in decoding (`simulate_decoding`):
        every query reads the keys and values that it would read if the tokens came one by one.
    generate_until                          CSKV's own rule: the tokens of the prompt see each other
        exactly and are then stored compressed. New tokens read them as they are stored.

A full and a compressed cache compute the same function in both cases.

lm-eval's own `hf` backend runs with transformers_cache.LowRankCache too and gives the same answers
for the other caches and for `generate_until`. It cannot replace this adapter, because it scores a
question and its answer in one forward pass. CSKV's rule lets all tokens of one pass see each other
exactly, so a bi-branch cache would be given the scores of the full cache. A transformers cache
cannot simulate decoding, since it returns one set of keys for all queries.
test_transformers_cache.py tests these statements.

Needs lm_eval (see requirements.txt here). scoring.py does the computing.
"""
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import lorc
from model import UserError
from scoring import continuation_scores, continue_until

MAX_NEW_TOKENS = 256     # lm-eval's own default where a task does not say


class CachedLM(TemplateLM):
    """A Llama, its tokenizer, and what `lorc.new_caches` needs, as the harness wants them.

    TemplateLM turns texts into tokens, as it does for lm-eval's `hf`: spaces at the end of a
    context go to the continuation, and an empty context is the BOS token, or the end token.
    """

    def __init__(self, llama, tokenizer, kind, bases=None, **bibranch):
        super().__init__()
        self.llama, self.text = llama, tokenizer
        self.kind, self.bases, self.bibranch = kind, bases, bibranch

    def new_caches(self, capacity, B, **options):
        options = self.bibranch | options if self.kind == "bibranch" else {}
        return lorc.new_caches(self.llama, self.kind, capacity, self.bases, B, **options)

    def special_id(self, name):
        """The id of the special token `name`, None if the tokenizer has none."""
        return self.text.fast.token_to_id(self.text.special_tokens().get(name, ""))

    @property
    def eot_token_id(self):
        end = self.special_id("eos_token")
        return min(self.text.ends) if end is None else end

    @property
    def prefix_token_id(self):
        bos = self.special_id("bos_token")
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.text.special_tokens().get("bos_token")
        special = add_special_tokens is not False and not (bos and string.startswith(bos))
        return self.text.encode(string, special)

    def _loglikelihood_tokens(self, requests, **_):
        return continuation_scores(self.llama, [(context, y) for _, context, y in requests],
                                   lambda n, B: self.new_caches(n, B, simulate_decoding=True))

    def loglikelihood_rolling(self, requests, **_):
        pairs, count = [], []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]),
                                                self.prefix_token_id, self.llama.config.context, 1)
            count.append(len(new := [(None, *make_disjoint_window(w)) for w in windows]))
            pairs += new
        nats = iter(self._loglikelihood_tokens(pairs))
        return [sum(next(nats)[0] for _ in range(n)) for n in count]

    def generate_until(self, requests, **_):
        """Greedy answers, one at a time. A task that wants sampling is refused."""
        answers = []
        for request in lorc.tqdm(requests, "generating", unit=" texts", leave=False, disable=None):
            prompt, wish = request.args
            if wish.get("do_sample") or wish.get("temperature"):
                raise UserError("only greedy tasks are supported, and this one samples")
            stops = wish.get("until") or []
            answers.append(continue_until(
                self.llama, self.text, self.tok_encode(prompt), self.new_caches,
                wish.get("max_gen_toks", MAX_NEW_TOKENS), [stops] if type(stops) is str else stops))
        return answers
