"""How tiny/ was made: a small LLaMA trained from scratch on stories that a larger one tells.

    python experiments/train_tiny.py --teacher stories15M --out tiny
    python experiments/train_tiny.py --score tiny FILE

Reading order, which is the order of events:
    TINY, Recipe      every number that matters
    sample            the teacher tells stories, many streams at once
    learn_tokens      a byte-level BPE vocabulary from some of them
    encode            all of them in that vocabulary, one long row of tokens
    train             model.py's own Llama, next-token loss
    teach_bytes       a place in the vocabulary for the bytes that no story has
    export            a Hugging Face folder that model.py and transformers read
    bits_per_byte     the figures in the model card, for any folder and any file of stories

Every stage leaves a file in --work and is skipped when it is there; training goes on from its
last checkpoint. So a run that was cut short, or that --minutes stopped, is continued by the same
command. With --smoke all of it runs in miniature on a CPU, in a minute or two, and the model talks
nonsense.

One H200 GPU took 559 s for tiny/: 192 s until the teacher had told 168 million tokens, 37 s for the
vocabulary and for encoding, 330 s for the 19,500 steps. `teach_bytes` came later, on one CPU core,
in 4 minutes, with 159 other stories of the teacher's.
"""
import argparse
import json
import math
import os
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cache import FullCache                                        # noqa: E402
from model import Config, Llama, hf_name, load                     # noqa: E402
from runtime.text import Tokenizer                                 # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END = "<|endoftext|>"                 # id 0; between stories, so that it both begins and ends one

TINY = Config(vocab=3072, width=192, layers=8, heads=6, kv_heads=3, head_dim=32, mlp=512,
              context=512, eps=1e-5, tied=True, rope={"type": "default", "theta": 10000.0})


@dataclass(frozen=True)
class Recipe:
    """The numbers of one run; those below made tiny/."""

    model: Config = TINY
    seed: int = 0
    # what the teacher tells
    shards: int = 5                   # files of stories
    streams: int = 16384              # told at once, per shard
    length: int = 2048                # tokens per stream
    keep: int = 192                   # of the teacher's context, when it is full
    temperature: float = 0.9
    spelled: int = 8192               # streams that the vocabulary is learned from
    # what the student makes of it
    steps: int = 19500
    batch: int = 128                  # windows of model.context tokens per step
    lr: float = 3e-3                  # after the warm-up; then straight down to zero
    warmup: int = 500
    decay: float = 0.1                # of the matrices' weights
    save_every: int = 500
    # the bytes that no story has
    read: int = 16                    # streams, whose stories are spoiled
    byte_steps: int = 150
    byte_batch: int = 2
    byte_lr: float = 0.03             # from the beginning straight down to zero
    spoiled: float = 0.001            # weight of spoiled stories beside whole ones


SMOKE = Recipe(model=replace(TINY, vocab=512, width=48, layers=2, heads=3, head_dim=16),
               shards=2, streams=8, length=600, spelled=8, read=8, steps=40, batch=4, warmup=10,
               save_every=20, byte_steps=10)


def say(*words):
    """A line of progress, with the seconds since the start."""
    print(f"{time.perf_counter() - START:6.0f} s ", *words, flush=True)


def fast(function):
    """The function compiled where that pays, on a GPU."""
    return torch.compile(function, dynamic=False) if DEVICE == "cuda" else function


def once(path: Path, make) -> np.ndarray:
    """The array in a file; made, and written in one piece, when there is no such file."""
    if not path.exists():
        np.save(path.with_suffix(".part.npy"), make())
        path.with_suffix(".part.npy").rename(path)
    return np.load(path)


# The teacher tells stories -----------------------------------------------------------------------

def draw(logits, temperature):
    """One token per row of logits (B, V), from softmax(logits / temperature): the Gumbel trick."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    return (logits / temperature - noise).argmax(-1, keepdim=True)


@torch.inference_mode()
def sample(teacher: Llama, bos: int, r: Recipe, shard: int) -> np.ndarray:
    """Streams of stories, (streams, length) int16, each story behind a BOS.

    The teacher saw chunks of an endless row of stories, so it may go on and on: when its context is
    full, the last `keep` tokens become the beginning of a new one.
    """
    torch.manual_seed(r.seed + shard)
    c, (B, N) = teacher.config, (r.streams, teacher.config.context)
    dtype, pick = teacher.embed.weight.dtype, fast(draw)
    caches = [FullCache(B, N, c.kv_heads, c.head_dim, dtype, DEVICE) for _ in range(c.layers)]
    told = torch.full((B, 1), bos, device=DEVICE)
    for n in range(1, r.length):
        if n == 1 or caches[0].length == N - 1:                 # begin, or begin anew
            for cache in caches:
                cache.length = 0
            x = told[:, -r.keep:]
        logits = teacher.head(teacher.hidden(x, caches)[:, -1])
        x = pick(logits, r.temperature)
        told = torch.cat((told, x), 1)
    say(f"shard {shard}: {told.numel():,} tokens")
    return told.to("cpu", torch.int16).numpy()


def stories(streams: np.ndarray, bos: int, theirs: str) -> list[str]:
    """The whole stories in some streams, those that are plain ASCII and end as a sentence does."""
    tokenizer = FastTokenizer.from_file(theirs)
    texts = []
    for stream in streams:
        parts = np.split(stream, np.flatnonzero(stream == bos))[1:-1]     # the last is cut off
        texts += tokenizer.decode_batch([part.tolist() for part in parts])
    return [t for t in map(str.strip, texts) if t.isascii() and t.endswith((".", "!", "?", '"'))]


# The student's own vocabulary --------------------------------------------------------------------

def learn_tokens(texts: list[str], vocab: int) -> FastTokenizer:
    """A byte-level BPE vocabulary, in which every text begins with END."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)])
    return tokenizer


def transcode(streams: np.ndarray, bos: int, theirs: str, ours: str) -> np.ndarray:
    """Streams of the teacher's tokens -> their whole stories in the student's tokens, one row."""
    tokenizer = FastTokenizer.from_file(ours)
    encoded = tokenizer.encode_batch_fast(stories(streams, bos, theirs))
    return np.concatenate([np.array(e.ids, np.int16) for e in encoded] or [np.empty(0, np.int16)])


def one_thread():
    """For a worker among as many as there are cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode(shards: list[np.ndarray], bos: int, theirs: str, out: Path, r: Recipe) -> np.ndarray:
    """All stories in the student's tokens, END before each; leaves tokenizer.json in `out`."""
    ours, chunk = str(out / "tokenizer.json"), max(1, r.streams // 64)
    chunks = [shard[i:i + chunk] for shard in shards for i in range(0, r.streams, chunk)]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=one_thread) as pool:
        read = partial(stories, bos=bos, theirs=theirs)
        texts = sum(pool.map(read, chunks[:r.spelled // chunk]), [])
        say(f"{len(texts):,} stories to learn a vocabulary from")
        learn_tokens(texts, r.model.vocab).save(ours, pretty=False)
        rows = pool.map(partial(transcode, bos=bos, theirs=theirs, ours=ours), chunks)
        tokens = np.concatenate(list(rows))
    say(f"{len(tokens):,} tokens of {int((tokens == 0).sum()):,} stories")
    return tokens


# Training ----------------------------------------------------------------------------------------

class Causal:
    """A cache for whole texts, which keeps nothing: each token attends to those before it."""

    def __init__(self, capacity: int):
        self.capacity = capacity

    def attend(self, q, k, v, rope):
        here = slice(0, q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (rope(q, here), rope(k, here), v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)


def fresh(config: Config) -> Llama:
    """A Llama with small random weights; what adds to the residual stream begins smaller still."""
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            last = name.endswith(("Wo.weight", "down.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if last else 0.02)
    return model.to(DEVICE)


def start(r: Recipe, checkpoint: Path):
    """(model, optimizer, steps done): from the checkpoint, or fresh."""
    torch.manual_seed(r.seed)
    model = fresh(r.model)
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == matrix],
               "weight_decay": r.decay * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=DEVICE == "cuda")
    if not checkpoint.exists():
        return model, optimizer, 0
    saved = torch.load(checkpoint, map_location=DEVICE)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, saved["step"]


def save(model: Llama, optimizer, done: int, checkpoint: Path) -> None:
    """A checkpoint that `start` goes on from; the old one stays until the new one is complete."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
    torch.save(state, checkpoint.with_suffix(".part"))
    checkpoint.with_suffix(".part").rename(checkpoint)


def windows_at(step: int, tokens: torch.Tensor, r: Recipe) -> torch.Tensor:
    """The windows of one step, (batch, context + 1), from anywhere in the row of tokens."""
    T, draws = r.model.context, torch.Generator(DEVICE).manual_seed(r.seed + step)
    begins = torch.randint(len(tokens) - T, (r.batch, 1), generator=draws, device=DEVICE)
    return tokens[begins + torch.arange(T + 1, device=DEVICE)].long()


def train(tokens: torch.Tensor, r: Recipe, work: Path, deadline: float) -> Llama:
    """Next-token training, from the last checkpoint on. Ends the program at the deadline."""
    model, optimizer, done = start(r, work / "checkpoint.pt")
    caches, losses, late = [Causal(r.model.context)] * r.model.layers, [], False
    model.rope.reserve(r.model.context, model.embed.weight)     # before compiled code looks for it

    @fast
    def loss_of(windows):
        logits = model(windows[:, :-1], caches)
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    while done < r.steps:
        for group in optimizer.param_groups:
            rise, fall = (done + 1) / r.warmup, (r.steps - done) / (r.steps - r.warmup)
            group["lr"] = r.lr * min(rise, fall)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(windows_at(done, tokens, r))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        done, late = done + 1, time.perf_counter() - START > deadline
        if done % r.save_every == 0 or late:
            say(f"step {done} of {r.steps}: loss {torch.stack(losses).mean():.4f}")
            losses.clear()
            save(model, optimizer, done, work / "checkpoint.pt")
        if late:
            sys.exit("out of time; the same command goes on from here")
    return model


# Bytes that no story has -------------------------------------------------------------------------

def spoil(text: str, draws: random.Random) -> str:
    """The text with one to four characters from all over Unicode after one word in twenty."""
    words = text.split(" ")
    for i in range(len(words)):
        if draws.random() < 0.05:
            n = draws.randint(1, 4)
            words[i] += "".join(chr(int(2 ** draws.uniform(7, 20))) for _ in range(n))
    return " ".join(words).encode(errors="ignore").decode()     # surrogates are no characters


def teach_bytes(model: Llama, tokenizer: FastTokenizer, texts: list[str], new, r: Recipe) -> None:
    """Trains the embeddings of the tokens `new`, which no story has, and nothing else.

    Until now they have only been pushed away, so far that each byte outside of ASCII costs 30 bits.
    The weight of the spoiled stories is small, or the model would tell spoiled stories.
    """
    draws, caches = random.Random(r.seed), [Causal(r.model.context)] * r.model.layers
    small, E = replace(r, batch=r.byte_batch), model.embed.weight.detach()
    both = [[t for text in texts for t in tokenizer.encode(f(text)).ids]
            for f in (str, lambda text: spoil(text, draws))]
    both = [torch.tensor(tokens, device=DEVICE) for tokens in both]
    new = torch.as_tensor(new, device=DEVICE)
    rows = torch.nn.Parameter(E[new] / 2)
    optimizer = torch.optim.Adam([rows], r.byte_lr)
    for step in range(r.byte_steps):
        optimizer.param_groups[0]["lr"] = r.byte_lr * (1 - step / r.byte_steps)
        loss = []
        for tokens in both:
            windows = windows_at(step, tokens, small)
            swapped = {"embed.weight": E.index_copy(0, new, rows)}      # and with it the tied head
            logits = torch.func.functional_call(model, swapped, (windows[:, :-1], caches))
            loss.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        (loss[0] + r.spoiled * loss[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            say(f"bytes, step {step + 1}: loss {loss[0]:.4f}, of spoiled stories {loss[1]:.4f}")
    E[new] = rows.detach()


# The result --------------------------------------------------------------------------------------

def export(model: Llama, out: Path) -> None:
    """The student as a Hugging Face folder, in bfloat16."""
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": c.vocab, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.mlp, "hidden_act": "silu", "rms_norm_eps": c.eps,
        "max_position_embeddings": c.context, "rope_theta": c.rope["theta"],
        "tie_word_embeddings": c.tied, "bos_token_id": 0, "eos_token_id": 0}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END,
                                  "eos_token": END, "model_max_length": c.context}}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {hf_name(n): p.detach().to("cpu", torch.bfloat16)
               for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})


# Measuring ---------------------------------------------------------------------------------------

@torch.inference_mode()
def bits_per_byte(folder, texts: list[str], window: int = 256) -> float:
    """The bits a model in float32 needs per byte of some texts (UTF-8).

    Each text is tokenized whole, with BOS where the tokenizer adds one, and cut into windows. Each
    predicts all its tokens but the first, from the earlier ones in it; their bytes are counted.
    """
    model = load(folder, torch.float32, DEVICE)
    tokenizer, caches = Tokenizer(folder, model.config), [Causal(window)] * model.config.layers
    nats = size = 0
    for tokens in [w for t in texts for w in torch.tensor(tokenizer.encode(t)).split(window)]:
        logits = model(tokens[None].to(DEVICE), caches)[0, :-1]
        nats += F.cross_entropy(logits, tokens[1:].to(DEVICE), reduction="sum").item()
        whole, first = (tokenizer.fast.decode(t.tolist()).encode() for t in (tokens, tokens[:1]))
        size += len(whole) - len(first)
    return nats / math.log(2) / size


def score(folder, file) -> None:
    """Prints the bits per byte of a file of stories, with one line break between two of them."""
    text = Path(file).read_text(encoding="utf-8")
    told = re.split(r"(?<!\n)\n(?!\n)", text)
    for name, texts in {"as one text": [text], "story by story": told,
                        "story by story, ASCII": [t for t in told if t.isascii()]}.items():
        print(f"{bits_per_byte(folder, texts):.4f} bits per byte {name}")


def make(teacher: Path, out: Path, work: Path, minutes: float, r: Recipe) -> None:
    """All stages, in order."""
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    theirs = str(teacher / "tokenizer.json")
    llama = load(teacher, torch.bfloat16 if DEVICE == "cuda" else torch.float32, DEVICE)
    bos = Tokenizer(teacher, llama.config).encode("")[0]
    shards = [once(work / f"stories{s}.npy", partial(sample, llama, bos, r, s))
              for s in range(r.shards)]
    tokens = once(work / "tokens.npy", partial(encode, shards, bos, theirs, out, r))
    model = train(torch.from_numpy(tokens).to(DEVICE), r, work, 60 * minutes)
    new = np.flatnonzero(np.bincount(tokens, minlength=r.model.vocab) == 0)
    tokenizer = FastTokenizer.from_file(str(out / "tokenizer.json"))
    teach_bytes(model, tokenizer, stories(shards[0][:r.read], bos, theirs), new, r)
    export(model, out)
    say("done")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, help="Folder of the model that tells the stories.")
    parser.add_argument("--out", type=Path, help="Folder for the trained model.")
    parser.add_argument("--work", type=Path, default="work", help="Folder to resume from.")
    parser.add_argument("--minutes", type=float, default=60, help="Save and stop after so long.")
    parser.add_argument("--smoke", action="store_true", help="Run in miniature.")
    parser.add_argument("--score", nargs=2, metavar=("DIR", "FILE"),
                        help="Only print the bits per byte of a model on a text.")
    args = parser.parse_args()
    if args.score:
        score(*args.score)
    elif args.teacher and args.out:
        make(args.teacher, args.out, args.work, args.minutes, SMOKE if args.smoke else Recipe())
    else:
        parser.error("give --teacher and --out, or --score")


START = time.perf_counter()
if __name__ == "__main__":
    main()
