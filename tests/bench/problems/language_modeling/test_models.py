"""Models of the transformers library as the engine sees them: padding, decoding, tied heads, configurations that do not fit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from distillbench.errors import UserError
from distillbench.problems.language_modeling.models import TransformersLM, adopt, build, load, load_tokenizer
from distillbench.suites.language_modeling.nets import rebuild
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

LLAMA = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
CONFIGS = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5},
}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 2.0}


def make(name, seed=0):
    return build(Architecture("transformers", {"config": CONFIGS[name]}), seed).eval()


@pytest.fixture(params=CONFIGS)
def net(request):
    return make(request.param)


def tokens(rows=3, width=7, seed=1):
    return torch.randint(20, (rows, width), generator=torch.Generator().manual_seed(seed))


def everything(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def assert_close(a, b, atol=2e-5):
    np.testing.assert_allclose(a.detach(), b.detach(), atol=atol, rtol=1e-4)


def test_logits_are_those_of_the_library(net):
    ids = tokens()
    whole = net.causal()
    assert not whole.training
    assert_close(net.logits(ids, everything(ids)), whole(input_ids=ids).logits)
    fresh = copy.deepcopy(net)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(0.1)
    assert_close(fresh.logits(ids, everything(ids)), fresh.causal()(input_ids=ids).logits)
    assert (fresh.logits(ids, everything(ids)) - net.logits(ids, everything(ids))).abs().max() > 0.01


def test_states_see_no_later_token(net):
    ids = tokens()
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 20
    assert_close(net(ids, everything(ids))[:, :4], net(other, everything(ids))[:, :4])
    assert (net(ids, everything(ids))[:, 4:] - net(other, everything(ids))[:, 4:]).abs().max() > 0.01


@pytest.mark.parametrize("pad", [1, 5])
def test_padding_on_both_sides_changes_no_state_and_no_gradient(net, pad):
    ids = tokens()

    def states(filler):
        wide = torch.nn.functional.pad(ids, (pad, 3), value=filler)
        return net(wide, torch.nn.functional.pad(everything(ids), (pad, 3), value=False))[:, pad:-3]

    plain = net(ids, everything(ids))
    parameters = list(net.body.parameters())
    slopes = torch.autograd.grad(plain.square().sum(), parameters)
    for filler in (0, 13):
        padded = states(filler)
        assert_close(padded, plain)
        for a, b in zip(torch.autograd.grad(padded.square().sum(), parameters), slopes, strict=True):
            assert_close(a, b, atol=2e-3)


def test_decoding_with_a_cache_is_the_forward_pass(net):
    ids = tokens(3, 9)
    attention = everything(ids)
    attention[0, :3], attention[1, :1] = False, False
    with torch.no_grad():
        whole = net(ids, attention)
        state, cache = net.decode(ids[:, :5], attention[:, :5])
        parts = [state]
        for until, n in ((6, 1), (8, 2), (9, 1)):  # speculative decoding feeds several at once
            state, cache = net.decode(ids[:, until - n : until], attention[:, :until], cache)
            parts.append(state)
    found = torch.cat(parts, 1)
    assert_close(found[attention], whole[attention])


def test_decoding_goes_on_over_a_row_that_has_ended(net):
    """A row that has stopped is fed tokens that are not attended to; the others are as if they were alone."""
    ids = tokens(2, 6)
    attention = everything(ids)
    attention[0, 4:] = False
    with torch.no_grad():
        _, cache = net.decode(ids[:, :4], attention[:, :4])
        _, cache = net.decode(ids[:, 4:5], attention[:, :5], cache)
        state, _ = net.decode(ids[:, 5:6], attention, cache)
        assert bool(torch.isfinite(state).all())
        assert_close(state[1:], net(ids[1:], everything(ids[1:]))[:, -1:])


def test_layers_begin_with_embeddings_and_end_with_the_states(net):
    ids = tokens()
    attention = everything(ids)
    layers = net.layers(ids, attention)
    assert len(layers) == 3
    assert_close(layers[-1], net(ids, attention))
    if net.config["model_type"] == "llama":
        assert_close(layers[0], net.body.get_input_embeddings()(ids))


def test_a_tied_projection_is_stored_once_and_trained_as_one():
    tied, free = make("llama-tied"), make("llama")
    assert len(free.state_dict()) == len(tied.state_dict()) + 1
    assert tied.head[0] is tied.body.get_input_embeddings().weight and tied.head[1] is None
    assert free.head[0] is not free.body.get_input_embeddings().weight
    gpt2 = make("gpt2")  # tied unless said otherwise
    assert gpt2.head[0] is gpt2.body.get_input_embeddings().weight
    whole = tied.causal()
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight


def test_an_exported_student_is_rebuilt(net):
    student = Student.from_bytes(Student.of(net).to_bytes())
    again = rebuild(student)
    ids = tokens()
    assert isinstance(again, TransformersLM) and not again.training
    assert torch.equal(again(ids, everything(ids)), net(ids, everything(ids)))


def test_seeds_make_weights_and_leave_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = make("llama", 1), make("llama", 1), make("llama", 2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.head[0], same.head[0]) and not torch.equal(one.head[0], other.head[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_the_library_is_adopted_and_a_folder_loaded(tmp_path, name):
    net = make(name, 3)
    whole, ids = net.causal(), tokens()
    adopted = adopt(whole)
    assert_close(adopted.logits(ids, everything(ids)), net.logits(ids, everything(ids)))
    Student.of(adopted)  # it can be exported
    whole.save_pretrained(tmp_path / "models" / name)
    loaded = load(f"models/{name}", tmp_path)
    assert_close(loaded.logits(ids, everything(ids)), net.logits(ids, everything(ids)))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    for ask in (load, load_tokenizer):
        with pytest.raises(UserError, match=r"models/none.*not found as a folder below"):
            ask(str(tmp_path / "models/none"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load("empty", tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "nonesuch"},
        {"model_type": None},
        {"model_type": "t5"},
        {**LLAMA, "hidden_size": -4},
        {**LLAMA, "hidden_size": "wide"},
        {**LLAMA, "num_attention_heads": 0},
        {**LLAMA, "num_hidden_layers": "two"},
        {**LLAMA, "vocab_size": 10**15},
        {**LLAMA, "hidden_act": "nonesuch"},
        {**LLAMA, "rope_parameters": 3},
        {**LLAMA, "vocab_size": 0},
    ],
    ids=lambda config: str({k: v for k, v in config.items() if LLAMA.get(k) != v}),
)
def test_configurations_that_make_no_model(config):
    with pytest.raises(UserError, match="is not one of a causal language model"):
        TransformersLM(config)


def test_two_tokens_are_a_vocabulary():
    assert TransformersLM({**LLAMA, "vocab_size": 2}).head[0].shape == (2, 16)


def test_code_that_a_configuration_names_is_never_loaded():
    odd = {
        **LLAMA,
        "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
        "_attn_implementation": "somebody/kernel",
        "attn_implementation": "somebody/kernel",
        "quantization_config": {"quant_method": "nonesuch"},
        "trust_remote_code": True,
    }
    net, ids = build(Architecture("transformers", {"config": odd}), 0).eval(), tokens()
    assert net.body.config._attn_implementation in ("sdpa", "eager")
    assert_close(net.logits(ids, everything(ids)), make("llama").logits(ids, everything(ids)))


def test_models_that_change_their_logits_are_refused():
    with pytest.raises(UserError, match="gemma2: its logits are not a linear map"):
        TransformersLM(GEMMA2)
    assert TransformersLM({**GEMMA2, "final_logit_softcapping": None}).head[0].shape == (20, 16)
    with pytest.raises(UserError, match="gemma2: its logits are not a linear map"):
        TransformersLM({**GEMMA2, "final_logit_softcapping": 30.0, "initializer_range": 0.02})


def test_models_that_look_ahead_are_refused():
    bert = {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(UserError, match="bert: its states see later tokens"):
        TransformersLM(bert)
