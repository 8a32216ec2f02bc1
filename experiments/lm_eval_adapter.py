"""lm-evaluation-harness: this project's model, with any cache, as an lm-eval `LM`.

    lm = CachedLM(llama, tokenizer, "bibranch", bases, sinks=4, window=32)
    lm_eval.simple_evaluate(lm, tasks=["openbookqa"])

Which function of the text a bi-branch cache computes depends on how the text comes [E34]:

    loglikelihood, loglikelihood_rolling    the decode regime (`strict`): every query, from the
        first token on, sees exact keys and values of the sinks and of the last `window` tokens
        only, as if all tokens had been decoded one by one. CSKV's prefill rule lets a prompt attend
        exactly; under it the choices of a question would be scored by the full model.
    generate_until                          CSKV's own rule: the prompt attends exactly and is
        stored compressed; what is generated sees it as it is stored.

A full and a compressed cache compute one function both ways. Needs lm_eval (requirements.txt here
says which). The computing is in scoring.py.
"""
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import lorc
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
        self.new_caches = lambda capacity, B, strict: lorc.new_caches(
            llama, kind, capacity, bases, B, simulate_decoding=strict, **bibranch)

    @property
    def eot_token_id(self):
        end = self.text.fast.token_to_id(self.text.special("eos_token"))
        return min(self.text.ends) if end is None else end

    @property
    def prefix_token_id(self):
        bos = self.text.fast.token_to_id(self.text.special("bos_token"))
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.text.special("bos_token")
        special = add_special_tokens is not False and not (bos and string.startswith(bos))
        return self.text.encode(string, special)

    def _loglikelihood_tokens(self, requests, **_):
        return continuation_scores(self.llama, [(context, y) for _, context, y in requests],
                                   lambda n, B: self.new_caches(n, B, strict=True))

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
                raise lorc.model.UserError("only greedy tasks are run here, and this one samples")
            stops = wish.get("until") or []
            answers.append(continue_until(
                self.llama, self.text, self.tok_encode(prompt),
                lambda n, B: self.new_caches(n, B, strict=False),
                wish.get("max_gen_toks", MAX_NEW_TOKENS), [stops] if type(stops) is str else stops))
        return answers
