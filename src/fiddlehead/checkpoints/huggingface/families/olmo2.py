"""OLMo 2."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.base import LAYER, LLAMA_MODULES, NO_BIAS, SETTINGS, SILU, Family
from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, LLAMA_SIZES

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    modules={
        **LLAMA_MODULES,
        "layers.*.post_attention_layernorm": LAYER + "post_attention_layernorm",
        "layers.*.post_mlp_layernorm": LAYER + "post_feedforward_layernorm",
    },
    fixed={"norm_placement": "post", "qk_layernorm": "projection"},
    settings={theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
    required=SILU | NO_BIAS,
    defaults=COMMON | LLAMA_SIZES | {"vocab_size": 50_304, "rms_norm_eps": 1e-5},
)
