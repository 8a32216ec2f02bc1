"""Text <-> tokens by the checkpoint's own files: tokenizer, chat template, end tokens, streaming."""
import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from model import Config, UserError
from runtime.checkpoint import read_json, read_text


@contextmanager
def refusing(what: str):
    """Make a UserError of all that the tokenizers library throws.

    A damaged file can make it panic: that is no Exception in Python, and it writes lines of its own
    to file 2, which is closed to it meanwhile.
    """
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise UserError(f"{what}: {e}") from None
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(null)


class Tokenizer:
    """Text <-> tokens by the checkpoint's own files: tokenizer.json, chat template, end tokens."""

    def __init__(self, folder, config: Config):
        folder, self.config = Path(folder), config
        path = folder / "tokenizer.json"
        text = read_text(path, 2**28)
        with refusing(f"{path} cannot be read as a tokenizer"):
            self.fast = FastTokenizer.from_str(text)
        self.fast.no_truncation()                   # settings of its training, not of the model
        self.fast.no_padding()
        optional = {n: read_json(folder / n) if (folder / n).exists() else {}
                    for n in ("tokenizer_config.json", "generation_config.json")}
        self.options = optional["tokenizer_config.json"]
        ends = [c.get("eos_token_id")
                for c in (read_json(folder / "config.json"), *optional.values())]
        self.ends = {e for end in ends for e in (end if isinstance(end, list) else [end])
                     if type(e) is int}
        self.template_file = folder / "chat_template.jinja"

    def template(self) -> str:
        """The chat template's text. Raises UserError when there is none."""
        found = self.options.get("chat_template")
        if isinstance(found, list):                 # named templates: the one for plain chat
            found = next((t.get("template") for t in found
                          if isinstance(t, dict) and t.get("name") == "default"), None)
        if self.template_file.exists():
            found = read_text(self.template_file)
        if not isinstance(found, str):
            raise UserError("this model has no chat template; leave out --chat")
        return found

    def special(self, name: str) -> str:
        """The text of bos_token or eos_token, in tokenizer_config.json as text or an object."""
        token = self.options.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; begins with BOS exactly when the tokenizer says so (and `special`)."""
        with refusing("this model's tokenizer cannot read the text"):
            text.encode()                           # raises where it is not valid Unicode
            ids = self.fast.encode(text, add_special_tokens=special).ids
            bos = self.fast.token_to_id(self.special("bos_token"))
        wish = self.options.get("add_bos_token")
        if special and bos is not None and isinstance(wish, bool) and wish != (ids[:1] == [bos]):
            ids = [bos, *ids] if wish else ids[1:]
        if max(ids, default=0) >= self.config.vocab:
            raise UserError(f"tokenizer.json gives token {max(ids)}, "
                            f"config.json has vocab_size {self.config.vocab}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the model's own chat template.

        The template is a program: it is rendered in a sandbox, in a process of its own that is
        given two seconds and 1 GiB. Raises UserError when it cannot be.
        """
        names = {"messages": [{"role": "user", "content": text}], "add_generation_prompt": True,
                 "tools": None, "bos_token": self.special("bos_token"),
                 "eos_token": self.special("eos_token")}
        task = json.dumps([self.template(), names]).encode()
        program = inspect.getsource(render) + "render()"
        done = subprocess.run([sys.executable, "-c", program], input=task, capture_output=True,
                              cwd=Path(__file__).resolve().parent.parent)
        said = done.stderr.decode().splitlines() or ["it took more than 2 s or 1 GiB"]
        rendered, error = json.loads(done.stdout or json.dumps(["", said[-1]]))
        if error:
            raise UserError(f"the chat template cannot be rendered: {error}")
        return self.encode(rendered, special=False)


def render():
    """[template, names] on standard input -> [text, what went wrong] on standard output.

    Runs by itself: `Tokenizer.chat` hands the source of this function to a new Python.
    """
    import datetime
    import json
    import resource
    import sys

    from jinja2.sandbox import ImmutableSandboxedEnvironment
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))

    def refuse(message):
        raise ValueError(message)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    env.globals |= {"raise_exception": refuse,
                    "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    template, names = json.load(sys.stdin)
    try:
        text, error = env.from_string(template).render(names), ""
        if len(text) > 2**20 + len(names["messages"][0]["content"]):
            text, error = "", "it makes more than a million characters of its own"
    except Exception as e:                          # a template can fail in any way that code can
        text, error = "", f"{type(e).__name__}: {e}"[:200]
    json.dump([text, error], sys.stdout)


class Stream:
    """Text of tokens as they arrive. A character whose bytes have not all come is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.decode, self.last, self.new = tokenizer.fast.decode, prompt[-4:], []

    def step(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        self.new.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.new) < 16:
            return ""
        self.last, self.new = (self.new if text else self.last + self.new), []
        return text

    def rest(self) -> str:
        """What is still held back: decoded after the tokens before it, as spaces depend on them."""
        return self.decode(self.last + self.new)[len(self.decode(self.last)):]
