"""Text to tokens and back, with the checkpoint's own tokenizer, chat template and end tokens."""
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from model import Config, UserError
from runtime.checkpoint import read_json, read_text

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                  "mask_token")


@contextmanager
def tokenizer_errors(what: str):
    """Turn whatever the tokenizers library raises into a UserError that begins with `what`.

    A damaged file can make the library panic. A panic is not an Exception in Python, and it prints
    to file descriptor 2, which therefore points at /dev/null meanwhile.
    """
    try:
        saved = os.dup(2)
    except OSError:                                  # standard error is closed: nothing to protect
        saved = None
    else:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise UserError(f"{what}: {e}") from None
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`. Raises UserError if its files are unusable.

    ends: the ids of all tokens that end a text, according to any of the checkpoint's files.
    """

    def __init__(self, folder, config: Config):
        self.folder, self.config = Path(folder), config
        text = read_text(self.folder, "tokenizer.json", 2**26)
        with tokenizer_errors(f"{self.folder / 'tokenizer.json'} cannot be read as a tokenizer"):
            self.fast = FastTokenizer.from_str(text)
            self.fast.no_truncation()          # the file may hold settings that training has used
            self.fast.no_padding()
        self.options = self.read_optional("tokenizer_config.json")
        self.ends = set()
        for options in (read_json(self.folder, "config.json"), self.options,
                        self.read_optional("generation_config.json")):
            ids = options.get("eos_token_id")
            for i in ids if isinstance(ids, list) else [ids]:
                if type(i) is int and 0 <= i < config.vocab:
                    self.ends.add(i)

    def read_optional(self, name: str) -> dict:
        """The JSON object in a file that the checkpoint may lack."""
        return read_json(self.folder, name) if (self.folder / name).exists() else {}

    def template(self) -> str:
        """The chat template's source. Raises UserError if the checkpoint has none.

        As in transformers, chat_template.jinja takes precedence over tokenizer_config.json, where
        a list holds several templates by name; "default" is the one for a plain chat.
        """
        found = self.options.get("chat_template")
        if isinstance(found, list):
            named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
            found = named[-1].get("template") if named else None
        if (self.folder / "chat_template.jinja").exists():
            found = read_text(self.folder, "chat_template.jinja")
        if not isinstance(found, str):
            raise UserError("this model has no chat template; leave out --chat")
        return found

    def special_tokens(self) -> dict[str, str]:
        """Name -> text of the special tokens in tokenizer_config.json: texts, or objects."""
        found = {}
        for name in SPECIAL_TOKENS:
            token = self.options.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
        return found

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. With `special`, a BOS token precedes it if the tokenizer adds one.

        `add_bos_token` in tokenizer_config.json overrides what tokenizer.json does.
        """
        with tokenizer_errors("this model's tokenizer cannot read the text"):
            text.encode()                           # raises where it is not valid Unicode
            ids = self.fast.encode(text, add_special_tokens=special).ids
            bos = self.fast.token_to_id(self.special_tokens().get("bos_token", ""))
            added = self.fast.encode("").ids[:1] == [bos]
        wanted = self.options.get("add_bos_token")
        if special and bos is not None and isinstance(wanted, bool) and wanted != added:
            ids = [bos, *ids] if wanted else ids[1:]
        if max(ids, default=0) >= self.config.vocab:
            raise UserError(f"tokenizer.json gives token {max(ids)}, "
                            f"but config.json has vocab_size {self.config.vocab}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the model's own chat template.

        Raises UserError if there is no template, or if it fails or exceeds its limits.
        """
        variables = {"messages": [{"role": "user", "content": text}], "tools": None,
                     "documents": None, "add_generation_prompt": True} | self.special_tokens()
        program = Path(__file__).with_name("chat_template.py")
        done = subprocess.run([sys.executable, str(program)], capture_output=True,
                              input=json.dumps([self.template(), variables]).encode())
        if done.stdout:
            rendered, error = json.loads(done.stdout)
        else:
            last = done.stderr.decode(errors="replace").splitlines()[-1:]
            rendered, error = "", last[0] if last else "it took more than 2 s or 1 GiB"
        if error:
            raise UserError(f"the chat template cannot be rendered: {error}")
        return self.encode(rendered, special=False)


class Stream:
    """The text of tokens that follow a prompt, piece by piece, as soon as it is final.

    All pieces together are decode(prompt + new)[len(decode(prompt)):]. No piece ends within a
    character. Tokenizers with byte fallback spell unknown characters in tokens of one byte each and
    decode a run of them as a whole, so one invalid byte changes all characters of its run: a run is
    held back until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.fast = tokenizer.fast
        added = self.fast.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}
        self.before = prompt          # tokens whose text is printed: decoding `new` depends on them
        self.new = []                 # tokens whose text is held back

    def step(self, token: int) -> str:
        """The text that has become final with this token, which may be none."""
        name = self.fast.id_to_token(token)
        if name is None or token in self.special:             # decode leaves these out
            return ""
        self.new.append(token)
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            return ""
        if self.fast.decode(self.new[-4:]).endswith("\N{REPLACEMENT CHARACTER}"):
            return ""                     # bytes of a character are missing; it has at most four
        text = self.rest()
        self.before = self.new if text else self.before + self.new
        self.new = []
        return text

    def rest(self) -> str:
        """The text that is still held back. Spaces at its start depend on the tokens before it."""
        return self.fast.decode(self.before + self.new)[len(self.fast.decode(self.before)):]
