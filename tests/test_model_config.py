"""What configs say about layers, against the configuration classes of transformers and against literals."""

from __future__ import annotations

import pytest

from kvq_core.model_config import LayerShape, read_compute_dtype, read_layers
from kvq_core.model_defaults import CLASS_DEFAULTS
from tests.model_configs import CONFIGS

DENSE = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512}
# Fields that transformers keeps in code or under another name; the layers they lead to are compared instead.
IN_CODE = {"sliding_window_pattern", "full_attention_interval", "global_head_dim"}


def transformers_config(config):
    from transformers import AutoConfig

    return AutoConfig.for_model(**config).get_text_config()


def shapes_by_transformers(config):
    """(kind, window, KV heads, head_dim, latent) of every layer that has a cache slot in transformers."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    model = transformers_config(config)
    kinds, options = get_layer_types_and_kwargs(model)
    for index, kind in enumerate(kinds):
        layer = model.per_layer_config[index] if model.is_heterogeneous else model
        window = options["sliding_window"] if kind in ("sliding_attention", "chunked_attention") else None
        latent = getattr(layer, "kv_lora_rank", 0)
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        if kind in ("linear_attention", "mlp"):
            yield kind, None, 0, 0, 0
        else:
            yield kind, window, 1 if latent else num_kv_heads(layer), head_dim, latent


def num_kv_heads(layer):
    if layer.model_type == "falcon":  # transformers asks for multi_query in the attention layer
        return layer.num_kv_heads if layer.new_decoder_architecture or not layer.multi_query else 1
    return layer.num_key_value_heads


def shapes_by_kvq(config):
    for shape in read_layers(config):
        if shape.shares_kv_with is None:
            yield shape.kind, shape.window, shape.num_kv_heads, shape.head_dim or shape.rope_dim, shape.kv_lora_rank


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_are_those_of_transformers(config):
    assert list(shapes_by_kvq(config)) == list(shapes_by_transformers(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_object_of_transformers_reads_like_its_file(config):
    from transformers import AutoConfig

    model = AutoConfig.for_model(**config)
    assert read_layers(model) == read_layers(config)
    assert read_layers(model.to_dict()) == read_layers(config)


@pytest.mark.parametrize("model_type", CLASS_DEFAULTS)
def test_defaults_are_those_of_transformers(model_type):
    fields = transformers_config({"model_type": model_type}).to_dict()
    if "use_sliding_window" in fields:
        del fields["sliding_window"]  # cleared where it is not used
    for name, default in CLASS_DEFAULTS[model_type].items():
        assert name in IN_CODE or fields.get(name, default) == default
    sizes = {name: fields[name] for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")}
    given = {"model_type": model_type, **sizes}
    assert list(shapes_by_kvq(given)) == list(shapes_by_transformers({"model_type": model_type}))


def test_sharing_layers_read_the_last_layer_of_their_kind_that_has_its_own():
    shapes = read_layers(CONFIGS["gemma-4-E2B-it"])
    assert {shape.shares_kv_with for shape in shapes[:15]} == {None}
    assert [shape.shares_kv_with for shape in shapes[15:]] == [13, 13, 13, 13, 14] * 4
    assert shapes[13] == LayerShape(13, "sliding_attention", 512, None, 1, 256, 256)
    assert shapes[34] == LayerShape(34, "full_attention", None, 14, 1, 512, 512)


def test_gemma_4_counts_the_heads_of_full_layers_apart_where_k_and_v_share_a_projection():
    shapes = read_layers(CONFIGS["gemma-4-31B-it"])
    assert shapes[4] == LayerShape(4, "sliding_attention", 1024, None, 16, 256, 256)
    assert shapes[5] == LayerShape(5, "full_attention", None, None, 4, 512, 512)
    apart = {**CONFIGS["gemma-4-31B-it"]["text_config"], "attention_k_eq_v": False}
    assert read_layers(apart)[5] == LayerShape(5, "full_attention", None, None, 16, 512, 512)


def test_latents_have_one_head():
    assert set(read_layers(CONFIGS["DeepSeek-V3"])[60:]) == {
        LayerShape(60, "full_attention", num_kv_heads=1, kv_lora_rank=512, rope_dim=64)
    }


@pytest.mark.parametrize(
    ("changes", "sliding"),
    [
        ({"sliding_window": 64}, [0, 1, 2, 3]),
        ({"sliding_window": None}, []),
        ({"sliding_window": 64, "max_window_layers": 3}, []),
        ({"sliding_window": 64, "max_window_layers": 3, "use_sliding_window": True}, [3]),
        ({"sliding_window": 64, "use_sliding_window": False}, []),
        ({"sliding_window": 64, "sliding_window_pattern": 2}, [0, 2]),
        ({"sliding_window": None, "sliding_window_pattern": 2}, []),
        ({"sliding_window": 64, "layer_types": ["attention", "sliding_attention", "mamba", "full_attention"]}, [1]),
        ({"model_type": "gemma4", "text_config": {**DENSE}}, [0, 1, 2]),  # the last layer of Gemma 4 is always full
    ],
)
def test_the_window_of_a_layer(changes, sliding):
    shapes = read_layers({**DENSE, **changes})
    assert [shape.index for shape in shapes if shape.window] == sliding
    assert all(shape.kind == "sliding_attention" for shape in shapes if shape.window)


def test_chunks_are_windows_of_the_layers_that_rotate():
    shapes = read_layers({**DENSE, "attention_chunk_size": 128, "no_rope_layers": [1, 0, 1, 1]})
    assert [shape.window for shape in shapes] == [128, None, 128, 128]
    assert [shape.window for shape in read_layers({**DENSE, "attention_chunk_size": 128})] == [128] * 4


@pytest.mark.parametrize(
    ("changes", "heads", "head_dim", "head_dim_v"),
    [
        ({}, 8, 64, 64),
        ({"num_key_value_heads": None, "head_dim": None}, 8, 64, 64),
        ({"num_key_value_heads": 2, "head_dim": 128}, 2, 128, 128),
        ({"head_dim": 192, "v_head_dim": 128}, 8, 192, 128),
        ({"multi_query": True}, 1, 64, 64),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4}, 4, 64, 64),
    ],
)
def test_heads_of_a_layer(changes, heads, head_dim, head_dim_v):
    shape = read_layers({**DENSE, **changes})[0]
    assert (shape.num_kv_heads, shape.head_dim, shape.head_dim_v) == (heads, head_dim, head_dim_v)


def test_a_layer_may_have_its_own_fields():
    shapes = read_layers({**DENSE, "per_layer_config": {"02": {"head_dim": 32}, 3: {"num_key_value_heads": 2}}})
    assert [(shape.num_kv_heads, shape.head_dim) for shape in shapes] == [(8, 64), (8, 64), (8, 32), (2, 64)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "with num_hidden_layers; this one has none"),
        ({"num_attention_heads": None}, "with num_attention_heads"),
        ({"hidden_size": None}, "with hidden_size"),
        ({"num_hidden_layers": "4"}, "expected num_hidden_layers to be an integer from 1; got '4'"),
        ({"num_key_value_heads": [8, 4]}, r"expected num_key_value_heads .*got \[8, 4\]"),
        ({"num_attention_heads": 7}, "got 512 and 7. Add head_dim"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers=4 layers; got 1"),
        ({"layer_types": ["sliding_attention"] * 4}, "with sliding_window"),
        ({"layer_types": ["chunked_attention"] * 4}, "with attention_chunk_size"),
        ({"kv_lora_rank": 512}, "with qk_rope_head_dim"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4 of 4 layers leaves no earlier 'full_attention'"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers=9 of 4"),
        (
            {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3 + ["hybrid"]},
            "no earlier 'hybrid' layer to share with",
        ),
    ],
)
def test_a_config_that_lacks_or_contradicts_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_layers({**DENSE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3 + ["deepseek_sparse_attention"]}, "layer 3 is 'deepseek_sparse_attent"),
        ({"hybrid_override_pattern": "M*-X"}, "layer 3 is 'X'"),
        ({"index_topk": 2048, "model_type": "deepseek_v32"}, "does not read index_topk of deepseek_v32"),
        ({"block_types": ["recurrent", "attention"]}, "does not read block_types"),
    ],
)
def test_what_is_not_understood_is_not_guessed(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        read_layers({**DENSE, **changes})


def test_layer_types_answer_for_a_pattern_that_is_not_read():
    shapes = read_layers({**DENSE, "attn_type_list": [0, 1], "layer_types": ["full_attention"] * 4})
    assert [shape.kind for shape in shapes] == ["full_attention"] * 4


@pytest.mark.parametrize("config", [None, "config.json", [DENSE]])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(TypeError, match=r"expected a dict of a config\.json"):
        read_layers(config)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "bfloat16"),
        ({"dtype": "float16", "text_config": {"dtype": None}}, "float16"),
        ({"dtype": "float32", "text_config": {"dtype": "float16"}}, "float16"),
    ],
)
def test_the_compute_dtype_has_16_bits(config, dtype):
    assert read_compute_dtype(config) == dtype
