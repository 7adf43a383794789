"""Tiny randomly initialized language models with a word tokenizer, made in memory: nothing is downloaded."""

from __future__ import annotations

from typing import Any

_TEXT = (
    "the a of is in not and we you my city country rain sun tea cat dog red blue green one two three paris osaka lima"
)
WORDS = (*_TEXT.split(), "france", "japan", "peru", ".", ",", "?")


def tokenizer(encoder: bool = False) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def causal(kind: str = "llama", seed: int = 0) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    vocabulary = len(WORDS) + 4
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=24, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3
        )
        return transformers.GPT2LMHeadModel(config).eval()
    # its logits are capped by a tanh, so its head is not linear
    config = transformers.Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        final_logit_softcapping=2.0,
        sliding_window=64,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def bert(seed: int = 0) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.BertModel(config).eval()
