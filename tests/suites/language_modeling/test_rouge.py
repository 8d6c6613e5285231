"""ROUGE-L against a longest common subsequence that is written out here, and against answers whose score is known."""

import random

import pytest

from distillbench.suites.language_modeling.rouge import rouge_l


def subsequence(a, b):
    """The length of the longest common subsequence, by its definition's recursion over prefixes."""
    table = {}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if not i or not j:
                table[i, j] = 0
            elif a[i - 1] == b[j - 1]:
                table[i, j] = table[i - 1, j - 1] + 1
            else:
                table[i, j] = max(table[i - 1, j], table[i, j - 1])
    return table[len(a), len(b)]


def test_random_sentences_score_the_f_measure_of_the_longest_common_subsequence():
    draw = random.Random(0)
    words = ["oak", "elm", "fir", "ash", "yew"]  # too short for the stemmer to touch
    for _ in range(50):
        a, b = ([draw.choice(words) for _ in range(draw.randint(1, 9))] for _ in range(2))
        common = subsequence(a, b)
        truth = 2 * common / (len(a) + len(b))
        assert rouge_l([" ".join(a)], [[" ".join(b)]])[0] == pytest.approx(truth)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Seven boats wait for morning.", 1.0),
        ("seven BOATS, wait... for morning!", 1.0),  # case and punctuation do not count
        ("seven boat waiting for mornings", 1.0),  # nor do endings
        ("Nobody hurries", 0.0),
        ("", 0.0),
        ("?!", 0.0),
        ("morning for wait boats seven", 2 * 1 / 10),  # order counts
        ("the the the the the", 0.0),
    ],
)
def test_known_answers(answer, score):
    assert rouge_l([answer], [["Seven boats wait for morning."]]) == [pytest.approx(score)]


def test_of_several_references_the_best_counts():
    references = ["a quiet harbour", "seven boats wait"]
    assert rouge_l(["seven boats wait", "a quiet river"], [references, references]) == [1.0, pytest.approx(2 / 3)]
    assert rouge_l(["seven boats wait"], [references[:1]]) == [0.0]


def test_a_constant_answer_is_far_below_the_right_one():
    truth = [f"boat {i} waits in harbour {i * i}" for i in range(10)]
    constant = rouge_l(["boat"] * 10, [[t] for t in truth])
    assert sum(constant) / 10 < 0.4 and rouge_l(truth, [[t] for t in truth]) == [1.0] * 10


def test_a_prediction_without_a_reference_is_no_score():
    with pytest.raises(ValueError):
        rouge_l(["x"], [[]])
