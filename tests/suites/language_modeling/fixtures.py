"""Small files in the formats of the language models' paper settings: tokenizers, checkpoints in transformers' format, JSONL."""

import json

import torch

TEXT = "the river bends twice before it meets a quiet harbour where seven boats wait for morning and nobody hurries"
WORDS = TEXT.split()


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS), (count, 6), generator=generator).tolist()
    return [" ".join(WORDS[w] for w in row) for row in rows]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def tokenizer(entries=330, beginning=False, seed=0):
    """A byte-level BPE of ``entries`` entries; its last ones are the special tokens. ``beginning``: it puts <s> before a text."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(sentences(300, seed), vocab_size=entries, show_progress=False, special_tokens=["<|endoftext|>", "<s>"])
    backend = raw._tokenizer
    if beginning:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>")


def write_gpt2(folder, seed, rows, width=16, layers=1, words=None):
    """A GPT-2 with ``rows`` rows in its projection, which is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=rows, n_embd=width, n_layer=layers, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)


def write_llama(folder, seed, rows, width=16, layers=1, words=None):
    """A Llama with ``rows`` rows in its projection, which is not tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (words or tokenizer(beginning=True)).save_pretrained(folder)
