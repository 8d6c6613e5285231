"""The judge on texts: what it must not depend on, its intervals, and what it refuses."""

import numpy as np
import pytest
import torch

from distillbench.errors import UserError
from distillbench.problems.language_modeling import models as language_models
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Prompts, Texts
from distillbench.suites.speculative.judge import blocks, draft_cost, judge, pooled
from distillbench.training.nets import Architecture

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def model(seed, **changes):
    return language_models.build(Architecture("transformers", {"config": {**CONFIG, **changes}}), seed).eval()


TARGET, DRAFT = model(0), model(1, num_hidden_layers=1)


def sampled(target=TARGET, vocab=64, pad=0):
    prompts = Prompts.of([[3, 4, 5], [6], [9, 10], [7, 7, 7, 7]], "letters", 0)
    uniforms = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    ids, real = respond(target, prompts, uniforms, eos=0, vocab=vocab)
    texts = Texts.join(prompts, torch.arange(4), ids, real)
    if not pad:
        return texts
    both = [torch.nn.functional.pad(x, (pad, pad)) for x in (texts.ids, texts.attention, texts.response)]
    return Texts(*both, texts.index, texts.tokenizer, "padded")


def values(*args, **kwargs):
    return {m.metric: m for m in judge(*args, **{"vocab": 64, **kwargs})}


def test_acceptance_is_one_minus_tv_at_every_response_token():
    texts = sampled()
    with torch.no_grad():
        p, q = (m.logits(texts.ids, texts.attention).softmax(2) for m in (TARGET, DRAFT))
    here = texts.response[:, 1:]
    expected = torch.minimum(p, q).sum(2)[:, :-1][here].mean()
    agree = (p.argmax(2) == q.argmax(2))[:, :-1][here].double().mean()
    found = values(TARGET, DRAFT, texts)
    assert found["acceptance"].value == pytest.approx(float(expected), abs=1e-5)
    assert found["acceptance_greedy"].value == pytest.approx(float(agree), abs=1e-12)
    assert found["acceptance"].n == len(texts)


def test_one_block_by_hand():
    # three tokens, one proposal per block: 1 call, then another unless the first was accepted (its bonus token is the second), ...
    a = torch.tensor([[0.9, 0.5, 0.25]])
    calls, accepted = blocks(a, torch.ones(1, 3, dtype=torch.bool), 1)
    second = 1 - 0.9
    third = 0.9 + second * (1 - 0.5)
    assert calls.item() == pytest.approx(1 + second + third)
    assert accepted.item() == pytest.approx(0.9 + second * 0.5 + third * 0.25)


def test_padding_and_chunks_change_nothing():
    plain = values(TARGET, DRAFT, sampled())
    for other in (values(TARGET, DRAFT, sampled(pad=5)), values(TARGET, DRAFT, sampled(), chunk=3)):
        for name, m in plain.items():
            assert other[name].value == pytest.approx(m.value, rel=1e-5), name
            assert m.per_example is None or other[name].per_example == pytest.approx(m.per_example, rel=1e-4)


def test_padding_of_the_vocabulary_changes_nothing():
    class Wider(language_models.LanguageModel):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids, attention):
            return self.inner(ids, attention)

        @property
        def head(self):
            weight, _ = self.inner.head
            return torch.cat([weight, torch.full((8, weight.shape[1]), 3.0)]), None

        def decode(self, ids, attention, cache=None):
            return self.inner.decode(ids, attention, cache)

    plain, wide = values(TARGET, DRAFT, sampled()), values(Wider(TARGET).eval(), Wider(DRAFT).eval(), sampled())
    for name in ("acceptance", "acceptance_greedy", "block_efficiency_4"):
        assert wide[name].value == pytest.approx(plain[name].value, rel=1e-6)


def test_a_draft_that_is_the_target_is_always_accepted_and_never_pays():
    found = values(TARGET, TARGET, sampled())
    assert found["acceptance"].value == found["acceptance_greedy"].value == found["draft_cost"].value == 1
    tokens = sampled().response.sum(1)
    for gamma in range(1, 9):
        calls = (tokens + gamma) // (gamma + 1)
        assert found[f"block_efficiency_{gamma}"].value == pytest.approx(float(tokens.sum() / calls.sum()))
    assert found["predicted_speedup"].value <= 1


def test_the_prediction_is_the_best_gamma_at_the_cost_in_flops():
    found = values(TARGET, DRAFT, sampled())
    layer = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # projections of one layer, grouped keys and values
    head = 2 * 32 * 64
    assert found["draft_cost"].value == pytest.approx((layer + head) / (2 * layer + head), rel=0.1)  # attention itself is the rest
    cost = draft_cost(TARGET, DRAFT, sampled())
    best = max(found[f"block_efficiency_{g}"].value / (g * cost + 1) for g in range(1, 9))
    assert found["predicted_speedup"].value == pytest.approx(best)


def test_models_keep_their_mode():
    draft = model(1, num_hidden_layers=1, attention_dropout=0.9).train()
    first, second = values(TARGET, draft, sampled()), values(TARGET, draft, sampled())
    assert first == second
    assert draft.training and not TARGET.training


def test_intervals_of_a_ratio_cover_it():
    random = np.random.default_rng(0)
    inside = []
    for _ in range(600):
        per = random.integers(1, 12, 80).astype(float)
        of = per * random.beta(2, 2, 80) * (0.5 + per / 24)  # long texts score higher: the mean of ratios is another number
        m = pooled("x", torch.tensor(of), torch.tensor(per))
        error = np.std(m.per_example, ddof=1) / np.sqrt(m.n)
        assert np.mean(m.per_example) == pytest.approx(m.value, rel=1e-6)
        lengths = np.arange(1, 12)
        truth = np.mean(lengths * 0.5 * (0.5 + lengths / 24)) / np.mean(lengths)
        inside.append(abs(m.value - truth) < 1.99 * error)
    assert 0.92 < np.mean(inside) < 0.98


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 0.0}, "above 0"), ({"gammas": [0, 2]}, "at least 1"), ({"gammas": []}, "at least one")],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        values(TARGET, DRAFT, sampled(), **changes)


def test_texts_without_responses_are_refused():
    texts = sampled()
    empty = Texts(texts.ids, texts.attention, torch.zeros_like(texts.response), texts.index, texts.tokenizer, "")
    with pytest.raises(UserError, match="nothing to judge"):
        values(TARGET, DRAFT, empty)
