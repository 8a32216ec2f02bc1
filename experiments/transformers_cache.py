"""LoRC's and CSKV's caches as a `transformers.Cache`, for LLaMA and Mistral models.

    cache = LowRankCache.from_bases(model, "bases/")        # what `python lorc.py --save` wrote
    out = model.generate(**inputs, past_key_values=cache)
    print(cache.nbytes)

`LowRankCache.from_model(model, kept=0.6)` computes LoRC's bases from the weights instead. The
caches store what those of cache.py store: exact keys and values of the first `sinks` and the last
`window` tokens, and latents of the others, in the model's dtype or in 4 bits. A layer rebuilds its
keys and values in each forward pass, and they are freed after that layer's attention.

Two facts about transformers shape this file:

- A cache is given keys that are already rotated, and is not told their positions. A hook that runs
  before the decoder therefore reads the attention mask and the position ids of every forward pass
  (`announce`). Keys that leave the window are rotated back in float32 with the model's own cosines
  and sines, which undoes the rotation up to rounding.
- A batch is padded on the left, so its rows start in different columns. Rows that start in the same
  column are stored together, without the padding. Each row is then treated exactly as it would be
  in a batch of its own, with its own sinks and its own groups of 32 tokens in 4 bits.

The bi-branch cache follows CSKV's rule [E34]: the tokens of one forward pass attend to each other
exactly, and to earlier tokens as they are stored; a token that comes alone counts itself among the
last `window`.

Does NOT include: training, cropping (so no assisted decoding), offloading, static shapes (so no
compiled decoding), models on several devices.
"""
import copy
import inspect
import sys
import tempfile
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lorc                                                        # noqa: E402
import model as llama_model                                        # noqa: E402
from cache import GROUP, Buffers, Latents, QuantizedLatents        # noqa: E402
from runtime.saved_bases import load_bases                         # noqa: E402

ANOTHER_MODEL = "this LowRankCache was made for another model; make one from the model that runs"


# The model ---------------------------------------------------------------------------------------

def as_llama(hf):
    """A model.Llama that shares the weights of the transformers model `hf`.

    Raises ValueError for a model that model.py does not compute, such as one with a short sliding
    window.
    """
    kind = getattr(hf.config, "model_type", None)
    if kind not in ("llama", "mistral"):
        raise ValueError(f"LowRankCache serves LLaMA and Mistral models, and this is {kind!r}")
    if len({p.device for p in hf.parameters()}) > 1:
        raise ValueError("the model is spread over several devices; load it onto one")
    with tempfile.TemporaryDirectory() as folder:
        hf.config.to_json_file(Path(folder) / "config.json", use_diff=False)
        config = llama_model.read_config(folder)
    with torch.device("meta"):
        llama = llama_model.Llama(config)
    try:
        state = {name: hf.get_parameter(llama_model.hf_name(name)).detach()
                 for name, _ in llama.named_parameters()}
    except AttributeError as e:
        raise ValueError("LowRankCache serves LlamaForCausalLM and MistralForCausalLM, and this "
                         f"{type(hf).__name__} lacks a parameter: {e}") from None
    llama.load_state_dict(state, strict=False, assign=True)
    return llama.requires_grad_(False)


class ModelRope(llama_model.Rope):
    """model.Rope with the cosines and sines of a transformers model's own rotary embedding."""

    def __init__(self, rotary):
        self.rotary, self.cos, self.sin = rotary, torch.empty(0), torch.empty(0)

    def reserve(self, length, like):
        """Make the tables long enough for positions 0 .. length-1, with like's dtype and device.

        These do not change: a LowRankLayer refuses keys of another dtype or device.
        """
        if length > len(self.cos):
            positions = torch.arange(max(length, 2 * len(self.cos), 1024), device=like.device)
            cos, sin = (table[0, :, None] for table in self.rotary(like, positions[None]))
            half = cos.shape[-1] // 2
            self.cos, self.sin = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)

    def undo(self, x, positions):
        """The x that this rotation turned into the given one, computed in float32 or wider.

        cos^2 + sin^2 is not 1 where the tables are rounded to 16 bits, so it is divided out.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos[positions].to(wide), self.sin[positions].to(wide)
        back = torch.addcmul(x * cos, x.to(wide).roll(x.shape[-1] // 2, -1), sin, value=-1)
        return (back / (cos * cos + sin * sin)).to(x.dtype)


def announce(decoder, args, kwargs):
    """A hook before the decoder's forward pass: tells a LowRankCache which tokens are coming."""
    given = dict(zip(inspect.signature(decoder.forward).parameters, args)) | kwargs
    cache = given.get("cache", given.get("past_key_values"))
    if not isinstance(cache, LowRankCache):
        return
    if cache.decoder() is not decoder:
        raise ValueError(ANOTHER_MODEL)
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"][..., 0]
    cache.batch.expect(*tokens.shape, cache.get_seq_length(), given.get("attention_mask"),
                       given.get("position_ids"))


# The rows of a batch -----------------------------------------------------------------------------

class Batch:
    """Where each row of a padded batch starts, and which rows are stored together.

    `start` is the column of each row's first token, -1 before it has come, and `shift` its position
    minus that column. Rows with the same start and shift form a group: `groups` lists the rows of
    each group, `group` is each row's group, and `member` the row's index in it. `expected` is the
    shape of the forward pass that runs: rows, columns before it, columns in it.
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.expected, self.groups, self.start = None, [], None

    def expect(self, B, T, columns, mask=None, positions=None):
        """Tokens are coming in the next T columns.

        mask (B, columns + T) is 0 at padding; positions is (B, T) or (1, T). Raises ValueError
        unless padding is on the left and positions count up by one.
        """
        if self.start is None:
            self.start = torch.full((B,), -1)
            self.shift, self.group, self.member = torch.zeros(3, B, dtype=torch.int64)
        if len(self.start) != B:
            raise ValueError(f"this LowRankCache holds a batch of {len(self.start)} and was given "
                             f"{B} rows; call cache.reset() before another batch")
        column = columns + torch.arange(T)
        if mask is None:
            mask = torch.ones(B, columns + T)
        if mask.shape != (B, columns + T):
            raise ValueError(f"the attention mask has shape {tuple(mask.shape)}; LowRankCache "
                             f"needs a 0 or 1 for each token so far, {(B, columns + T)}")
        positions = column[None] if positions is None else positions.cpu()
        self.place(column, mask[:, columns:].cpu() != 0, positions.expand(B, T))
        self.expected = B, columns, T

    def place(self, column, real, positions):
        """Find the rows that start among these columns, and check all rows."""
        new = (self.start < 0) & real.any(1)
        first = real.int().argmax(1)[new]
        self.start[new] = column[first]
        self.shift[new] = positions[new, first] - column[first]
        keys = torch.stack((self.start, self.shift), 1)
        for key in keys[new].unique(dim=0):
            self.add((new & (keys == key).all(1)).nonzero()[:, 0])
        started = (self.start >= 0)[:, None] & (column >= self.start[:, None])
        if not torch.equal(started, real):
            raise ValueError("the attention mask hides tokens after a row's first; LowRankCache "
                             "needs padding on the left: tokenizer.padding_side = 'left'")
        if (started & (positions != column + self.shift[:, None])).any():
            raise ValueError("position_ids must count up by one along each row")

    def add(self, rows):
        """Make a group of these rows."""
        self.group[rows], self.member[rows] = len(self.groups), torch.arange(len(rows))
        self.groups.append(rows)

    def select(self, rows):
        """Become the batch of the given rows of this one: [(old group, rows in it)] by group."""
        group, member = self.group[rows], self.member[rows]
        self.start, self.shift = self.start[rows], self.shift[rows]
        self.group, self.member, self.groups = group.clone(), member.clone(), []
        chosen = []
        for old in group[self.start >= 0].unique():
            found = ((group == old) & (self.start >= 0)).nonzero()[:, 0]
            chosen.append((int(old), member[found]))
            self.add(found)
        return chosen


# What is stored ----------------------------------------------------------------------------------

def grow(store, tokens):
    """Give a store of latents room for `tokens` more: as much as lorc.new_caches gives its own."""
    need = store.length + tokens

    def longer(x, rows):                                     # (B, S, ...) -> (B, rows, ...)
        more = rows - x.shape[1]
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, more]) if more > 0 else x
    if isinstance(store, Latents):
        store.c = longer(store.c, -(-need // 8) * 8)
    else:
        groups = need // GROUP
        store.packed = longer(store.packed, groups * GROUP // 2)
        store.minimum = longer(store.minimum, groups)
        store.scale = longer(store.scale, groups)


class StoredRows(Buffers):
    """Keys and values of one group of rows in one layer.

    Sinks and window hold exact keys, rotated, and values. `c_k` and `c_v` hold the latents of the
    tokens between them. `position` is that of the rows' first token.
    """

    def __init__(self, pair, position, k, sinks, window, bits, exact_prompt):
        self.K, self.V = pair
        self.position, self.sinks, self.window = position, sinks, window
        self.exact_prompt, self.length = exact_prompt, 0
        self.sink_k, self.sink_v, self.window_k, self.window_v = (k[:, :0] for _ in range(4))
        store, capacity = (Latents, 0) if bits == 16 else (QuantizedLatents, GROUP)
        self.c_k, self.c_v = (store(len(k), capacity, b.d_c, b.down) for b in pair)

    def update(self, k, v, rope):
        """Store k, v (B, T, G, d), and return the keys and values that these tokens attend to."""
        if self.exact_prompt and k.shape[1] > 1:
            before = self.read(rope)
            self.append(k, v, rope)
            return [torch.cat(pair, 1) for pair in zip(before, (k, v))]
        self.append(k, v, rope)
        return self.read(rope)

    def append(self, k, v, rope):
        """Append k, v (B, T, G, d): to the sinks, then through the window into the latents."""
        first = min(max(self.sinks - self.length, 0), k.shape[1])
        self.length += k.shape[1]
        self.sink_k = torch.cat((self.sink_k, k[:, :first]), 1)
        self.sink_v = torch.cat((self.sink_v, v[:, :first]), 1)
        window_k = torch.cat((self.window_k, k[:, first:]), 1)
        window_v = torch.cat((self.window_v, v[:, first:]), 1)
        out = max(0, window_k.shape[1] - self.window)
        if out:
            self.compress(window_k[:, :out], window_v[:, :out], rope)
        self.window_k, self.window_v = window_k[:, out:].clone(), window_v[:, out:].clone()

    def compress(self, k, v, rope):
        """Append the latents of k, v (B, T, G, d), which follow the last token compressed."""
        start = self.position + self.sinks + self.c_k.length
        positions = slice(start, start + k.shape[1])
        for store in (self.c_k, self.c_v):
            grow(store, k.shape[1])
        self.c_k.append(self.K.cached_latents(rope.undo(k, positions), rope, positions))
        self.c_v.append(self.V.project(v))

    def read(self, rope):
        """All keys, rotated, and values (B, S, G, d), in the order of the text.

        They are written into one tensor each, so that few large temporary tensors exist at a time.
        """
        B, first, G, d = self.sink_k.shape
        k, v = self.sink_k.new_empty(2, B, self.length, G, d)
        k[:, :first], v[:, :first] = self.sink_k, self.sink_v
        for span in self.spans():
            columns = slice(first + span.start, first + span.stop)
            positions = slice(self.position + columns.start, self.position + columns.stop)
            k[:, columns] = self.K.rotated_keys(self.c_k.read(span), rope, positions, d)
            v[:, columns] = self.V.reconstruct(self.c_v.read(span), d)
        last = first + self.c_k.length
        k[:, last:], v[:, last:] = self.window_k, self.window_v
        return k, v

    def spans(self):
        """The latents in one span, or in 4 bits in two: complete groups, and those that wait."""
        length = self.c_k.length
        complete = length if isinstance(self.c_k, Latents) else length // GROUP * GROUP
        return [slice(i, j) for i, j in ((0, complete), (complete, length)) if i < j]

    def select(self, rows):
        """Keep the given rows, in this order, with repetition."""
        for part in (self, self.c_k, self.c_v):
            for name, x in vars(part).items():
                if isinstance(x, torch.Tensor):
                    setattr(part, name, x[rows.to(x.device)])


class LowRankLayer(CacheLayerMixin):
    """One layer of a LowRankCache: one StoredRows for each group of rows in the batch."""

    supports_early_init = False              # its buffers depend on where the rows start

    def __init__(self, pair, batch, rope, **options):
        super().__init__()
        self.pair, self.batch, self.rope, self.options = pair, batch, rope, options
        self.columns, self.stored = 0, []

    def lazy_initialization(self, key_states, value_states):
        """Raises ValueError for keys of another dtype or device than the bases."""
        down = self.pair[0].down
        if key_states.dtype != down.dtype or key_states.device != down.device:
            raise ValueError(f"the model's keys are {key_states.dtype} on {key_states.device}, the "
                             f"bases {down.dtype} on {down.device}; make the LowRankCache after "
                             "the model has its dtype and device")
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states, value_states, *args, **kwargs):
        """Store keys and values (B, G, T, d) of T columns, and return those of all columns."""
        B, _, T, _ = key_states.shape
        if self.batch.expected != (B, self.columns, T):
            raise ValueError(ANOTHER_MODEL)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.rope.reserve(int(self.columns + T + self.batch.shift.max()), key_states)
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        before, self.columns = self.columns, self.columns + T
        if len(self.batch.groups) == 1 and not self.batch.start.any():           # no padding
            return [x.transpose(1, 2) for x in self.of_group(0, k, v)]
        all_k, all_v = (x.new_zeros(B, self.columns, *x.shape[2:]) for x in (k, v))
        for i, rows in enumerate(self.batch.groups):
            start, rows = int(self.batch.start[rows[0]]), rows.to(k.device)
            new = slice(max(0, start - before), T)
            all_k[rows, start:], all_v[rows, start:] = self.of_group(i, k[rows, new], v[rows, new])
        return all_k.transpose(1, 2), all_v.transpose(1, 2)

    def of_group(self, i, k, v):
        """Store k, v (B, T, G, d) of group i, and return what its rows attend to."""
        if i == len(self.stored):
            row = self.batch.groups[i][0]
            position = int(self.batch.start[row] + self.batch.shift[row])
            self.stored.append(StoredRows(self.pair, position, k, **self.options))
        return self.stored[i].update(k, v, self.rope)

    def select(self, chosen):
        """Keep what Batch.select has chosen."""
        for group, rows in chosen:
            self.stored[group].select(rows)
        self.stored = [self.stored[group] for group, _ in chosen]

    def get_seq_length(self):
        return self.columns

    def get_mask_sizes(self, query_length):
        return self.columns + query_length, 0

    def get_max_length(self):
        return -1                            # no maximum

    def reset(self):
        self.columns, self.stored, self.is_initialized = 0, [], False

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.stored)


class FullLayer(DynamicLayer):
    """transformers' own layer, for a layer of the model that the plan leaves uncompressed."""

    def select(self, rows):
        self.batch_select_indices(rows.to(self.keys.device))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.get_seq_length() else 0


# The cache ---------------------------------------------------------------------------------------

class LowRankCache(Cache):
    """A transformers cache that keeps latents, for one model and one batch at a time.

    bases holds (K, V) of each layer, None where the layer stays full. `kind` is "compressed" for
    LoRC's cache or "bibranch" for CSKV's, which alone takes `sinks` (4), `window` (32) and `bits`
    (16 or 4; 16 stands for the model's dtype). `nbytes` is the size of the buffers, which have room
    for up to 7 more latents in 16 bits. Raises ValueError for a model or option not supported.
    """

    def __init__(self, model, bases, kind="compressed", sinks=None, window=None, bits=None):
        if kind not in ("compressed", "bibranch"):
            raise ValueError(f"kind is 'compressed' or 'bibranch', not {kind!r}")
        if kind == "compressed" and (sinks, window, bits) != (None, None, None):
            raise ValueError("sinks, window and bits belong to kind='bibranch'")
        if bits not in (None, 4, 16):
            raise ValueError(f"bits is 16 or 4, not {bits!r}")
        if min(sinks or 0, window or 0) < 0:
            raise ValueError("sinks and window are numbers of tokens, 0 or more")
        layers = as_llama(model).config.layers
        if len(bases) != layers:
            raise ValueError(f"bases must hold a pair or None for each of the model's {layers} "
                             f"layers, and there are {len(bases)}")
        options = {"sinks": 0, "window": 0, "bits": 16, "exact_prompt": False}
        if kind == "bibranch":
            options = {"sinks": 4 if sinks is None else sinks, "bits": bits or 16,
                       "window": 32 if window is None else window, "exact_prompt": True}
        decoder = model.base_model
        self.batch, self.rope = Batch(), ModelRope(decoder.rotary_emb)
        self.decoder = weakref.ref(decoder)
        if announce not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(announce, with_kwargs=True)
        super().__init__([LowRankLayer(pair, self.batch, self.rope, **options) if pair
                          else FullLayer() for pair in bases])

    @classmethod
    def from_bases(cls, model, folder, **options):
        """The cache with the bases that `python lorc.py --save folder` wrote for this model."""
        _, bases = load_bases(folder, as_llama(model))
        return cls(model, bases, **options)

    @classmethod
    @torch.no_grad()
    def from_model(cls, model, kept=0.6, schedule="progressive", **options):
        """The cache with LoRC's bases, computed from the weights: Algorithm 1.

        schedule="uniform" gives every layer the same rank, which reaches smaller values of `kept`.
        """
        _, bases = lorc.compress(as_llama(model), kept=kept, schedule=schedule)
        return cls(model, bases, **options)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reset(self):
        """Forget all tokens; the next batch may have another size."""
        super().reset()
        self.batch.clear()

    def reorder_cache(self, beam_idx):
        """Row i of the batch becomes a copy of row beam_idx[i]: beam search."""
        chosen = self.batch.select(beam_idx.cpu())
        for layer in self.layers:
            layer.select(chosen if isinstance(layer, LowRankLayer) else beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.batch.start)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove):
        """Raises ValueError, because compression cannot be undone."""
        raise ValueError("LowRankCache cannot remove tokens: what has left the window is "
                         "compressed; call cache.reset() and start again")

    def __deepcopy__(self, memo):
        """A copy of what is stored, for a prompt that is continued in several ways.

        The bases and the tables of the rotation are shared.
        """
        pairs = [layer.pair for layer in self.layers if isinstance(layer, LowRankLayer)]
        memo |= {id(shared): shared for pair in pairs for shared in (self.rope, pair, *pair)}
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update((name, copy.deepcopy(x, memo)) for name, x in vars(self).items())
        return twin
