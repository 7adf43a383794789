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


_SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
# weights of state-space models, small enough for a word's trace to fade over a text
_SCAN = {"hidden_size": 24, "num_hidden_layers": 4, "state_size": 8, "initializer_range": 0.3}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral, window 4": ("mistral", {**_GROUPED, "head_dim": 6, "sliding_window": 4}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "phi": ("phi", {**_GROUPED, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "phi3": ("phi3", {**_GROUPED, "pad_token_id": 0}),
    # its logits are capped by a tanh, so its head is not linear
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 64}),
    "gemma3 (text), window 4": ("gemma3_text", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "gpt2": ("gpt2", {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}),
    "gpt_neo": (
        "gpt_neo",
        {**_SHAPE, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
    ),
    "gptj": (
        "gptj",
        {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 6, "initializer_range": 0.3},
    ),
    "gpt_neox": ("gpt_neox", _SHAPE),
    "opt": ("opt", {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.3}),
    "bloom (ALiBi)": ("bloom", {"hidden_size": 24, "n_layer": 4, "n_head": 4, "initializer_range": 0.3}),
    "falcon (ALiBi)": ("falcon", {**_SHAPE, "alibi": True}),
    "falcon (rotary)": ("falcon", {**_SHAPE, "alibi": False}),
    "mpt (ALiBi)": ("mpt", {"d_model": 24, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.3}),
    "cohere": ("cohere", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", _GROUPED),
    "granite": ("granite", {**_GROUPED, "logits_scaling": 4.0}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "mamba": ("mamba", _SCAN),
    "mamba2": ("mamba2", {**_SCAN, "num_heads": 6, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", _SCAN),
    "bamba (hybrid)": (
        "bamba",
        {
            **_GROUPED,
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "jamba (hybrid)": (
        "jamba",
        {
            **_GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next (hybrid)": (
        "qwen3_next",
        {
            **_GROUPED,
            **_LINEAR,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "recurrent_gemma (hybrid)": ("recurrent_gemma", {**_GROUPED, "lru_width": 24, "attention_window_size": 64}),
    "gemma3n (text)": (
        "gemma3n_text",
        {
            **_GROUPED,
            "head_dim": 8,
            "vocab_size_per_layer_input": 40,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": None,
            "sliding_window": 8,
        },
    ),
    "xlnet": ("xlnet", {"d_model": 24, "n_layer": 4, "n_head": 4, "d_inner": 48, "initializer_range": 0.3}),
    "bert as decoder": ("bert", {**_SHAPE, "is_decoder": True}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _SHAPE),
    "roberta": ("roberta", {**_SHAPE, "pad_token_id": 1}),
    "xlm-roberta": ("xlm-roberta", {**_SHAPE, "pad_token_id": 1}),
    "camembert": ("camembert", {**_SHAPE, "pad_token_id": 1}),
    "electra": ("electra", {**_SHAPE, "embedding_size": 16}),
    "mpnet": ("mpnet", {**_SHAPE, "pad_token_id": 1}),
    "esm": ("esm", {**_SHAPE, "pad_token_id": 0, "position_embedding_type": "rotary"}),
    "deberta-v2": (
        "deberta-v2",
        {**_SHAPE, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "distilbert": (
        "distilbert",
        {
            "dim": 24,
            "hidden_dim": 48,
            "n_layers": 4,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        },
    ),
    "convbert": ("convbert", {**_SHAPE, "embedding_size": 24, "conv_kernel_size": 3}),
    "longformer": ("longformer", {**_SHAPE, "attention_window": 8, "pad_token_id": 1}),
    "modernbert": (
        "modernbert",
        {
            **_SHAPE,
            "local_attention": 4,
            "pad_token_id": 0,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "initializer_cutoff_factor": 2.0,
        },
    ),
    "fnet": ("fnet", {**_SHAPE, "pad_token_id": 0}),
    "albert": ("albert", {**_SHAPE, "embedding_size": 16}),
    "t5 encoder": (
        "t5",
        {"d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 4, "num_heads": 4, "initializer_factor": 1.0},
    ),
    "bart encoder": (
        "bart",
        {
            "d_model": 24,
            "encoder_layers": 4,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "init_std": 0.3,
        },
    ),
}


_PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_TURNS = {"type": "mrope", "mrope_section": [1, 1, 1], "rope_type": "default"}
# their language part is read; the vision tower has as many blocks
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3 (with vision)": (
        "gemma3",
        {
            "text_config": {**_GROUPED, "head_dim": 8, "sliding_window": 4, "model_type": "gemma3_text"},
            "vision_config": {**_PICTURES, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "llava": (
        "llava",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_PICTURES, "model_type": "clip_vision_model"},
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": {**_GROUPED, "head_dim": 6, "model_type": "mistral"},
            "vision_config": {**_PICTURES, "head_dim": 8, "model_type": "pixtral"},
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "text_config": {**_GROUPED, "rope_scaling": _TURNS, "model_type": "qwen2_vl_text"},
            "vision_config": {"depth": 4, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4},
        },
    ),
    "paligemma": (
        "paligemma",
        {
            "text_config": {**_GROUPED, "head_dim": 8, "model_type": "gemma"},
            "vision_config": {**_PICTURES, "model_type": "siglip_vision_model"},
            "projection_dim": 24,
        },
    ),
}
FAMILIES = {**DECODERS, **MULTIMODAL, **ENCODERS}


def config(family: str, **more: Any) -> Any:
    import pytest
    import transformers

    kind, options = FAMILIES[family]
    version = transformers.__version__
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {version} has no {kind}")
    words = len(WORDS) + 4
    if family in MULTIMODAL:
        # what stands for a picture in a text: the last words, which no test uses
        name = "image_token_id" if "qwen" in family else "image_token_index"
        options = {**options, "text_config": {**options["text_config"], "vocab_size": words}, name: words - 1}
        return transformers.AutoConfig.for_model(kind, **options, **more)
    return transformers.AutoConfig.for_model(kind, **{"vocab_size": words, **options, **more})


def built(family: str, seed: int = 0, **more: Any) -> Any:
    """A model of a family with random weights, with its head if it writes text.

    Where a version of transformers has no such family, or builds it from other options, the test is skipped.
    """
    import pytest
    import torch
    import transformers

    made = config(family, **more)
    torch.manual_seed(seed)
    names = ["AutoModel"]
    if family in DECODERS:
        names = ["AutoModelForCausalLM"]
    elif family in MULTIMODAL:
        names = ["AutoModelForImageTextToText", "AutoModelForVision2Seq"]
    factory = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    try:
        model = factory.from_config(made)
    except Exception as error:
        if int(transformers.__version__.split(".")[0]) >= 5:
            raise
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {family}: {error}")
    for name, parameter in model.named_parameters():
        if "position" in name or "wpe" in name:
            parameter.data.normal_(0, 0.5)
    return model.eval()


def causal(kind: str = "llama", seed: int = 0) -> Any:
    return built(kind, seed)


def bert(seed: int = 0) -> Any:
    return built("bert", seed, num_hidden_layers=3)
