"""Absurd numbers anywhere on the command line: one line that says the limit, before anything is begun."""

import pytest

from distillbench.cards.card import Integer, Real
from distillbench.cli import numbers
from distillbench.errors import UserError, brief

RUN = "run image-classification/blobs --method kd"
MANY = "9" * 5000  # past what int() reads


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{RUN} --seeds 99999999999", "--seeds 99999999999: at most 10,000 seeds at once"),
        (f"{RUN} --seeds 10001", "--seeds 10001: at most 10,000 seeds at once"),
        (f"{RUN} --seeds 0-99999999999", "--seeds 0-99999999999: a seed is at most 2147483647"),
        (f"{RUN} --seeds 0-2147483647", "at most 10,000 seeds at once"),
        (f"{RUN} --seeds {MANY}", "9... (5,000 characters): at most 10,000 seeds at once"),
        (f"{RUN} --seeds {MANY}-{MANY}", "(10,001 characters): a seed is at most 2147483647"),
        (f"{RUN} --seeds ٣", "--seeds ٣: give a number of seeds (5) or a range (5-9)"),
        (f"{RUN} --seeds ²", "give a number of seeds"),
        (f"{RUN} --seeds -3", "--seeds -3: give a number of seeds"),
        (f"{RUN} --seeds 1_0", "give a number of seeds"),
        (f"{RUN} --budget {10**30}", "argument --budget: 1000000000000000000000000000000 is more than 1,000,000,000,000,000, the most"),
        (f"{RUN} --budget {MANY}", "9... (5,000 characters) is more than 1,000,000,000,000,000"),
        (f"{RUN} --budget ٣", "'٣' is not a positive whole number"),
        (f"{RUN} --budget ²", "'²' is not a positive whole number"),
        (f"{RUN} --budget 000", "'000' is not a positive whole number"),
        (f"{RUN} --workers {10**9}", "argument --workers: 1000000000 is more than 1,024, the most there can be"),
        (f"{RUN} --checkpoint-seconds 1e300", "argument --checkpoint-seconds: 1e300 is more than 604,800, the most there can be"),
        (f"{RUN} --checkpoint-seconds 1e999", "is more than 604,800"),
        (f"{RUN} --checkpoint-seconds inf", "'inf' is not a number of seconds: 0 or more"),
        (f"{RUN} --checkpoint-seconds nan", "'nan' is not a number of seconds"),
        (f"{RUN} --checkpoint-seconds ٣", "'٣' is not a number of seconds"),
        (f"{RUN} --set kd.temperature=1e400", "kd.temperature=1e400: not finite; default 4.0"),
        (f"{RUN} --set kd.temperature={MANY}", "9... (5,000 characters): not finite; default 4.0"),
        (f"{RUN} --set kd.temperature=٣", "kd.temperature=٣: not a number; default 4.0"),
        (f"{RUN} --set {'x' * 5000}", "--set xxx"),
        (f"{RUN} --set kd.{'x' * 5000}=1", "unknown hyper-parameter of kd"),
        ("study teacher-hacking --seeds 99999999999", "at most 10,000 seeds at once"),
        ("study teacher-hacking --workers 1e9", "'1e9' is not a positive whole number"),
        ("guard s.safetensors --record r.json --margin nan", "argument --margin: 'nan' is not a loss that is tolerated: 0 or more"),
        ("guard s.safetensors --record r.json --margin inf", "'inf' is not a loss that is tolerated"),
        ("guard s.safetensors --record r.json --margin -1", "'-1' is not a loss that is tolerated"),
        ("guard s.safetensors --record r.json --margin 1e300", "1e300 is more than 1,000,000,000"),
    ],
    ids=lambda x: x[:50],
)
def test_an_absurd_number_is_one_line_and_exit_code_two(cli, command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*command.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("distillbench: ")
    assert words in err and len(err) < 400, err
    assert list(tmp_path.iterdir()) == []


def test_what_is_within_the_limits_is_read():
    assert numbers.seeds("3") == [0, 1, 2]
    assert numbers.seeds("007-9") == [7, 8, 9]
    assert numbers.seeds("2147483647-2147483647") == [2**31 - 1]
    assert len(numbers.seeds("10000")) == 10_000
    assert numbers.count(numbers.WORKERS)("1024") == 1024
    assert numbers.amount(2.0, "it")("1.5e-3") == 0.0015 and numbers.amount(2.0, "it")(".5") == 0.5
    with pytest.raises(UserError, match="at least one seed"):
        numbers.seeds("0")


@pytest.mark.parametrize("text", ["٣", "²", MANY, str(2**53 + 1), f"-{2**60}", float("inf"), float("nan"), 2.5, True])
def test_integers_of_hyper_parameters_have_the_same_limits(text):
    with pytest.raises(ValueError):
        Integer(1).parse(text)


def test_integers_up_to_two_to_the_53_are_kept():
    assert Integer(1).parse(str(2**53)) == 2**53 and Integer(1).parse(3.0) == 3 and Real(1.0).parse("1e-3") == 0.001


def test_a_long_text_is_shown_by_its_beginning():
    assert brief("kd") == "kd"
    assert brief("9" * 100) == f"{'9' * 40}... (100 characters)"
