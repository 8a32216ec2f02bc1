"""The two things that a benchmark asks of a model, under any cache: how likely a continuation is,
and how the text goes on.

    continuation_scores    multiple choice, perplexity: ln p(continuation | context), many at once
    continue_until         free answers: greedy text up to a stop string

`make_caches(capacity, B)` gives one empty cache a layer. lm_eval_adapter.py puts the harness on
top; nothing here needs it, so the tests can compare with one sequence at a time.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lorc                                                        # noqa: E402
from runtime import jobs as running

TOKENS = 2**14        # in one batch, padding included
ROWS = 2**10          # of logits at a time: V numbers each


def batches(sequences, budget=TOKENS):
    """Split sequences, longest first, so that the longest times the number of each part is at most
    `budget` (one sequence may be longer)."""
    part = []
    for x in sorted(sequences, key=len, reverse=True):
        if part and (len(part) + 1) * len(part[0]) > budget:
            yield part
            part = []
        part.append(x)
    if part:
        yield part


def padded(sequences, device):
    """Token ids (B, T) with zeros on the right, which causal attention never sees."""
    tensors = [torch.tensor(x) for x in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def log_probabilities(llama, hidden, targets):
    """ln p of each target token and whether it is the likeliest: hidden (N, D), targets (N,)."""
    found, best = [], []
    for h, y in zip(hidden.split(ROWS), targets.split(ROWS)):
        logits = running.finite(llama.head(h)).float()
        found.append(logits.log_softmax(-1).gather(-1, y[:, None])[:, 0])
        best.append(logits.argmax(-1) == y)
    return torch.cat(found).double(), torch.cat(best)


def continuation_scores(llama, pairs, make_caches, budget=TOKENS):
    """[(ln p(continuation | context), whether it is what greedy decoding says)] for token ids.

    The model reads context + continuation without its last token, cut on the left to the model's
    context. Continuations of one token share their context's pass (BoolQ's "no" and "yes"), and
    texts of similar length share a batch. Raises UserError when the model overflows.
    """
    limit, device = llama.config.context, llama.embed.weight.device
    asked = {}                                       # what the model reads -> who asked for it
    for i, (context, continuation) in enumerate(pairs):
        assert context and 0 < len(continuation) <= limit
        asked.setdefault(tuple((context + continuation)[-limit - 1:-1]), []).append(i)
    answers = [None] * len(pairs)
    bar = lorc.tqdm(total=len(asked), desc="scoring", unit=" texts", leave=False, disable=None)
    for texts in batches(asked, budget):
        h = llama.hidden(padded(texts, device), make_caches(len(texts[0]), len(texts)))
        who = [(row, i) for row, text in enumerate(texts) for i in asked[text]]
        sizes = [len(pairs[i][1]) for _, i in who]
        rows = [h[row, len(texts[row]) - n:len(texts[row])] for (row, _), n in zip(who, sizes)]
        targets = torch.tensor([y for _, i in who for y in pairs[i][1]], device=device)
        nats, best = log_probabilities(llama, torch.cat(rows), targets)
        for (_, i), p, b in zip(who, nats.split(sizes), best.split(sizes)):
            answers[i] = p.sum().item(), b.all().item()
        bar.update(len(texts))
    bar.close()
    return answers


def continue_until(llama, tokenizer, prompt, make_caches, n, stops=()):
    """Greedy text after the token ids `prompt`: up to a stop string, an end token, or n tokens.

    The text ends before the first stop string. A prompt that leaves no room for n tokens is cut on
    the left.
    """
    n = min(n, llama.config.context)
    prompt = prompt[-max(1, llama.config.context - n):]
    caches, out, text = make_caches(len(prompt) + n - 1, 1), [], ""
    start = torch.tensor([prompt], device=llama.embed.weight.device)
    for new in lorc.generate(llama, caches, start, n, tokenizer.ends):
        token = new.item()
        out += [token] * (token not in tokenizer.ends)
        text = tokenizer.fast.decode(out)
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text
