"""Check that the numbers in the documents are the numbers in the result files.

    python experiments/check_numbers.py                  check README.md and experiments/README.md
    python experiments/check_numbers.py --update FILE    write the results' numbers to FILE
    python experiments/check_numbers.py --unmarked FILE  list numbers without a mark

The numbers of a paragraph or a table are marked by an HTML comment after it, which GitHub does not
show:

    The full cache takes 14.6 MiB.

    <!-- = row("front-tiny", label="full")["bytes"] / 2**20 -->

The comment is a Python expression. Its value, rounded to the digits that the document prints, must
be the printed number. `+3.8` prints the sign, `14,955` prints separators, and both are kept by
--update. A comment with several expressions marks as many numbers before it, in their order; `_`
stands for a number that is not a result:

    8,273 with Eq. 13 and 14,955 without

    <!-- = a["perplexity"], _, b["perplexity"] -->

Numbers inside `code spans` and code blocks are never marked. An expression may use

    result(name)            the parsed JSON of experiments/results/NAME.json
    row(name, key=value)    the only entry of its "rows" that has all of these values
    percent(x)              100 * x
    above(x, full)          100 * (x / full - 1); x and full are numbers or rows with a perplexity
    kept_bytes(row)         100 * row["bytes"] / row["full_bytes"]
    min, max, sum, len, abs, round, zip

and the names that an earlier comment of the same document defines:

    <!-- let S = "front-SmolLM2-135M-Instruct" -->
    <!-- let full = row(S, label="full") -->
    <!-- let loss = row(S, label="loss metric, 4 bits", wanted=0.4) -->
    <!-- = kept_bytes(loss), above(loss, full) -->

A document that has a mark must mark all of its numbers with a decimal point, a thousands separator
or a percent sign; --unmarked lists those that are missing. Numbers that are settings or come from a
paper are named in a comment, once for the whole document, and need no mark:

    <!-- given: 0.4, 0.2, 95 % -->

A result file that a document quotes must say how it was made: its command, device, versions and
commit. The exit status is 0 if everything agrees, 1 if not, and 2 if a file cannot be read.
"""
import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
NO_RESULT = object()                                    # what `_` stands for in an expression
ORIGIN = ("command", "device", "torch", "commit")      # what every quoted result must have

COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.S)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
INDENTED = re.compile(r"^(?: {4}|\t)[^\n]*", re.M)
LINK = re.compile(r"\]\([^)\n]*\)|https?://[^\s)>]*|\b\d{4}\.\d{5}\b")       # and arXiv numbers
NUMBER = re.compile(r"(?<![\w.,/#-])[-+−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)"
                    r"(?![\w]|[.,]\d)")


class NumberError(ValueError):
    """A mark that does not agree with the results, or that cannot be evaluated."""


# Results -----------------------------------------------------------------------------------------

class Results:
    """The functions that an expression can call, over one folder of result files."""

    def __init__(self, folder):
        self.folder, self.quoted = Path(folder), {}

    def result(self, name):
        """The parsed JSON file NAME.json. Raises NumberError if it does not say how it was made."""
        if name not in self.quoted:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            missing = [key for key in ORIGIN if not found.get(key)]
            if missing:
                raise NumberError(f"{name}.json does not say its {', '.join(missing)}")
            self.quoted[name] = found
        return self.quoted[name]

    def row(self, name, /, **values):
        """The only entry of NAME.json's rows that has these values. Raises NumberError."""
        rows = [row for row in self.result(name)["rows"]
                if all(row.get(key) == value for key, value in values.items())]
        if len(rows) != 1:
            raise NumberError(f"{len(rows)} rows of {name}.json have {values}; one is needed")
        return rows[0]

    def names(self):
        """What an expression may use."""
        return {"result": self.result, "row": self.row, "percent": lambda x: 100 * x,
                "above": above, "kept_bytes": lambda row: 100 * row["bytes"] / row["full_bytes"],
                "_": NO_RESULT, "min": min, "max": max, "sum": sum, "len": len, "abs": abs,
                "round": round, "zip": zip}


def above(x, full):
    """How much x is above full, in percent. Both are numbers, or rows with a perplexity."""
    x, full = (one["perplexity"] if isinstance(one, dict) else one for one in (x, full))
    return 100 * (x / full - 1)


# Documents ---------------------------------------------------------------------------------------

def blank(text, pattern, filler="|"):
    """Replace the characters of every match, so that positions in the text stay the same."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", filler, match.group()), text)


def line_of(text, match):
    """The line of the text that a match begins in, counted from 1."""
    return text.count("\n", 0, match.start()) + 1


def prose(text):
    """The text without code, links and comments."""
    for pattern in (COMMENT, CODE, INDENTED, LINK):
        text = blank(text, pattern)
    return text


def digits(printed):
    """The number of digits after the decimal point of a printed number."""
    return len(printed.partition(".")[2])


def like(value, printed):
    """`value` printed with the digits, the sign and the separators of `printed`."""
    sign = "+" if printed.startswith("+") else ""
    comma = "," if "," in printed or abs(value) >= 10_000 else ""
    new = format(value, f"{sign}{comma}.{digits(printed)}f")
    if printed.lstrip("+-−").startswith("."):
        new = new.replace("0.", ".", 1)
    return new.replace("-", "−") if "−" in printed else new


def agrees(value, printed):
    """Does `value` round to the printed number? A value halfway may be rounded either way.

    NO_RESULT agrees with every number."""
    if value is NO_RESULT:
        return True
    number = float(printed.replace(",", "").replace("−", "-"))
    return abs(value - number) <= 0.5 * 10 ** -digits(printed) * (1 + 1e-9)


def evaluate(expression, names):
    """The values of an expression, a list. Raises NumberError."""
    try:
        return [*eval(f"({expression},)", names | {"__builtins__": {}})]    # our own documents
    except (LookupError, TypeError, NameError, SyntaxError, ArithmeticError, OSError) as e:
        raise NumberError(f"`{expression}` cannot be evaluated: {e!r}") from None


def marks(text, results):
    """Yield (match of a number, its value) for every marked number. Raises NumberError."""
    names, plain, start = results.names(), prose(text), 0
    for comment in COMMENT.finditer(blank(text, CODE)):
        body = text[comment.start(1):comment.end(1)]
        if body.startswith("let "):
            name, _, expression = body.removeprefix("let ").partition("=")
            names[name.strip()], = evaluate(expression.strip(), names)
        elif body.startswith("="):
            values = evaluate(" ".join(body[1:].split()), names)
            numbers = list(NUMBER.finditer(plain, start, comment.start()))[-len(values):]
            if len(numbers) < len(values):
                raise NumberError(f"line {line_of(text, comment)}: {len(numbers)} numbers stand "
                                  f"before a comment that marks {len(values)}")
            yield from zip(numbers, values)
            start = comment.end()


def disagreements(text, results):
    """One line for every marked number that is not what the results say."""
    return [f"line {line_of(text, number)}: {number.group()} is printed, "
            f"the results give {value:.6g}"
            for number, value in marks(text, results) if not agrees(value, number.group())]


def updated(text, results):
    """The text with every marked number as the results have it."""
    out, end = [], 0
    for number, value in marks(text, results):
        new = number.group() if agrees(value, number.group()) else like(value, number.group())
        out += [text[end:number.start()], new]
        end = number.end()
    return "".join(out) + text[end:]


def unmarked(text, results):
    """(line, number) of every measured-looking number that has no mark and is not given."""
    marked = {number.start() for number, value in marks(text, results) if value is not NO_RESULT}
    given = set()
    for comment in COMMENT.finditer(text):
        if comment.group(1).startswith("given:"):
            given |= {number.group() for number in NUMBER.finditer(comment.group(1))}
    plain, found = prose(text), []
    for number in NUMBER.finditer(plain):
        percent = re.match(r"\s?%", plain[number.end():number.end() + 2])
        measured = percent or "." in number.group() or "," in number.group()
        if measured and number.start() not in marked and number.group() not in given:
            found.append((line_of(text, number), number.group()))
    return found


# The command line --------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, default=DOCUMENTS, metavar="FILE",
                   help="Documents. Default: README.md and experiments/README.md.")
    p.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR",
                   help="Folder of the result files. Default: experiments/results.")
    p.add_argument("--update", action="store_true", help="Write the results' numbers.")
    p.add_argument("--unmarked", action="store_true", help="List numbers that need a mark.")
    args, status = p.parse_args(argv), 0
    for path in args.files:
        results = Results(args.results)
        try:
            text = path.read_text(encoding="utf-8")
            if args.update:
                path.write_text(updated(text, results), encoding="utf-8")
            problems = [] if args.update else disagreements(text, results)
            if args.unmarked:
                problems += [f"line {line}: {number} has no mark"
                             for line, number in unmarked(text, results)]
        except (NumberError, OSError, ValueError) as e:
            print(f"check_numbers: {path.name}: {' '.join(str(e).split())}", file=sys.stderr)
            return 2
        for problem in problems:
            print(f"{path.name}, {problem}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
