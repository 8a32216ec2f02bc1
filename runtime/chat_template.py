"""Render a chat template. Tokenizer.chat runs this file as a process of its own.

A chat template is a program that comes with a checkpoint, so it may be hostile: it is rendered in
Jinja's sandbox, in a process that has two seconds of CPU time and 1 GiB of memory. It sees the same
names, filters and block tags as in transformers.

Standard input: JSON [template, variables]. Standard output: JSON [text, error].
"""
import datetime
import json
import resource
import sys

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 2**20          # characters that a template may add to the message


class Generation(Extension):
    """The block {% generation %}...{% endgeneration %}, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("contents"), [], [], body).set_lineno(line)

    def contents(self, caller):
        return caller()


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter tojson, which unlike Jinja's own does not escape HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message):
    raise ValueError(message)


def strftime_now(format):
    return datetime.datetime.now().strftime(format)


def render(template, variables):
    """(text, error): one of the two is empty."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        text = environment.from_string(template).render(variables)
    except Exception as e:                          # a template can fail in any way that code can
        return "", f"{type(e).__name__}: {e}"[:200]
    if len(text) > LONGEST + len(variables["messages"][0]["content"]):
        return "", "it adds more than a million characters to the message"
    return text, ""


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
    json.dump(render(*json.load(sys.stdin)), sys.stdout)
