"""The documents: their commands run, and the names, flags and links in them exist.

Commands that need a download or a GPU are not run: their scripts and flags are looked up instead.
"""
import importlib
import inspect
import os
import re
import shlex
from pathlib import Path

import pytest

from runtime import cli
import runtime.testing  # noqa: F401 (it sets the number of threads)

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "experiments/README.md", "runtime/README.md", "tiny/README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"^    (.*)$", re.M)


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def commands(document):
    """Every command line in the code blocks of a document, as a list of words."""
    text = read(document)
    lines = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    lines += INDENTED.findall(FENCED.sub("", text))
    found = [shlex.split(line, comments=True) for line in lines
             if re.match(r"(\w+=\S+ )?(python|torchrun) ", line)]
    return [words[words.index("python") + 1 if "python" in words else 1:] for words in found]


def script(words):
    """The position of the Python file in a command."""
    return next(i for i, word in enumerate(words) if word.endswith(".py"))


EVERY_COMMAND = [(document, words) for document in DOCUMENTS for words in commands(document)]


@pytest.mark.parametrize("document, words", EVERY_COMMAND, ids=lambda x: " ".join(x)[:60])
def test_the_script_and_the_flags_of_every_command_exist(document, words):
    """A flag is looked up in the source of the script and of the modules that define flags for it."""
    at = script(words)
    sources = [ROOT / words[at], *(ROOT / "runtime" / name for name in ("cli.py", "bounds.py")),
               ROOT / "experiments" / "study.py"]
    known = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in sources)))
    flags = {word.split("=")[0] for word in words[at + 1:] if word.startswith("--")}
    assert flags <= known, f"{document}: {flags - known} of {words[at]}"


# Commands that run here: those of lorc.py and theory.py on any model. The output of two of them is
# shown in the documents and compared below.
SHOWN = [["lorc.py", "--prompt", "Once upon a time"], ["theory.py"]]
PLACES = {"PATH": "tiny", "FILE": "LICENSE", "OTHER_FILE": "tiny/README.md"}
SMALL = {"--prompt": ["--max-new-tokens", "3"], "--perplexity": ["--max-tokens", "32"]}
RUN = [words for _, words in EVERY_COMMAND if words[0] in ("lorc.py", "theory.py")
       and "SmolLM2-135M-Instruct" not in words and words not in SHOWN]


def test_every_command_that_needs_no_download_runs(tmp_path, monkeypatch, capsys):
    """In their order, so that bases which one command saves are read by the next. The metric of the
    loss is measured on one window of the bundled text instead of 48."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("runtime.jobs.LOSS_WINDOWS", 1)
    assert len(RUN) >= 4
    for words in RUN:
        argv = [PLACES.get(word, word) for word in words[1:]]
        argv = [str(tmp_path / "bases") if before in ("--save", "--bases") else word
                for before, word in zip(["", *argv], argv)]
        for flag, (limit, n) in SMALL.items():
            if flag in argv and limit not in argv:
                argv += [limit, n]
        main = cli.main if words[0] == "lorc.py" else cli.bounds_main
        assert main(argv) == 0, (words, capsys.readouterr().err)


SNIPPETS = [block for language, block in FENCED.findall(read("README.md")) if language == "python"]


@pytest.mark.parametrize("block", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_python_snippet_runs(block, monkeypatch):
    if "transformers" in block:
        pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document, words, main, stream", [
    ("README.md", SHOWN[0], cli.main, "err"),
    ("experiments/README.md", SHOWN[1], cli.bounds_main, "out")])
def test_a_document_shows_what_a_command_prints(document, words, main, stream, monkeypatch, capsys):
    """Line by line, with every number replaced by 0, because numbers and the interpreter's name
    (python, python3) depend on the machine."""
    def lines(text):
        text = re.sub(r"\bpython[\d.]+", "python", text)
        return [" ".join(re.sub(r"[\d.,]+(e[+-]\d+)?", "0", line).split())
                for line in text.splitlines()]
    monkeypatch.chdir(ROOT)
    assert words in commands(document) and main(words[1:]) == 0
    printed = lines(getattr(capsys.readouterr(), stream))
    shown = lines("\n".join(INDENTED.findall(read(document))))
    assert printed and set(printed) <= set(shown)


# Names ---------------------------------------------------------------------------------------------

def test_every_row_of_the_equation_table_names_code_that_cites_it():
    table = read("README.md").split("## From equation to code")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (\S[^|]*?) \| (`[^|]+`) \|", table, re.M)
    rows = [row for papers, names in cells
            for row in zip(papers.split("; "), re.findall(r"`([^`]+)`", names), strict=True)]
    assert len(rows) >= 25
    for paper, name in rows:
        if paper.startswith("Tables"):
            continue                                   # one script for each, tested elsewhere
        if name.endswith(".py"):
            source = (ROOT / name).read_text()
        else:
            parts = name.split(".")
            module = 2 if parts[0] == "runtime" else 1
            found = importlib.import_module(".".join(parts[:module]))
            for part in parts[module:]:
                found = getattr(found, part)
            source = inspect.getsource(found)
        cited = "CSKV" if paper.startswith("CSKV") else paper
        assert cited in " ".join(source.split()), (paper, name)


def test_every_flag_is_described():
    """runtime/README.md lists the flags of the parser, all of them and no other."""
    section = read("runtime/README.md").split("## The command line")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(--[\w-]+)`", section))
    flags = {flag for action in cli.command_line()._actions for flag in action.option_strings}
    assert listed == flags - {"-h", "--help"}


# Links ---------------------------------------------------------------------------------------------

def anchor(heading):
    """GitHub's name for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    text = FENCED.sub("", read(document))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, fragment = target.partition("#")
        path = (ROOT / document).parent / path if path else ROOT / document
        assert path.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert fragment in {anchor(heading) for heading in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_to_be_filled_in(document):
    assert "TODO" not in read(document)


def test_continuous_integration_runs_readmes_first_two_blocks():
    """.ci/run takes the first two fenced blocks: they run the program, then the tests."""
    first, second = [block for _, block in FENCED.findall(read("README.md"))][:2]
    assert "python lorc.py --prompt" in first and "pytest" in second
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
