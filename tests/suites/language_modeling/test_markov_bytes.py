"""A chain over symbols and a student over letters: texts pass both ways, and the metric is exact."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.methods.language_modeling import gkd, seqkd, teacher
from distillbench.problems.language_modeling.oracle import chosen_log_probs
from distillbench.problems.language_modeling.texts import retokenise, retokenise_prompts
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import language_modeling
from distillbench.suites.language_modeling import markov, markov_bytes
from distillbench.suites.language_modeling.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from distillbench.training.student import Student

SETTING = language_modeling.CARD.settings["markov-bytes"]
SEEDS = seeds_by_role(0)
LETTERS, SYMBOLS = markov_bytes.alphabets(16, 5, 8)
OPTIONS = options_of(SETTING, markov_bytes.Options)
CHAINS = markov.chains(OPTIONS, "test")
STUDENT = Architecture("window-lm", {"vocab": 9, "order": 5, "width": 6})


@pytest.fixture(scope="module")
def problem():
    return language_modeling.SUITE.problem(TrainContext("markov-bytes", SETTING, SEEDS))


def score(net):
    [found] = markov_bytes.measure(net, JudgeContext("name", SETTING, SEEDS))
    return found.value


def spelled(one, texts):
    return [(b"".join(one.spell(i[a & ~r].tolist())), b"".join(one.spell(i[r].tolist())), i[r][-1].item() == one.eos)
            for i, a, r in zip(texts.ids, texts.attention, texts.response, strict=True)]  # fmt: skip


def test_symbols_have_one_letter_or_two_and_letters_are_no_symbols():
    lengths = [len(s) for s in SYMBOLS.spellings]
    assert sorted(set(lengths)) == [0, 1, 2] and lengths.count(1) == 5 and lengths.count(2) == 10
    assert LETTERS.digest != SYMBOLS.digest and set(b"".join(SYMBOLS.spellings)) == set(b"".join(LETTERS.spellings))
    for sizes in ((16, 5, 6), (16, 16, 20)):
        with pytest.raises(UserError, match="letters"):
            markov_bytes.alphabets(*sizes)


def test_the_teachers_text_in_letters_is_its_text_in_symbols(problem):
    student = problem.teacher_text().texts
    prompts = retokenise_prompts(problem.prompts, LETTERS, SYMBOLS)
    own = problem.teacher.responses(prompts, samples=1, length=SETTING.options["length"])
    assert student.tokenizer == LETTERS.digest and own.tokenizer == SYMBOLS.digest
    assert spelled(LETTERS, student) == spelled(SYMBOLS, own)
    assert not all(end for *_, end in spelled(LETTERS, student))  # some were cut short
    # and back, token for token
    batch = student.take(torch.arange(20))
    view = problem.teacher_view(batch)
    theirs = own.take(torch.arange(20))
    assert all(torch.equal(getattr(view, f), getattr(theirs, f)) for f in ("ids", "attention", "response"))
    assert view.tokenizer == problem.teacher.tokenizer and view.units() == theirs.units() and view.rows.tolist() == [-1] * 20
    torch.testing.assert_close(problem.teacher.log_probs(view), problem.teacher.log_probs(theirs), rtol=0, atol=0)


def test_the_problem_is_that_of_markov_in_letters(problem):
    plain = markov.posed(TrainContext("x", SETTING, SEEDS), OPTIONS)
    as_symbols = [dataclasses.replace(x, tokenizer=SYMBOLS.digest) for x in (plain.references, plain.validation)]
    for ours, theirs in zip((problem.references, problem.validation), as_symbols, strict=True):
        assert spelled(LETTERS, ours) == spelled(SYMBOLS, theirs) and torch.equal(ours.index, theirs.index)
    assert int(problem.references.response.sum(1).max()) <= problem.length


def test_aligned_batches_pair_letters_with_symbols(problem):
    batch = next(problem.aligned(problem.teacher_text()).stream(3))
    assert torch.equal(batch.ids, next(problem.teacher_text().stream(3)).ids)
    tokens = batch.of_teacher(torch.ones(batch.teacher.predicted.count))
    letters = batch.of_student(torch.ones(batch.predicted.count))
    assert (tokens == 1).all() and set(letters.tolist()) == {1.0, 2.0}  # every symbol is a chunk, as spellings have one reading
    spellings = SYMBOLS.spell(batch.teacher.predicted.labels.tolist())
    assert letters.tolist() == [max(1, len(s)) for s in spellings]


def test_padding_on_either_side_changes_no_chunk(problem):
    batch = next(problem.aligned(problem.teacher_text()).stream(0))

    def padded(side):
        parts = ((side.ids, 7), (side.attention, False), (side.response, False))
        ids, attention, response = (torch.nn.functional.pad(x, (3, 5), value=v) for x, v in parts)
        return dataclasses.replace(side, ids=ids, attention=attention, response=response)

    wide = padded(dataclasses.replace(batch, teacher=padded(batch.teacher)))
    for one, other in ((batch, wide), (batch.part(5, 9), wide.part(5, 9))):
        told = [b.of_teacher(problem.teacher.log_probs(b.teacher)) for b in (one, other)]
        assert len(told[0]) == int(one.counts.sum())
        torch.testing.assert_close(*told, rtol=0, atol=0)
        torch.testing.assert_close(*(b.of_student(problem.nll(b)) for b in (one, other)))


def test_token_level_methods_are_refused_in_one_line(problem):
    run = Run(seeds=SEEDS, budget=Budget(student_examples=320), training=SETTING.training)
    with pytest.raises(UserError, match="another tokenizer than the teacher's"):
        gkd.distill(problem, run, divergence="js", beta=0.5, on_policy=0.0, temperature=1.0, reduction="token")
    for options in ({"model": problem.teacher.module}, {"model": problem.student, "mixing": 0.2}):
        with pytest.raises(UserError, match="cannot sample"):
            problem.sampled(run, **options)
    with pytest.raises(UserError, match="prompts belong to another tokenizer"):
        problem.teacher.responses(problem.prompts, samples=1, length=4)
    with pytest.raises(UserError, match="cannot sample"):
        seqkd.distill(problem, run, temperature=1.0, fresh=True)
    with pytest.raises(UserError, match="not"):
        retokenise(problem.references, SYMBOLS, LETTERS, problem.prompts)


def test_white_space_needs_spellings():
    plain = language_modeling.SUITE.problem(TrainContext("markov", language_modeling.CARD.settings["markov"], SEEDS))
    assert plain.teacher_view(batch := plain.references.take(torch.arange(3))) is batch
    with pytest.raises(UserError, match="white space"):
        next(plain.aligned(plain.data, space=True).stream(0))


# --- the metric ---------------------------------------------------------------------------------------------------------


def test_a_student_over_symbols_gets_the_exact_kl_of_markov():
    net = build(Architecture("window-lm", {"vocab": 16, "order": 2, "width": 6}), 5).eval()
    distributions = [markov.distributions(m, 16, 2) for m in (CHAINS.teacher, net)]
    assert score(net) == pytest.approx(markov.divergences(*distributions, CHAINS.start, CHAINS.length)["kl"], rel=1e-12)


def test_the_teacher_judged_through_its_own_tokens_is_perfect(problem):
    run = Run(seeds=SEEDS, budget=SETTING.budget, training=SETTING.training)
    student = Student.from_bytes(teacher.distill(problem, run).to_bytes())
    [found] = language_modeling.SUITE.evaluate(student, JudgeContext("markov-bytes", SETTING, SEEDS)).measurements
    assert found.value == pytest.approx(0.0, abs=1e-12)


def read(window):
    """The symbols of a window of letters, and the letter of a pair that is under way (0: none); None where it is no text of ours."""
    symbols, begun = [], 0
    for letter in window:
        if letter == 0:
            if symbols or begun:
                return None
        elif begun:
            pair = LETTERS.spellings[begun] + LETTERS.spellings[letter]
            if pair not in SYMBOLS.spellings:
                return None
            symbols.append(SYMBOLS.spellings.index(pair))
            begun = 0
        elif letter > 5:
            begun = letter
        else:
            symbols.append(letter)
    return symbols, begun


def test_a_chain_over_letters_with_the_distributions_of_the_teacher_is_perfect():
    """The window of the setting's student holds all that the chain looks at, and the metric sees it."""
    distribution = markov.distributions(CHAINS.teacher, 16, 2)
    table = torch.full((9**5, 9), 1 / 9, dtype=torch.float64)
    for row, window in enumerate(itertools.product(range(9), repeat=5)):
        found = read(window)
        if found is None or len(found[0]) < 2:
            continue
        (*_, one, two), begun = found
        after = distribution[one * 16 + two]
        masses = torch.zeros(9, dtype=torch.float64)
        for symbol, spelling in enumerate(SYMBOLS.spellings):
            letters = LETTERS.encode(spelling) or [0]
            if not begun:
                masses[letters[0]] += after[symbol]
            elif letters[0] == begun and len(letters) == 2:
                masses[letters[1]] += after[symbol]
        table[row] = masses / masses.sum()
    spelled = [LETTERS.encode(s) or [0] for s in SYMBOLS.spellings]
    assert markov_bytes.text_kl(distribution, table, CHAINS.start, CHAINS.length, spelled) == pytest.approx(0.0, abs=1e-12)
    assert markov_bytes.text_kl(distribution, table.roll(1, 0), CHAINS.start, CHAINS.length, spelled) > 0.1


def test_the_exact_metric_is_the_mean_over_sampled_texts():
    net = build(STUDENT, 3).eval()
    with torch.no_grad():
        net.output.weight.mul_(3)  # not nearly uniform
    prompts = markov.starts(CHAINS, 2000, 11)
    own = dataclasses.replace(markov.draw(CHAINS, CHAINS.teacher, prompts, 12), tokenizer=SYMBOLS.digest)
    letters = retokenise(
        own, SYMBOLS, LETTERS, retokenise_prompts(dataclasses.replace(prompts, tokenizer=SYMBOLS.digest), SYMBOLS, LETTERS)
    )
    sums = []
    for model, texts, vocab in ((CHAINS.teacher, own, 16), (net, letters, 9)):
        batch = texts.take(torch.arange(len(texts)))
        with torch.no_grad():
            said = chosen_log_probs(model, batch.predicted.take(model(batch.ids, batch.attention)), batch.predicted.labels, vocab=vocab)
        sums.append(batch.per_sequence(said).double() * batch.response.sum(1))
    gap = sums[0] - sums[1]
    tokens = float(own.response.sum()) / len(own)
    error = float(gap.std()) / len(gap) ** 0.5 / tokens
    assert score(net) == pytest.approx(float(gap.mean()) / tokens, abs=4 * error)
    assert error < 0.03 * score(net)


@pytest.mark.parametrize(("vocab", "order", "why"), [(12, 2, "neither"), (9, 6, "looks at more"), (16, 3, "looks at more")])
def test_what_cannot_be_judged_is_refused(vocab, order, why):
    with pytest.raises(UserError, match=why):
        score(build(Architecture("window-lm", {"vocab": vocab, "order": order, "width": 4}), 0))
