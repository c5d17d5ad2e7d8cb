"""What a Hugging Face ``config.json`` says about the KV cache of each layer: kind, window, heads, sharing.

Field names and kinds (``layer_types``) are those of the configuration classes of transformers 5.17, which
``tests/test_model_config.py`` compares the result with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq_core.layout import _count
from kvq_core.model_defaults import CLASS_DEFAULTS

# Kinds that keep keys and values, and the field that bounds how many tokens they see.
CACHED_KINDS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "hybrid": None,
    "hybrid_sliding": "sliding_window",
}
SLIDING_KINDS = ("sliding_attention", "hybrid_sliding")
# A recurrent state has one size for every context; kvq does not store it.
UNCACHED_KINDS = ("linear_attention", "mlp", "moe")

_OLD_KINDS = {"attention": "full_attention", "mamba": "linear_attention", "conv": "linear_attention"}
_NEMOTRON_KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_TEXT_CONFIGS = ("thinker_config", "text_config", "language_config", "llm_config")
_INHERITED = ("dtype", "torch_dtype", "quantization_config")
_ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}

# Fields that make layers differ in ways not read here: rather no answer than a wrong one.
_UNREAD_SHAPES = ("block_configs", "compress_ratios", "index_topk", "swa_num_key_value_heads", "use_cla")
_UNREAD_PATTERNS = ("attn_type_list", "block_types", "hybrid_layer_pattern", "linear_attn_config")


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of past tokens.

    Attributes:
        index: position of the layer in the model, from 0.
        kind: the word of ``layer_types``, e.g. ``"sliding_attention"``.
        window: tokens that a query of the layer sees at most; None if all.
        shares_kv_with: index of the earlier layer whose keys and values this one reads; None if it has its own.
        num_kv_heads: KV heads; 0 if the layer keeps no keys and values.
        head_dim: elements of a K row.
        head_dim_v: elements of a V row.
        kv_lora_rank: elements of the latent of MLA; 0 without MLA.
        rope_dim: elements of the rope part of MLA; 0 without MLA.
    """

    index: int
    kind: str
    window: int | None = None
    shares_kv_with: int | None = None
    num_kv_heads: int = 0
    head_dim: int = 0
    head_dim_v: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0


def text_config(config: Any) -> dict[str, Any]:
    """The part of ``config`` that describes the decoder, completed by the defaults of its ``model_type``.

    Args:
        config: a dict of ``config.json``, or a configuration object of transformers.

    Raises:
        TypeError: ``config`` is neither.
    """
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"expected a dict of a config.json or a transformers config; got {type(config).__name__}")
        config = config.to_dict()
    for name in _TEXT_CONFIGS:
        if inner := config.get(name):
            inherited = {field: inner.get(field) or config.get(field) for field in _INHERITED}
            return text_config({"model_type": f"{config.get('model_type')}_text", **inner, **inherited})
    return {**CLASS_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def read_layers(config: Any) -> tuple[LayerShape, ...]:
    """The shape of every layer's KV cache, in the order of the layers.

    Args:
        config: a dict of ``config.json``, or a configuration object of transformers.

    Raises:
        ValueError: a field is missing, or contradicts another.
        NotImplementedError: a kind of layer, or a field, that kvq does not know how to cache.
    """
    config = text_config(config)
    _refuse(config, _UNREAD_SHAPES)
    kinds = _layer_kinds(config)
    sources = _kv_sources(config, kinds)
    return tuple(
        _layer_shape(config, index, kind, source)
        for index, (kind, source) in enumerate(zip(kinds, sources, strict=True))
    )


def read_compute_dtype(config: Any) -> str:
    """The 16-bit dtype that the model computes in: its own, or bfloat16 if the file names none or float32."""
    config = text_config(config)
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return "float16" if name == "float16" else "bfloat16"


def _layer_kinds(config: dict[str, Any]) -> list[str]:
    kinds = _given_kinds(config)
    if kinds is None:
        _refuse(config, _UNREAD_PATTERNS)
        kinds = [_kind_by_pattern(config, index) for index in range(_field(config, "num_hidden_layers"))]
    expected = config.get("num_hidden_layers") or len(kinds)
    if len(kinds) != expected:
        raise ValueError(f"expected layer_types of num_hidden_layers={expected} layers; got {len(kinds)}")
    for index, kind in enumerate(kinds):
        if kind not in CACHED_KINDS and kind not in UNCACHED_KINDS:
            known = sorted([*CACHED_KINDS, *UNCACHED_KINDS])
            raise NotImplementedError(f"expected layers of the kinds {known}; layer {index} is {kind!r}")
    return kinds


def _given_kinds(config: dict[str, Any]) -> list[str] | None:
    """The kinds that the config spells out, under the names of transformers 5."""
    if given := config.get("layer_types") or config.get("layers_block_type"):
        return [_OLD_KINDS.get(str(kind), str(kind)) for kind in given]
    if given := config.get("hybrid_override_pattern"):
        return [_NEMOTRON_KINDS.get(letter, letter) for letter in str(given)]
    return None


def _kind_by_pattern(config: dict[str, Any], index: int) -> str:
    """The kind of a layer in a config without ``layer_types``."""
    if "full_attention_interval" in config:
        return "linear_attention" if (index + 1) % config["full_attention_interval"] else "full_attention"
    if "attn_layer_period" in config:
        period, offset = config["attn_layer_period"], config.get("attn_layer_offset", 0)
        return "full_attention" if index % period == offset else "linear_attention"
    if config.get("attention_chunk_size"):
        return "chunked_attention" if _rotates(config, index) else "full_attention"
    return "sliding_attention" if _slides(config, index) else "full_attention"


def _rotates(config: dict[str, Any], index: int) -> bool:
    """Llama 4: layers with rotary positions are chunked; ``no_rope_layers`` holds a 1 for each of them."""
    if given := config.get("no_rope_layers"):
        return bool(given[index])
    interval = config.get("no_rope_layer_interval")
    return interval is None or (index + 1) % interval != 0


def _slides(config: dict[str, Any], index: int) -> bool:
    if config.get("sliding_window") is None:
        return False
    if pattern := config.get("sliding_window_pattern"):
        forced_full = config.get("model_type") == "gemma4_text" and index == config["num_hidden_layers"] - 1
        return (index + 1) % _count("sliding_window_pattern", pattern) != 0 and not forced_full
    if not config.get("use_sliding_window", "max_window_layers" not in config):
        return False
    return index >= config.get("max_window_layers", 0)


def _kv_sources(config: dict[str, Any], kinds: list[str]) -> list[int | None]:
    """For each layer, the earlier one whose KV it reads: the last of its kind before the layers that share."""
    num_shared = config.get("num_kv_shared_layers") or 0
    first_shared = len(kinds) - num_shared
    own = {kind: index for index, kind in enumerate(kinds[: max(first_shared, 0)])}
    without = [kind for kind in kinds[max(first_shared, 0) :] if kind not in own]
    if without:
        raise ValueError(
            f"num_kv_shared_layers={num_shared} of {len(kinds)} layers leaves no earlier {without[0]!r} layer "
            "to share with"
        )
    return [own[kind] if index >= first_shared else None for index, kind in enumerate(kinds)]


def _layer_shape(config: dict[str, Any], index: int, kind: str, source: int | None) -> LayerShape:
    if kind in UNCACHED_KINDS:
        return LayerShape(index, kind)
    config = {**config, **_overrides(config, index, kind)}
    window_field = CACHED_KINDS[kind]
    window = None if window_field is None else _field(config, window_field)
    if config.get("kv_lora_rank"):
        return LayerShape(
            index,
            kind,
            window,
            source,
            num_kv_heads=1,
            kv_lora_rank=_field(config, "kv_lora_rank"),
            rope_dim=_field(config, "qk_rope_head_dim"),
        )
    head_dim = _head_dim(config)
    head_dim_v = config.get("v_head_dim") or head_dim
    return LayerShape(index, kind, window, source, _num_kv_heads(config), head_dim, head_dim_v)


def _overrides(config: dict[str, Any], index: int, kind: str) -> dict[str, Any]:
    """What this layer alone has: ``per_layer_config``, or the fields of Gemma 4's full-attention layers.

    ``attention_k_eq_v`` shares a projection and not the cache: K is rotated, V is not. It gates the head count.
    """
    if given := config.get("per_layer_config"):
        return next((given[key] for key in given if str(key).isdecimal() and int(key) == index), {})
    if kind != "full_attention" or not config.get("global_head_dim"):
        return {}
    num_kv_heads = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
    heads = {"num_key_value_heads": num_kv_heads} if num_kv_heads else {}
    return {"head_dim": config["global_head_dim"], **heads}


def _num_kv_heads(config: dict[str, Any]) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    given = config.get("num_key_value_heads") or config.get("num_kv_heads")
    return _field(config, "num_attention_heads") if given is None else _count("num_key_value_heads", given)


def _head_dim(config: dict[str, Any]) -> int:
    if config.get("head_dim"):
        return _field(config, "head_dim")
    hidden_size, num_q_heads = _field(config, "hidden_size"), _field(config, "num_attention_heads")
    if hidden_size % num_q_heads:
        raise ValueError(
            f"expected hidden_size to be a multiple of num_attention_heads; got {hidden_size} and {num_q_heads}. "
            "Add head_dim to the config."
        )
    return hidden_size // num_q_heads


def _field(config: dict[str, Any], name: str) -> int:
    """The count that the config gives under ``name`` or its older name."""
    value = config.get(name)
    if value is None:
        value = config.get(_ALIASES.get(name, name))
    if value is None:
        raise ValueError(f"expected the config.json of a decoder, with {name}; this one has none")
    return _count(name, value)


def _refuse(config: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if config.get(name):
            raise NotImplementedError(
                f"kvq does not read {name} of {config.get('model_type', 'this model')}, which changes what layers "
                "cache. Say it with layer_types, num_key_value_heads, head_dim or per_layer_config instead."
            )
