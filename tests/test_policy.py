"""Which layer gets which mode: literals of real models, and what skip_layers means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_core import CacheLayout, MLALayout, policy
from kvq_core.policy import layer_policies
from tests.model_configs import CONFIGS

TEN_LAYERS = {"num_hidden_layers": 10, "num_attention_heads": 4, "head_dim": 64, "hidden_size": 256}
ALTERNATING = {**TEN_LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 5, "sliding_window": 128}


def modes(layers):
    return [layer.kv_cache_dtype for layer in layers]


def skipped(skip_layers, config=ALTERNATING):
    """Indices of the layers that stay in bfloat16."""
    layers = layer_policies(config, "int8_per_token_head", skip_layers=skip_layers)
    assert set(modes(layers)) <= {"bfloat16", "int8_per_token_head"}
    return [layer.index for layer in layers if layer.kv_cache_dtype == "bfloat16"]


# Bytes of a token of all layers: 2 x heads x head_dim x 2 in bfloat16, 2 x heads x (head_dim + 4) in int8.
@pytest.mark.parametrize(
    ("name", "bfloat16", "int8"),
    [
        ("Llama-7B", 32 * 16384, 32 * 8448),
        ("Llama-3.1-8B", 32 * 4096, 32 * 2112),
        ("Qwen2.5-7B-Instruct", 28 * 2048, 28 * 1056),
        ("Phi-3-mini-4k-instruct", 32 * 12288, 32 * 6400),
        ("gemma-2-9b", 42 * 8192, 42 * 4160),
        ("gemma-3-4b-it", 34 * 4096, 34 * 2080),
        ("gemma-3n-E4B-it", 20 * 2048, 20 * 1040),
        ("gemma-4-E2B-it", 12 * 1024 + 3 * 2048, 12 * 520 + 3 * 1032),
        ("gemma-4-31B-it", 50 * 16384 + 10 * 8192, 50 * 8320 + 10 * 4128),
        ("gpt-oss-20b", 24 * 2048, 24 * 1088),
        ("Llama-4-Scout-17B-16E", 48 * 4096, 48 * 2112),
        ("Qwen3-Next-80B-A3B", 12 * 2048, 12 * 1040),
        ("DeepSeek-V3", 61 * 1152, 61 * (512 + 4 + 128)),
        ("starcoder", 40 * 512, 40 * 264),
        ("falcon-7b", 32 * 256, 32 * 136),
        ("falcon-40b", 60 * 2048, 60 * 1088),
    ],
)
def test_bytes_of_a_token_of_real_models(name, bfloat16, int8):
    for mode, expected in (("bfloat16", bfloat16), ("int8_per_token_head", int8)):
        assert sum(layer.bytes_per_token for layer in layer_policies(CONFIGS[name], mode)) == expected


def test_every_layer_has_its_mode_and_layout():
    layers = layer_policies(
        CONFIGS["gpt-oss-20b"], "fp8/int8_per_token_head", skip_layers=["sliding_window", "last:1"], page_size=32
    )
    quantized = CacheLayout("fp8_e4m3/int8_per_token_head", page_size=32, num_kv_heads=8, head_dim=64)
    plain = CacheLayout("bfloat16", page_size=32, num_kv_heads=8, head_dim=64)
    assert [layer.index for layer in layers] == list(range(24))
    assert [layer.kind for layer in layers] == ["sliding_attention", "full_attention"] * 12
    assert [layer.window for layer in layers] == [128, None] * 12
    assert [layer.layout for layer in layers] == [plain, quantized] * 11 + [plain, plain]
    assert [layer.is_quantized for layer in layers] == [False, True] * 11 + [False, False]
    assert modes(layers[:2]) == ["bfloat16", "fp8_e4m3/int8_per_token_head"]


def test_mla_layers_have_latent_layouts():
    layers = layer_policies(CONFIGS["DeepSeek-V3"], "int8_per_token_head", page_size=64, skip_layers="first:1")
    assert layers[0].layout == MLALayout("bfloat16", page_size=64)
    assert layers[1].layout == MLALayout("int8_per_token_head", page_size=64)
    assert (layers[0].is_quantized, layers[1].is_quantized) == (False, True)


def test_recurrent_layers_keep_nothing():
    layers = layer_policies(CONFIGS["Qwen3-Next-80B-A3B"], "fp8", skip_layers="first:3")
    assert modes(layers) == [None, None, None, "fp8_e4m3"] * 12
    assert {layer.layout for layer in layers[:3]} == {None}
    assert [layer.bytes_per_token for layer in layers[:4]] == [0, 0, 0, 1024]
    assert [layer.owns_pages for layer in layers[:4]] == [False, False, False, True]


def test_sharing_layers_read_the_layout_of_their_source_and_own_no_bytes():
    layers = layer_policies(CONFIGS["gemma-4-E2B-it"], "int8_per_token_head", skip_layers="sliding_window")
    for layer in layers[15:]:
        source = layers[14 if layer.kind == "full_attention" else 13]
        assert (layer.layout, layer.kv_cache_dtype) == (source.layout, source.kv_cache_dtype)
        assert (layer.owns_pages, layer.bytes_per_token) == (False, 0)
    assert modes(layers[13:16]) == ["bfloat16", "int8_per_token_head", "bfloat16"]


def test_layers_with_one_cache_are_skipped_together():
    assert skipped("last:1", CONFIGS["gemma-4-E2B-it"]) == [14, 19, 24, 29, 34]
    assert skipped(13, CONFIGS["gemma-4-E2B-it"]) == [13, *(index for index in range(15, 35) if index % 5 != 4)]


@pytest.mark.parametrize(
    ("skip_layers", "indices"),
    [
        ((), []),
        ("", []),
        (3, [3]),
        ("3", [3]),
        ([0, "9"], [0, 9]),
        ("2-4", [2, 3, 4]),
        ("2-2", [2]),
        (range(2, 5), [2, 3, 4]),
        ([range(0, 10, 4)], [0, 4, 8]),
        ("sliding_window", [0, 2, 4, 6, 8]),
        ("first:2", [0, 1]),
        ("last:2", [8, 9]),
        ("first:10", list(range(10))),
        ("sliding_window, last:1,3-3", [0, 2, 3, 4, 6, 8, 9]),
        (["first:1,5", "last:1"], [0, 5, 9]),
    ],
)
def test_the_words_of_skip_layers(skip_layers, indices):
    assert skipped(skip_layers) == indices


@given(st.sets(st.integers(0, 9)))
def test_any_set_of_indices_can_be_skipped(indices):
    assert skipped(",".join(map(str, indices))) == sorted(indices)


@pytest.mark.parametrize(
    "word", ["sliding", "full_attention", "first", "first:", "last:x", "-1", "1:3", "2-", "1.5", "first:-1", "3 4"]
)
def test_an_unknown_word_lists_the_known_ones(word):
    with pytest.raises(ValueError, match=r"'a-b'.*'sliding_window', 'first:N' or 'last:N'; got ") as error:
        skipped(["sliding_window", word])
    assert repr(word) in str(error.value)


@pytest.mark.parametrize("item", ["10", "8-10", "4-2", "first:11", "last:11", "first:0", range(-1, 2), range(0)])
def test_layers_outside_the_model_are_refused(item):
    with pytest.raises(ValueError, match="name layers from 0 to 9; got "):
        skipped([item])


def test_layers_that_slide_beside_a_state_have_a_sliding_window():
    kinds = ["hybrid", "hybrid_sliding"] * 5
    assert skipped("sliding_window", {**TEN_LAYERS, "layer_types": kinds, "sliding_window": 64}) == [1, 3, 5, 7, 9]


def test_sliding_window_is_a_word_for_every_model():
    assert skipped("sliding_window", TEN_LAYERS) == []


@pytest.mark.parametrize(
    ("config", "compute_dtype", "expected"),
    [
        (TEN_LAYERS, None, "bfloat16"),
        ({**TEN_LAYERS, "torch_dtype": "float16"}, None, "float16"),
        ({**TEN_LAYERS, "torch_dtype": "float16"}, "float32", "float32"),
    ],
)
def test_skipped_layers_and_auto_are_stored_in_the_compute_dtype(config, compute_dtype, expected):
    layers = layer_policies(config, "int8_per_token_head", skip_layers="first:1", compute_dtype=compute_dtype)
    assert modes(layers[:2]) == [expected, "int8_per_token_head"]
    assert modes(layer_policies(config, "auto", compute_dtype=compute_dtype)) == [expected] * 10


@pytest.mark.parametrize(
    ("kv_cache_dtype", "options", "message"),
    [
        ("int4", {}, r"one of \['bfloat16', .*got 'int4'"),
        ("fp8/fp8/fp8", {}, "3 parts"),
        ("fp8", {"page_size": 0}, "expected page_size to be an integer from 1; got 0"),
        ("fp8", {"compute_dtype": "fp8"}, "expected compute_dtype .*got 'fp8'"),
    ],
)
def test_a_malformed_request_is_refused(kv_cache_dtype, options, message):
    with pytest.raises(ValueError, match=message):
        layer_policies(TEN_LAYERS, kv_cache_dtype, **options)


def test_an_unsupported_head_dim_names_its_layer_and_how_to_mend_it():
    open_llama_3b = {"num_hidden_layers": 26, "num_attention_heads": 32, "hidden_size": 3200}
    with pytest.raises(NotImplementedError, match=r"layer 0 \(full_attention\): .*got 100\. Pad the head with zeros"):
        layer_policies(open_llama_3b, "bfloat16")


def test_mla_has_no_pairs_and_names_its_modes():
    with pytest.raises(ValueError, match=r"no K and V sides.*got 'bfloat16/fp8_e4m3'"):
        layer_policies(CONFIGS["DeepSeek-V2-Lite"], "bfloat16/fp8")
    with pytest.raises(NotImplementedError, match=r"layer 0 \(full_attention\): .*got 'fp8_e5m2'"):
        layer_policies(CONFIGS["DeepSeek-V2-Lite"], "fp8_e5m2")


def test_import_kvq_core_brings_the_policy():
    assert policy.layer_policies is layer_policies
