"""The perplexity of a text under any cache."""
import torch.nn.functional as F
from tqdm import tqdm


def negative_log_likelihood(llama, tokens, context, make_caches):
    """Sum of -ln p in nats, and the number of predicted tokens, over windows of `context` tokens.

    tokens (N,). Each window predicts all of its tokens but the first. make_caches(T) returns empty
    caches for a window of T tokens. exp(nats / count) is the perplexity.
    """
    nats = count = 0
    for x in tqdm(tokens.split(context), "scoring", unit=" windows", leave=False, disable=None):
        h = llama.hidden(x[None], make_caches(len(x)))[0]
        for h, y in zip(h[:-1].split(256), x[1:].split(256)):
            nats += F.cross_entropy(llama.head(h).float(), y, reduction="sum").item()
        count += len(x) - 1
    return nats, count
