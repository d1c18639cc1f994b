"""How many H100s fine-tune each model, and with which layout."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """How the GPUs train: the fastest that `fiddlehead plan RECIPE --fit` finds."""

    micro_batch_size: int
    activation_checkpointing: str | float | None = None
    tensor_parallel: int = 1
    context_parallel: int = 1


FINETUNING: dict[str, dict[str, dict[int, Layout]]] = {
    "gemma2_2b": {
        "full": {1: Layout(4), 2: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "gemma2_9b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective"), 4: Layout(4)},
    },
    "gemma2_27b": {
        "full": {8: Layout(4, "full")},
        "lora": {1: Layout(1, "selective"), 2: Layout(4, "full"), 4: Layout(8, "full")},
    },
    "gemma3_1b": {
        "full": {1: Layout(16)},
        "lora": {1: Layout(16)},
    },
    "gemma3_4b": {
        "full": {1: Layout(2, "selective"), 2: Layout(4)},
        "lora": {1: Layout(8)},
    },
    "gemma3_12b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "gemma3_27b": {
        "full": {8: Layout(4, "full")},
        "lora": {1: Layout(1, "selective"), 2: Layout(4, "full"), 4: Layout(8, "full")},
    },
    "gpt2_124m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "gpt2_355m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "gpt2_774m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "gpt2_1p5b": {
        "full": {1: Layout(16)},
        "lora": {1: Layout(16)},
    },
    "gpt3_175b": {
        "full": {64: Layout(4, "selective", tensor_parallel=8)},
        "lora": {16: Layout(2, "full")},
        "qlora": {2: Layout(2, "full"), 4: Layout(4, "full")},
    },
    "gpt_oss_20b": {
        "full": {8: Layout(4)},
        "lora": {1: Layout(2), 2: Layout(8, 0.5), 8: Layout(4)},
    },
    "granite3_2b": {
        "full": {1: Layout(4), 4: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "granite3_8b": {
        "full": {2: Layout(16, "full"), 4: Layout(4, "selective")},
        "lora": {1: Layout(4), 4: Layout(8, "selective")},
    },
    "llama2_7b": {
        "full": {2: Layout(16, "full"), 4: Layout(8, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective"), 8: Layout(4)},
    },
    "llama2_13b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "llama2_70b": {
        "full": {32: Layout(8, "selective", tensor_parallel=8)},
        "lora": {8: Layout(4, "full")},
        "qlora": {1: Layout(2, "full"), 2: Layout(4, "full")},
    },
    "llama3_8b": {
        "full": {2: Layout(4, "full"), 4: Layout(4, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "llama3_70b": {
        "full": {32: Layout(8, "selective", tensor_parallel=8)},
        "lora": {8: Layout(4, "full")},
        "qlora": {1: Layout(2, "full"), 2: Layout(4, "full")},
    },
    "llama31_8b": {
        "full": {2: Layout(4, "full"), 4: Layout(4, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "llama31_70b": {
        "full": {32: Layout(8, "selective", tensor_parallel=8)},
        "lora": {8: Layout(4, "full")},
        "qlora": {1: Layout(2, "full"), 2: Layout(4, "full")},
    },
    "llama31_405b": {
        "full": {256: Layout(1, tensor_parallel=8)},
        "lora": {32: Layout(2, "full", context_parallel=32)},
        "qlora": {8: Layout(2, "full")},
    },
    "llama32_1b": {
        "full": {1: Layout(16)},
        "lora": {1: Layout(16)},
    },
    "llama32_3b": {
        "full": {1: Layout(2), 2: Layout(8, "selective"), 4: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "mistral_7b": {
        "full": {2: Layout(1, tensor_parallel=2), 4: Layout(8, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective"), 8: Layout(4)},
    },
    "mistral_nemo_12b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "mixtral_8x7b": {
        "full": {16: Layout(16, 0.5, context_parallel=8)},
        "lora": {4: Layout(4, 0.5)},
    },
    "olmo2_1b": {
        "full": {1: Layout(16)},
        "lora": {1: Layout(16)},
    },
    "olmo2_7b": {
        "full": {2: Layout(16, "full"), 4: Layout(4)},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "olmo2_13b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "olmo2_32b": {
        "full": {8: Layout(4, "full")},
        "lora": {1: Layout(4, "full"), 2: Layout(2, "full"), 4: Layout(8, "full")},
    },
    "phi3_mini": {
        "full": {1: Layout(1), 2: Layout(8, "selective"), 4: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "phi4": {
        "full": {4: Layout(8, "full"), 8: Layout(8, "selective", tensor_parallel=2)},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "qwen25_500m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "qwen25_1p5b": {
        "full": {1: Layout(8)},
        "lora": {1: Layout(16), 2: Layout(8)},
    },
    "qwen25_3b": {
        "full": {1: Layout(2), 2: Layout(8, "selective"), 4: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "qwen25_7b": {
        "full": {2: Layout(16, "full"), 4: Layout(8, "selective", tensor_parallel=2), 8: Layout(8, tensor_parallel=2)},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "qwen25_14b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 4: Layout(4, "selective")},
    },
    "qwen25_32b": {
        "full": {16: Layout(8, "selective", tensor_parallel=8)},
        "lora": {1: Layout(4, "full"), 2: Layout(1, "full"), 4: Layout(8, "full")},
    },
    "qwen25_72b": {
        "full": {32: Layout(8, "selective", tensor_parallel=8)},
        "lora": {8: Layout(4, "full")},
        "qlora": {1: Layout(2, "full"), 2: Layout(4, "full")},
    },
    "qwen3_600m": {
        "full": {1: Layout(16)},
        "lora": {1: Layout(16)},
    },
    "qwen3_1p7b": {
        "full": {1: Layout(8)},
        "lora": {1: Layout(16)},
    },
    "qwen3_4b": {
        "full": {1: Layout(1, "selective"), 2: Layout(4)},
        "lora": {1: Layout(8), 2: Layout(8, "selective"), 4: Layout(8)},
    },
    "qwen3_8b": {
        "full": {4: Layout(4, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "qwen3_14b": {
        "full": {4: Layout(8, "full"), 8: Layout(8, "selective", tensor_parallel=2)},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
    "qwen3_32b": {
        "full": {16: Layout(8, "selective", tensor_parallel=8)},
        "lora": {1: Layout(4, "full"), 2: Layout(1, "full"), 4: Layout(8, "full")},
    },
    "qwen3_30b_a3b": {
        "full": {8: Layout(4, 0.5)},
        "lora": {1: Layout(1), 2: Layout(2, 0.5), 4: Layout(8, 0.5)},
    },
    "smollm2_135m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "smollm2_360m": {
        "full": {1: Layout(32)},
        "lora": {1: Layout(32)},
    },
    "smollm2_1p7b": {
        "full": {1: Layout(8)},
        "lora": {1: Layout(16), 2: Layout(8)},
    },
    "starcoder2_3b": {
        "full": {1: Layout(2), 2: Layout(8)},
        "lora": {1: Layout(8)},
    },
    "starcoder2_7b": {
        "full": {2: Layout(1, tensor_parallel=2), 4: Layout(8, "selective")},
        "lora": {1: Layout(4), 2: Layout(8, "selective")},
    },
    "starcoder2_15b": {
        "full": {4: Layout(8, "full"), 8: Layout(4, "selective")},
        "lora": {1: Layout(2), 2: Layout(4, "selective")},
    },
}
"""For each model, for all its weights ("full") and for adapters ("lora"): the layouts from a number of GPUs on.

"qlora" is for frozen weights in 4 bits, where these need fewer GPUs; they were planned and not measured.

The least number is the fewest with enough memory for rows of 2,048 tokens. With more, the layout for the next smaller
number is used.
"""
