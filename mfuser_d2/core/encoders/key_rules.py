"""Names of the publishers' encoder files against the names of timm and open_clip, which this package uses."""

from __future__ import annotations

from mfuser_d2.core.key_map import Rule, concatenate, prefixed, rename, split, transform

_QKV = ("q_proj", "k_proj", "v_proj")


EVA02_VISION: list[Rule] = [
    rename("blocks.{}.attn.q_bias", "blocks.{}.attn.q_proj.bias"),
    rename("blocks.{}.attn.v_bias", "blocks.{}.attn.v_proj.bias"),
    rename("blocks.{}.attn.inner_attn_ln.{}", "blocks.{}.attn.norm.{}"),
    rename("blocks.{}.mlp.w1.{}", "blocks.{}.mlp.fc1_g.{}"),
    rename("blocks.{}.mlp.w2.{}", "blocks.{}.mlp.fc1_x.{}"),
    rename("blocks.{}.mlp.ffn_ln.{}", "blocks.{}.mlp.norm.{}"),
    rename("blocks.{}.mlp.w3.{}", "blocks.{}.mlp.fc2.{}"),
    rename("**", "**"),
]
"""The vision half of `EVA02_CLIP_*.pt`, without its `visual.` prefix and rotary tables."""

_SIGLIP_MLP = [rename("mlp.fc1.{}", "mlp.fc1.{}"), rename("mlp.fc2.{}", "mlp.fc2.{}")]

SIGLIP_VISION: list[Rule] = [
    rename("embeddings.patch_embedding.{}", "patch_embed.proj.{}"),
    transform("embeddings.position_embedding.weight", "pos_embed", lambda t: t[None], lambda t: t[0]),
    *[
        concatenate([f"encoder.layers.{{}}.self_attn.{name}.{kind}" for name in _QKV], f"blocks.{{}}.attn.qkv.{kind}")
        for kind in ("weight", "bias")
    ],
    rename("encoder.layers.{}.self_attn.out_proj.{}", "blocks.{}.attn.proj.{}"),
    rename("encoder.layers.{}.layer_norm1.{}", "blocks.{}.norm1.{}"),
    rename("encoder.layers.{}.layer_norm2.{}", "blocks.{}.norm2.{}"),
    *prefixed(_SIGLIP_MLP, "encoder.layers.{}.", "blocks.{}."),
    rename("post_layernorm.{}", "norm.{}"),
    rename("head.probe", "attn_pool.latent"),
    split("head.attention.in_proj_weight", ["attn_pool.q.weight", "attn_pool.kv.weight"], [1, 2]),
    split("head.attention.in_proj_bias", ["attn_pool.q.bias", "attn_pool.kv.bias"], [1, 2]),
    rename("head.attention.out_proj.{}", "attn_pool.proj.{}"),
    rename("head.layernorm.{}", "attn_pool.norm.{}"),
    *prefixed(_SIGLIP_MLP, "head.", "attn_pool."),
]
"""`vision_model.*` of Hugging Face's SigLIP state dict."""

SIGLIP_TEXT: list[Rule] = [
    rename("embeddings.token_embedding.weight", "token_embedding.weight"),
    rename("embeddings.position_embedding.weight", "positional_embedding"),
    *[
        concatenate(
            [f"encoder.layers.{{}}.self_attn.{name}.{kind}" for name in _QKV],
            f"transformer.resblocks.{{}}.attn.in_proj_{kind}",
        )
        for kind in ("weight", "bias")
    ],
    rename("encoder.layers.{}.self_attn.out_proj.{}", "transformer.resblocks.{}.attn.out_proj.{}"),
    rename("encoder.layers.{}.layer_norm1.{}", "transformer.resblocks.{}.ln_1.{}"),
    rename("encoder.layers.{}.layer_norm2.{}", "transformer.resblocks.{}.ln_2.{}"),
    rename("encoder.layers.{}.mlp.fc1.{}", "transformer.resblocks.{}.mlp.c_fc.{}"),
    rename("encoder.layers.{}.mlp.fc2.{}", "transformer.resblocks.{}.mlp.c_proj.{}"),
    rename("final_layer_norm.{}", "ln_final.{}"),
    rename("head.{}", "text_projection.{}"),
]
"""`text_model.*` of Hugging Face's SigLIP state dict."""
