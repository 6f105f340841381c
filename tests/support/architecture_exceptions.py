"""Values for tiny configurations: by name for all model types, and what single types need."""

from typing import Any

LISTS = {
    "number of layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "num_decoder_layers",
        "encoder_layers",
        "depth",
    )
}

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    # widths
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "n_inner": 128,
    "d_ff": 128,
    "mlp_dim": 128,
    "projection_dim": 64,
    "out_hidden_size": 64,
    "projector_hidden_size": 64,
    # heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "head_dim": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 64,
    # lengths
    "max_position_embeddings": 512,
    "n_positions": 512,
    "sliding_window": 32,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # layers of parts that are not the decoder
    "num_encoder_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}

EXCEPTIONS: dict[str, dict[str, Any]] = {}
