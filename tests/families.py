"""Every causal type that transformers knows, made tiny by one rule: what the sweep over families runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, PLACES = 50, 64
SIZES = {
    16: "d_model n_embd embedding_size lru_width linear_key_head_dim kv_channels state_size "
    "word_embed_proj_dim ssm_state_size dim_model_base mamba_d_state attention_head_size laurel_rank "
    "hidden_size_per_layer_input d_embed emb_dim embedding_dim index_head_dim input_embedding_size "
    "output_embedding_size ple_embed_dim mamba_d_ssm prompt_mid_dim adapter_rank d_rel "
    "backbone_hidden_size",
    32: "hidden_size attention_hidden_size",
    48: "intermediate_size d_ff ffn_dim dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_inner "
    "intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size feed_forward_size shared_experts_intermediate_size "
    "dense_intermediate_size moe_shared_expert_intermediate_size router_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k num_encoder_layers num_decoder_layers num_encoder_attention_heads "
    "num_decoder_attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
    "index_n_heads num_query_groups swa_num_attention_heads swa_num_key_value_heads ngram "
    "num_layers_per_stack",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers num_nextn_predict_layers max_window_layers n_groups "
    "mamba_n_groups mamba_ngroups num_mem_blocks block_multiple_of moe_layer_start_index",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim mamba_dt_rank "
    "time_step_rank zero_expert_num num_centroids centroid_intermediate_top_k",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank linear_head_dim "
    "d_kv linear_value_head_dim dim_head d_head swa_head_dim window_size sliding_window "
    "attention_window_size sliding_window_size chunk_size attention_chunk_size local_attention "
    "mamba_chunk_size o_lora_rank mamba_d_head mamba_head_dim mamba_headdim gated_norm_rank index_topk "
    "num_buckets relative_max_distance",
    PLACES: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length "
    "position_bias_num_buckets position_bias_max_distance rel_extent",
    0: "num_kv_shared_layers",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
RATES = ("dropout", "drop_prob", "pdrop", "layerdrop", "dropout_prob", "dropout_rate")
LOUD = {"gemma4_text": 2}  # so that rounding stays small
ENCODERS = tuple(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
OWN: dict[str, dict] = {  # what the rule does not find out
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "codegen": {"n_head": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "helium": {"head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlstm": {"embedding_dim": 32, "hidden_size": 32, "num_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 50)
    | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
}
NOT_MADE = {  # of several models; their text types stand in the list
    kind: "several models; see its text type"
    for kind in "blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified git "
    "got_ocr2 mllama gemma4_unified_assistant moshi moss_transcribe_diarize musicgen musicgen_melody".split()
} | dict.fromkeys(
    ("cohere_compass_text", "dbrx", "mimo_v2_flash", "qwen4_exp", "qwen4_exp_text", "zamba", "zamba2"),
    "no tiny one of it runs by this rule",
)


def types() -> list[str]:
    """All causal types; those of encoders, which look both ways, as decoders too."""
    found = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in NOT_MADE]
    return sorted([*found, *(f"{kind} as_decoder" for kind in ENCODERS)])


@contextlib.contextmanager
def quiet():
    """What transformers says on the way is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _keys_of(cls) -> dict:
    """The small values of what a configuration's class has, and of the configurations in it."""
    mapped, parts = getattr(cls, "attribute_map", {}), getattr(cls, "sub_configs", {})
    known = {f.name: f.default for f in dataclasses.fields(cls)} | dict.fromkeys(mapped, 1)
    keys = {n: SMALL[n] for n, v in known.items() if n in SMALL and not isinstance(v, list | dict)}
    keys |= {n: 0.0 for n, v in known.items() if isinstance(v, float) and n.endswith(RATES)}
    keys = {n: v for n, v in keys.items() if mapped.get(n, n) == n or mapped[n] not in keys}
    try:
        kinds = list(dict.fromkeys(cls().layer_types))[:4]  # one layer of each kind
    except (AttributeError, TypeError, ValueError):
        kinds = []
    if len(kinds) > 1 and {"layer_types", "num_hidden_layers"} <= {f.name for f in dataclasses.fields(cls)}:
        keys |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    of_parts = {n: _keys_of(c) for n, c in parts.items() if dataclasses.is_dataclass(c)}
    return keys | {n: part for n, part in of_parts.items() if part}


def config_of(kind: str, **more):
    """A tiny configuration."""
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    kind, _, is_decoder = kind.partition(" ")
    if is_decoder:
        special["is_decoder"] = True
    return CONFIG_MAPPING[kind](**{**_keys_of(CONFIG_MAPPING[kind]), **special, **OWN.get(kind, {}), **more})


def made(kind: str, seed: int = 0, **more):
    """A random model in evaluation mode, float32, whose attention is far from uniform."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(kind, **more)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(LOUD.get(kind, 4))
    return model
