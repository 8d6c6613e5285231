"""A teacher's distributions from the top-k cache beside the same distributions computed online, at SmolLM2's shape."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from distillbench.problems.language_modeling.models import build
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.training.nets import Architecture

VOCAB = 49_152
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def test_cached_distributions(benchmark: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts.of(torch.randint(VOCAB, (8, 24), generator=generator).tolist(), "tokens", 0)
    texts = prompts.with_responses(torch.randint(1, VOCAB, (8, 48), generator=generator).tolist(), pad=0)
    teacher = build(Architecture("transformers", {"config": CONFIG}), 0)
    oracle = LanguageOracle(teacher, tokenizer="tokens", vocab=VOCAB, eos=0, seed=0, cache=tmp_path, top_k=50)
    oracle.remember(texts, now=True)
    batch = texts.take(torch.arange(8))
    oracle.distributions(batch, exact=True)
    start = time.perf_counter()
    oracle.distributions(batch, exact=True)
    online = time.perf_counter() - start
    benchmark.pedantic(lambda: oracle.distributions(batch), rounds=10, warmup_rounds=1)
    cached = benchmark.stats.stats.min
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.topk")) / batch.predicted.count
    print(f"\nonline {online:.2f} s, cached {1000 * cached:.1f} ms: {online / cached:.0f} times faster; {size:.1f} bytes per token on disk")
    assert online > 50 * cached
    assert size < 116
