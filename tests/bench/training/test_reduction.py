"""The one owner of the denominator: terms in the units of a batch, and terms that couple it, in parts as in the whole."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.problems.language_modeling.texts import Prompts, TextBatches
from distillbench.training.data import Batches, Examples
from distillbench.training.reduction import NeedsOutputs, Reduction
from distillbench.training.run import Learner, coupled
from tests.bench.training.small import SEEDS, batches, examples, linear, make
from tests.keyed import keyed, reduced

WORDS = 7


def texts(rows=8, size=8):
    """Responses of 1 to 4 words, one after the other, to prompts of one word."""
    prompts = Prompts.of([[i % WORDS] for i in range(rows)], "t", 0)
    responses = [[(3 * i + j) % WORDS for j in range(1 + i % 4)] for i in range(rows)]
    return TextBatches(prompts.with_responses(responses, pad=0), size, seed=4)


# --- units and totals -------------------------------------------------------------------------------------------


def test_the_unit_is_rows_unless_it_is_named():
    batch = next(texts().stream(0))
    assert batch.units() == {"rows": 8, "tokens": 20} == {u: batch.total(u) for u in ("rows", "tokens")}
    rows, tokens = torch.arange(8.0), torch.arange(20.0)
    found = Reduction()(batch, {"a": rows, "b": (rows, "rows"), "c": (tokens, "tokens")})
    assert {name: float(value) for name, value in found.items()} == {"a": 3.5, "b": 3.5, "c": 9.5}
    assert all(value.dim() == 0 for value in found.values())


@pytest.mark.parametrize("cuts", [(0, 8), (0, 3, 8), (0, 1, 2, 7, 8)], ids=str)
def test_parts_keep_the_totals_of_the_whole_and_add_up_to_it(cuts):
    whole = next(texts().stream(0))
    values = torch.randn(20, dtype=torch.float64)
    parts = [whole.part(a, b) for a, b in itertools.pairwise(cuts)]
    place, total = 0, torch.zeros((), dtype=torch.float64)
    for part in parts:
        count = part.units()["tokens"]
        assert part.total("tokens") == 20 and part.total("rows") == 8
        total += reduced(part, values[place : place + count], "tokens")
        place += count
    assert place == 20
    torch.testing.assert_close(total, values.mean())
    # Parts of parts: what is the whole's stays the whole's.
    assert whole.part(2, 7).part(1, 3).total("tokens") == 20


def test_a_part_in_which_nothing_counts_is_zero_and_so_is_a_batch():
    batch = next(texts().stream(0))
    empty = dataclasses.replace(batch, response=torch.zeros_like(batch.response))
    assert float(reduced(empty, torch.zeros(0), "tokens")) == 0


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (torch.zeros(20), r"shape \(20,\); give one value for each of the 8 rows; another unit is named: \(values, 'tokens'\)"),
        ((torch.zeros(8), "tokens"), r"shape \(8,\); give one value for each of the 20 tokens"),
        ((torch.zeros(8), "pixels"), "is counted in 'pixels', which this batch has none of; it has rows, tokens"),
        (torch.zeros(8, 1), r"shape \(8, 1\); give one value for each of the 8 rows"),
        (torch.tensor(1.0), r"shape \(\); .*a term that couples the batch is coupled\(function, \*outputs\)"),
        ((torch.tensor(1.0), "tokens"), r"shape \(\); .*coupled\(function, \*outputs\)"),
    ],
)
def test_what_is_no_term_is_one_line(term, says):
    with pytest.raises(UserError, match=f"loss term 'odd' (has )?{says}"):
        Reduction()(next(texts().stream(0)), {"odd": term})


@pytest.mark.parametrize("parts", [1, 3])
def test_a_coupled_function_that_gives_more_than_a_number_is_one_line(parts):
    run, net = make(micro_batches=parts), linear(outputs=3)
    with pytest.raises(UserError, match=r"the coupled loss term 'odd' has shape \(3,\); its function gives one number"):
        run.fit(net, lambda b: run.loss(b, odd=coupled(lambda x: x.mean(0), net(b.inputs))), batches())


# --- in a loop, against plain torch -----------------------------------------------------------------------------


def correlation(ours, theirs):
    """Pearson's, of all numbers of a batch: no sum over its rows."""
    a, b = (x.flatten() - x.mean() for x in (ours, theirs))
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def contrast(ours):
    """Every row against all others."""
    return nn.functional.cross_entropy(ours @ ours.T, torch.arange(len(ours)))


def norm_of_the_mean(ours):
    return ours.mean(0).square().sum().sqrt()


def gradients_of(net, loss, data, parts):
    """The gradient of the first update of a loop, and its terms."""
    seen, found = {}, {}

    def keep(terms, parameters):
        sum(terms.values()).backward()

    def after(terms):
        seen.update({name: float(value) for name, value in terms.items()})
        found.update({name: p.grad.clone() for name, p in net.named_parameters()})

    run = make(micro_batches=parts)
    run.loop([Learner(net, lambda b: run.loss(b, **loss(b)), after=after, backward=keep)], data, steps=1)
    return found, seen


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_coupled_terms_are_the_whole_batchs_in_value_and_gradient(parts):
    """Beside each other and beside a term that is summed over rows; against one pass over the whole batch without a loop."""
    data, theirs = batches(8), linear(outputs=4, seed=9)

    def terms(net, batch):
        ours = net(batch.inputs)
        return {
            "correlation": coupled(correlation, ours, theirs(batch.inputs).detach()),
            "contrast": coupled(contrast, ours),
            "norm": coupled(norm_of_the_mean, ours),
            "plain": ours.square().sum(1),
        }

    net, batch = linear(outputs=4), next(data.stream(0))
    ours = net(batch.inputs)
    expected = {
        "correlation": correlation(ours, theirs(batch.inputs).detach()),
        "contrast": contrast(ours),
        "norm": norm_of_the_mean(ours),
        "plain": ours.square().sum(1).mean(),
    }
    wanted = dict(zip(("weight", "bias"), torch.autograd.grad(sum(expected.values()), [net.weight, net.bias]), strict=True))
    found, seen = gradients_of(net, lambda b: terms(net, b), data, parts)
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value.item(), rel=1e-5), name
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


class Bag(nn.Module):
    """Logits of the next word from the word before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, batch):
        return self.table(batch.ids).flatten(0, 1)[batch.predicted.rows]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_terms_of_two_units_and_a_coupled_one_of_tokens(parts):
    """Rows of 1 to 4 tokens: a mean of the parts' means, or a coupling within each part, is another number."""
    data, net = texts(), Bag()

    def values(batch):
        return nn.functional.cross_entropy(net(batch), batch.predicted.labels, reduction="none")

    def loss(batch):
        own = values(batch)
        return {"tokens": (own, "tokens"), "rows": batch.per_sequence(own), "spread": coupled(lambda x: x.std(), own)}

    batch = next(data.stream(0))
    own = values(batch)
    expected = {"tokens": own.mean(), "rows": batch.per_sequence(own).mean(), "spread": own.std()}
    assert abs(expected["tokens"].item() - expected["rows"].item()) > 1e-3
    (wanted,) = torch.autograd.grad(sum(expected.values()), [net.table.weight])
    found, seen = gradients_of(net, loss, data, parts)
    assert seen == {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}
    torch.testing.assert_close(found["table.weight"], wanted, rtol=1e-4, atol=1e-6)


def test_a_coupled_loss_draws_the_same_noise_and_dropout_in_both_passes():
    """The outputs that the others were given are those that the gradient passes through."""
    data, drawn = batches(8), []

    def loss(net, run, batch):
        noisy = batch.inputs + batch.noise(batch.inputs.shape, "noise")
        ours = net(nn.functional.dropout(noisy, 0.5))
        drawn.append(ours.detach())
        return run.loss(batch, x=coupled(contrast, ours))

    run, net = make(micro_batches=2), linear(outputs=4)
    run.loop([Learner(net, lambda b: loss(net, run, b))], data, steps=1)
    # Where a coupled term is met, the first part's pass is broken off; one pass over all parts follows, and one for gradients.
    assert len(drawn) == 5
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[3]) and torch.equal(drawn[2], drawn[4])


def test_a_coupled_loss_asks_about_a_batch_once():
    for parts in (1, 2, 4):
        data = examples()
        oracle = ClassifierOracle(linear(outputs=4, seed=9), data)
        run, net = make(micro_batches=parts, oracles=[oracle]), linear(outputs=4)

        def loss(b, run=run, net=net, oracle=oracle):
            return run.loss(b, x=coupled(correlation, net(b.inputs), oracle.logits(b)))

        run.fit(net, loss, batches(8, data), steps=3)
        assert run.meter.counts["teacher_examples"] == run.meter.counts["student_examples"] == 24


@pytest.mark.parametrize("without", [0, 1])
def test_a_coupled_term_that_only_some_parts_have_is_one_line(without):
    net = linear(outputs=4)

    def terms(batch):
        ours = net(batch.inputs)
        mine = {"plain": ours.square().sum(1)}
        return mine if (batch.key.row > 0) == without else {**mine, "norm": coupled(norm_of_the_mean, ours)}

    with pytest.raises(UserError, match="the coupled loss term 'norm' is missing in a part of the batch; give it for all batches alike"):
        gradients_of(net, terms, batches(8), 2)


def test_outside_of_a_loop_a_coupled_term_is_its_function_of_what_it_is_given():
    batch, values = examples(3).take(torch.arange(3)), torch.tensor([1.0, 4.0])
    assert float(Reduction()(batch, {"x": coupled(lambda x: x.max(), values)})["x"]) == 4.0
    with pytest.raises(NeedsOutputs):
        Reduction(parts=2)(batch, {"x": coupled(lambda x: x.max(), values)})


# --- streams that are split otherwise ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Graph(Batches):
    """One whole graph, again and again."""

    data: object
    batch_size: int = 40
    indivisible = True

    def rows(self, position):
        return torch.arange(40)

    def take(self, request):
        return self.data.take(request.rows)


def test_a_batch_that_is_one_whole_is_never_split():
    run, net, seen = make(budget=200), linear(), []

    def loss(batch):
        seen.append(batch.index.tolist())
        return run.loss(batch, x=net(batch.inputs).square().sum(1))

    run.fit(net, loss, Graph(examples()))
    assert seen == 5 * [list(range(40))] and run.meter.counts["student_examples"] == 200
    for parts in (2, 50):
        run = make(budget=200, micro_batches=parts)
        with pytest.raises(UserError, match="a batch of this stream is one whole, so it cannot be split into micro-batches"):
            run.fit(net, loss, Graph(examples()))


@dataclasses.dataclass(frozen=True)
class Ranked(Batches):
    """Rows in the order of their first number, which takes the whole batch to know."""

    data: object
    batch_size: int = 8
    asked: list = dataclasses.field(default_factory=list)
    together = True

    def rows(self, position):
        return torch.arange(8) + 8 * (position % 5)

    def take(self, request):
        self.asked.append(len(request))
        return self.data.take(request.rows[self.data.inputs[request.rows, 0].argsort()])


@pytest.mark.parametrize("parts", [1, 3])
def test_a_stream_whose_rows_are_chosen_together_is_loaded_whole_and_cut_afterwards(parts):
    source, seen = Ranked(examples()), []
    run, net = make(micro_batches=parts), linear()

    def loss(batch):
        assert batch.total("rows") == 8
        seen.append((batch.inputs[:, 0], batch.noise((len(batch), 2), "x")))
        return run.loss(batch, x=net(batch.inputs).square().sum(1))

    run.fit(net, loss, source, steps=2)
    assert source.asked[:2] == [8, 8]  # never a part of one
    assert [len(x) for x, _ in seen] == 2 * {1: [8], 3: [2, 3, 3]}[parts]
    first, noise = (torch.cat([s[i] for s in seen[:parts]]) for i in (0, 1))
    assert torch.equal(first, first.sort().values)
    assert torch.equal(noise, keyed(next(Ranked(examples()).stream(0)), seed=SEEDS["noise"]).noise((8, 2), "x"))


def test_a_kind_of_batch_that_cannot_be_split_says_so():
    @dataclasses.dataclass(frozen=True)
    class Loose(Examples):
        def __len__(self):
            return 3

    with pytest.raises(NotImplementedError):
        Loose().part(0, 1)
