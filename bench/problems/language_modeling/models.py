"""What the engine needs of a causal language model: states, an output projection, and decoding one token at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.training.nets import Architecture


class LanguageModel(nn.Module):
    """A causal language model: logits at t are a linear map (:attr:`head`) of the state at t, which has seen tokens 0 to t.

    A subclass gives ``forward``, :attr:`head` and :meth:`decode`. Positions whose ``attention`` is false are never seen by others.

    Attributes:
        libraries: packages besides torch that compute its states; their versions are part of the key of what is cached about it.
    """

    libraries: tuple[str, ...] = ()

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """States before the projection.   ids: (B, T) int64, attention: (B, T) bool -> (B, T, D)."""
        raise NotImplementedError

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output projection: weight (V, D) and bias (V,) or None."""
        raise NotImplementedError

    def decode(self, ids: Tensor, attention: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """The states of the newest tokens.   ids: (B, n) int64, what ``cache`` has not seen; attention: (B, total) bool, all so far.

        Returns (B, n, D) and what the next call gets as ``cache``.
        """
        raise NotImplementedError

    def project(self, states: Tensor) -> Tensor:
        """Logits (..., V) of states (..., D)."""
        weight, bias = self.head
        return F.linear(states, weight, bias)

    def logits(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Logits (B, T, V), all at once: for small vocabularies and few tokens. Losses take states and the projection."""
        return self.project(self(ids, attention))


class TransformersLM(LanguageModel):
    """A model of the transformers library, by its configuration. A projection tied to the embeddings is stored once.

    Raises:
        UserError: the configuration is not one of a causal language model, its states see later tokens, or its logits are not a linear
            map of its last states.
    """

    libraries = ("transformers",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model = _causal(config)
        head = model.get_output_embeddings()
        self.config = config
        self.body = model.base_model
        tied = head.weight is self.body.get_input_embeddings().weight
        self.output = None if tied else head
        _check(self, model)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output projection: the embeddings where they are tied."""
        if self.output is None:
            return self.body.get_input_embeddings().weight, None
        return self.output.weight, self.output.bias

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The last states (B, T, D). Positions count real tokens, so that padding on the left changes nothing."""
        states: Tensor = self.body(input_ids=ids, attention_mask=attention, position_ids=_positions(attention), use_cache=False)[0]
        return states

    def layers(self, ids: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
        """The embeddings and the states after every layer, (B, T, D) each; the last after the final norm."""
        out = self.body(
            input_ids=ids, attention_mask=attention, position_ids=_positions(attention), use_cache=False, output_hidden_states=True
        )
        return tuple(out.hidden_states)

    def decode(self, ids: Tensor, attention: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """As :meth:`LanguageModel.decode`, with the library's key-value cache."""
        positions = _positions(attention)[:, -ids.shape[1] :]
        out = self.body(input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.last_hidden_state, out.past_key_values

    def causal(self) -> Any:
        """The library's own model over the same weights, in evaluation mode: for its ``generate`` and ``save_pretrained``."""
        model = _causal(self.config)
        model.base_model.load_state_dict(self.body.state_dict(), assign=True)
        if self.output is None:
            model.tie_weights()
        else:
            model.get_output_embeddings().load_state_dict(self.output.state_dict(), assign=True)
        return model.eval()


def _positions(attention: Tensor) -> Tensor:
    return (attention.long().cumsum(1) - 1).clamp(min=0)


OTHERS_CODE = ("auto_map", "trust_remote_code", "quantization_config", "attn_implementation", "experts_implementation", "kernel_config")


def _quiet() -> None:
    """No bars and no notices of transformers between ours, unless somebody asks for them: what goes wrong is raised."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _causal(config: dict[str, Any]) -> Any:
    """A fresh model of the library. No code but the library's own is ever loaded: a configuration may name kernels on the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    known = {k: v for k, v in config.items() if k != "model_type" and k not in OTHERS_CODE and not k.startswith("_")}
    kind = config.get("model_type")
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(kind), **known), trust_remote_code=False)
        ids = torch.arange(3)[None] % len(model.get_input_embeddings().weight)
        with torch.no_grad():
            model.eval()(input_ids=ids)
    except Exception as error:  # a configuration comes from a record and may be anything, and so may what the library raises
        raise UserError(f"configuration of type {kind!r} is not one of a causal language model: {_first(error)}") from error
    return model.train()


def _check(ours: TransformersLM, model: Any) -> None:
    """Some configurations make a model look ahead, which would let a student read what it is to predict.

    Some models cap or scale their logits after the projection: with those, losses fused with it would be wrong. Fresh weights give
    logits too small for a cap to show, so they are made as large as 1,000 on their way.
    """
    vocab = len(model.get_input_embeddings().weight)
    ids = torch.arange(3)[None] % vocab
    with torch.no_grad():
        model.eval()
        states, other = (ours.body(input_ids=x, use_cache=False)[0] for x in (ids, torch.tensor([[0, 1, 3]]) % vocab))
        found = ours.project(states)
        scale = 1000 / found.abs().max().clamp(min=1e-6)
        hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits * scale)
        expected = model(input_ids=ids).logits
        hook.remove()
        model.train()
    if not torch.allclose(states[:, :2], other[:, :2], rtol=1e-5, atol=1e-6):
        raise UserError(f"{model.config.model_type}: its states see later tokens; give a configuration of a causal (decoder) model")
    if not torch.allclose(found * scale, expected, rtol=1e-4, atol=0.01):
        raise UserError(f"{model.config.model_type}: its logits are not a linear map of its last states (capped or scaled); not supported")


def build(architecture: Architecture, seed: int) -> TransformersLM:
    """The network of ``Architecture("transformers", {"config": ...})`` with fresh weights from ``seed``.

    Raises:
        UserError: as :class:`TransformersLM`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs, whose state is not put back
        net = TransformersLM(dict(architecture.arguments["config"]))
    net.architecture = architecture  # type: ignore[assignment]
    return net


def adopt(model: Any) -> TransformersLM:
    """A transformers model that was loaded, as a :class:`LanguageModel` in float32 that can be exported."""
    # to_diff_dict leaves out what transformers' defaults say, which keeps records short; where the weights came from and which version of
    # the library read them is no part of the architecture: equal students must have equal bytes
    provenance = ("quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype", "dtype", "transformers_version")
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in provenance}
    net = build(Architecture("transformers", {"config": config}), 0)
    net.body.load_state_dict(model.base_model.state_dict())
    if net.output is not None:
        net.output.load_state_dict(model.get_output_embeddings().state_dict())
    return net.train(model.training)  # what was loaded answers without dropout, as it does in the library


def load(name: str, data: Path | None = None) -> TransformersLM:
    """A model by the name of a folder (below ``data``, or as it is) or an id on the hub; safetensors only, in float32.

    Raises:
        UserError: it is not there or cannot be read, or weights are missing from it; says what was tried.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _quiet()
    place = _place(name, data)
    loaded: Any  # a pair, which the library's types do not know
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name}: not found as a folder{f' below {data}' if data else ''} or on the hub: {_first(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"model {name}: its weights are damaged or of another shape than its configuration: {_first(error)}") from error
    model, about = loaded
    if about["missing_keys"]:  # the library would make them up
        raise UserError(f"model {name}: weights are missing from it, for example {min(about['missing_keys'])}; fetch or save it again")
    return adopt(model)


def load_tokenizer(name: str, data: Path | None = None) -> Any:
    """The tokenizer that lies beside a model, by the same names.

    Raises:
        UserError: as :func:`load`.
    """
    from transformers import AutoTokenizer

    _quiet()
    try:
        return AutoTokenizer.from_pretrained(_place(name, data), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"tokenizer of {name}: not found as a folder{f' below {data}' if data else ''} or on the hub: {_first(error)}"
        ) from error


def _place(name: str, data: Path | None) -> str:
    inside = None if data is None else data / name
    return str(inside) if inside is not None and inside.is_dir() else name


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
