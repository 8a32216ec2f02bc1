"""What a cache changes, measured: errors of keys and values, perplexity, and the KL divergence.

The divergence is that of the next-token distribution under a cache from the one under the full
cache, for the same text, in nats per token: sum over tokens of p_full (ln p_full - ln p_cache).
"""
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import UserError

CHUNK = 128                # positions whose logits are computed together


def finite(x, dtype=None):
    """Return x. Raises UserError if the model has overflowed its dtype, by default that of x."""
    if not torch.isfinite(x).all():
        name = str(dtype or x.dtype).removeprefix("torch.")
        raise UserError(f"the model overflows in {name}; give another --dtype")
    return x


@contextmanager
def observe_projections(llama, observe):
    """Within the context, observe(layer, "k" or "v", x, y) is called for each y = W x of Wk, Wv."""
    def hook(layer, name):
        return lambda module, inputs, y: observe(layer, name, inputs[0], y)
    hooks = [W.register_forward_hook(hook(i, name)) for i, layer in enumerate(llama.layers)
             for name, W in (("k", layer.attn.Wk), ("v", layer.attn.Wv))]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class ErrorMeter:
    """Accumulates ||k - k~|| / ||k|| and ||v - v~|| / ||v|| of each layer over all tokens seen."""

    def __init__(self, llama, bases):
        self.llama, self.bases = llama, bases
        # Sums of squares: of keys and values, of the errors and of the vectors themselves.
        self.squares = torch.zeros(len(bases), 2, 2, dtype=torch.float64)

    def add(self, layer, which, x, y):
        """Add the keys (which = "k") or values y = W x of one layer."""
        if self.bases[layer] is None:
            return
        part = "kv".index(which)
        basis = self.bases[layer][part]
        error = y - F.linear(F.linear(y, basis.down), basis.up)
        self.squares[layer, part, 0] += error.double().square().sum().cpu()
        self.squares[layer, part, 1] += y.double().square().sum().cpu()

    @contextmanager
    def observe(self):
        """Count the keys and values that the model computes inside this context."""
        with observe_projections(self.llama, self.add):
            yield

    def errors(self):
        """[error of keys, error of values] of each layer. Raises UserError after an overflow."""
        squares = finite(self.squares, self.llama.norm.weight.dtype)
        return (squares[..., 0] / squares[..., 1].clamp(min=1e-30)).sqrt().tolist()


@dataclass
class Score:
    """A text under one cache. Sums are over `count` predicted tokens, in nats."""

    caches: list                # those of the first window, which is the longest
    negative_log_likelihood: float = 0.0
    divergence: float = 0.0     # from the full cache
    count: int = 0
    seconds: float = 0.0
    memory: int = 0             # peak bytes on the GPU


def score_text(llama, tokens, context, kinds, new_caches, meters):
    """{kind: Score} of the text `tokens` (T,), which is cut into windows of `context` tokens.

    Each window predicts all of its tokens but the first. kinds: "full" first, then other kinds of
    cache; new_caches(kind, capacity) makes empty caches that simulate decoding; meters:
    {kind: ErrorMeter}, for the kinds that have one. Every window is computed once per kind.
    """
    scores = {}
    windows = tokens.split(context)
    for x in tqdm(windows, "scoring", unit=" windows", leave=False, delay=5, mininterval=5):
        hidden = {}
        for kind in kinds:
            caches = new_caches(kind, len(x))
            score = scores.setdefault(kind, Score(caches))
            with timed(score, x.is_cuda):
                if kind in meters:
                    with meters[kind].observe():
                        hidden[kind] = llama.hidden(x[None], caches)[0]
                else:
                    hidden[kind] = llama.hidden(x[None], caches)[0]
        add_window(llama, x, hidden, scores)
    for score in scores.values():
        sums = torch.tensor([score.negative_log_likelihood, score.divergence])
        finite(sums, llama.norm.weight.dtype)
    return scores


@contextmanager
def timed(score, on_gpu):
    """Add the seconds that pass inside this context, and the peak of memory, to `score`."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize()
        score.memory = max(score.memory, torch.cuda.max_memory_allocated())
    score.seconds += time.perf_counter() - start


def add_window(llama, x, hidden, scores):
    """Add the window x (T,), with its hidden states {kind: (T, D)}, to the scores."""
    for start in range(0, len(x) - 1, CHUNK):
        stop = min(start + CHUNK, len(x) - 1)
        full = None
        for kind, h in hidden.items():
            score = scores[kind]
            with timed(score, x.is_cuda):
                log_p = llama.head(h[start:stop]).float().log_softmax(-1)            # (chunk, V)
                nats = F.nll_loss(log_p, x[start + 1:stop + 1], reduction="sum")
                score.negative_log_likelihood += nats.item()
                score.count += stop - start
            full = log_p if full is None else full
            kl = F.kl_div(log_p, full, log_target=True, reduction="sum")
            score.divergence += kl.item()



def negative_log_likelihood(llama, tokens, context, make_caches):
    """Sum of -ln p in nats, and the number of predicted tokens, over windows of `context` tokens.

    tokens (N,). Each window predicts all of its tokens but the first. make_caches(T) returns empty
    caches for a window of T tokens. exp(nats / count) is the perplexity.
    """
    scores = score_text(llama, tokens, context, ["any"], lambda kind, T: make_caches(T), {})
    return scores["any"].negative_log_likelihood, scores["any"].count
