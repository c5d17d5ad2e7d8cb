"""What the configuration class of a model type assumes where a ``config.json`` is silent, as nested ones often are.

The values are those of transformers 5.17, except ``sliding_window_pattern`` and ``full_attention_interval``, which its
classes hold in code. ``tests/test_model_config.py`` compares both with the classes.
"""

from __future__ import annotations

from typing import Any

_GEMMA = {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_QWEN_HYBRID = {"head_dim": 256, "full_attention_interval": 4}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "gemma2": {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 6},
    "gemma3n_text": {
        **_GEMMA,
        "num_hidden_layers": 35,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
    },
    "gemma4_text": {
        **_GEMMA,
        "num_hidden_layers": 30,
        "global_head_dim": 512,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gpt_oss": {
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama4_text": {
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_5_text": {**_QWEN_HYBRID, "num_key_value_heads": 4},
    "qwen3_next": {**_QWEN_HYBRID, "num_key_value_heads": 2},
}
