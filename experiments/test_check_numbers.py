"""check_numbers.py, by hand on small documents, and on the project's own documents."""
import json
import shlex

import pytest

import check_numbers
from check_numbers import DOCUMENTS, NumberError, Results, disagreements, unmarked, updated

ROWS = [{"label": "full", "perplexity": 22.746, "bytes": 10, "full_bytes": 10},
        {"label": "loss", "perplexity": 23.0, "bytes": 1, "full_bytes": 8}]


@pytest.fixture
def results(tmp_path):
    origin = {"command": "python x.py", "device": "CPU", "torch": "2", "commit": "abc"}
    (tmp_path / "a.json").write_text(json.dumps(origin | {"rows": ROWS, "n": 14955.4}))
    (tmp_path / "bare.json").write_text(json.dumps({"rows": ROWS}))
    return Results(tmp_path)


@pytest.mark.parametrize("text, wrong", [
    ('22.75<!-- = row("a", label="full")["perplexity"] -->', []),
    ('22.74<!-- = row("a", label="full")["perplexity"] -->', ["22.74"]),
    ('14,955<!-- = result("a")["n"] --> and 14,956<!-- = result("a")["n"] -->', ["14,956"]),
    ('<!-- let f = row("a", label="full") --> +1.1 %<!-- = above(row("a", label="loss"), f) -->',
     []),
    ('| 23.0 | 13 % |<!-- = row("a", label="loss")["perplexity"],\n'
     ' kept_bytes(row("a", label="loss")) -->', []),                        # 12.5 rounds either way
    ('5 of `6` 22.75, 22.80<!-- = 5, row("a", label="full")["perplexity"], 22.8 -->', []),
    ('SmolLM2-135M has 23<!-- = 24 -->', ["23"]),
    ('−0.5 and .92<!-- = -0.5, 0.92 -->', []),
])
def test_a_marked_number_is_the_rounded_result(text, wrong, results):
    found = disagreements(text, results)
    assert len(found) == len(wrong) and all(f" {number} is" in line
                                            for number, line in zip(wrong, found))


def test_update_writes_the_results_in_the_documents_format(results):
    text = ('1.00 `1.00` +9.9 1 7<!-- = 22.746, 1.113, 14955.4, 7 --> .50<!-- = 0.25 --> '
            '−1<!-- = -2 -->')
    new = updated(text, results)
    assert new.startswith("22.75 `1.00` +1.1 14,955 7<!--")
    assert " .25<!--" in new and "−2<!--" in new
    assert not disagreements(new, results) and updated(new, results) == new


@pytest.mark.parametrize("text", [
    '1<!-- = row("a", label="none")["bytes"] -->', '1<!-- = row("a")["bytes"] -->',
    '1<!-- = nothing -->', '1<!-- = 1, 1 -->', '1<!-- = result("none") -->', '1<!-- = 1 / 0 -->',
    '10<!-- = row("bare", label="full")["bytes"] -->'])
def test_a_mark_that_cannot_be_checked_is_an_error(text, results):
    with pytest.raises(NumberError):
        disagreements(text, results)


def test_measured_looking_numbers_need_a_mark(results):
    text = ("kept 0.4 of `0.3`, 12 layers, [x](a-1.5.png) 3.1, 4 % and 8,273; 5.5<!-- = 5.5 -->\n"
            "    python x.py --kept 0.2\n<!-- given: 0.4 -->\n")
    assert unmarked(text, results) == [(1, "3.1"), (1, "4"), (1, "8,273")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_documents_quote_the_results(path):
    """Every number in README.md and experiments/README.md is the one in its result file.

    A document without any mark has not been converted yet: it is reported as skipped."""
    text, results = path.read_text(encoding="utf-8"), Results(check_numbers.HERE / "results")
    if "<!-- =" not in text:
        pytest.skip("no number of this document is marked")
    assert disagreements(text, results) == []
    assert unmarked(text, results) == []


def test_the_command_line_reports_and_repairs(results, tmp_path, capsys):
    document = tmp_path / "x.md"
    document.write_text('one 2.0<!-- = result("a")["n"] -->\n')
    argv = [str(document), "--results", str(tmp_path)]
    assert check_numbers.main(argv) == 1 and "line 1: 2.0 is printed" in capsys.readouterr().out
    assert check_numbers.main([*argv, "--update"]) == 0
    assert document.read_text().startswith("one 14,955.4<!--")
    assert check_numbers.main(argv) == 0
    document.write_text("1<!-- = nothing -->")
    assert check_numbers.main(argv) == 2 and capsys.readouterr().err.count("\n") == 1


RESULTS = sorted((check_numbers.HERE / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_command_of_a_result_still_exists(path):
    """Its script is in the repository, and some script defines each of its flags."""
    command, *words = shlex.split(json.loads(path.read_text())["command"])
    assert command == "python" and (check_numbers.HERE.parent / words[0]).exists()
    known = "".join(source.read_text() for folder in ("experiments", "runtime")
                    for source in (check_numbers.HERE.parent / folder).glob("*.py"))
    flags = {word for word in " ".join(words[1:]).split() if word.startswith("--")}
    assert all(f'"{flag}"' in known for flag in flags), flags
