"""``python -m kvq_core plan``: what it prints, for people and for machines, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvq_core.__main__ import main
from tests.model_configs import CONFIGS

ROOT = Path(__file__).parents[1]
REQUEST = ("--kv-cache-dtype", "int8_per_token_head", "--gpu-memory", "141GB")
ABSENT = ("torch", "jax", "jaxlib", "triton", "rich", "transformers")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on a model's config and returns what it prints."""

    def run(name, *arguments):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIGS[name]))
        main(["plan", str(path), *arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the command and returns its last line, which must be an error of status 2."""

    def refuse(*arguments):
        (tmp_path / "llama.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
        with pytest.raises(SystemExit) as ended:
            main(["plan", *(str(tmp_path / "llama.json") if each == "LLAMA" else each for each in arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


def test_the_command_of_the_issue_runs_without_torch_jax_and_rich(tmp_path):
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt-oss-20b"]))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-m", "kvq_core", "plan", str(tmp_path / "config.json"), *REQUEST]
    command += ["--skip-layers", "sliding_window", "--context", "131072", "--json"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(printed.stdout)["bytes_per_token"] == 12 * 2048 + 12 * 1088
    assert not printed.stderr
    for name in ABSENT:  # the environment does what it claims
        imported = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert f"{name} was imported" in imported.stderr


def test_json_is_the_plan_in_figures(run):
    printed = json.loads(
        run("gemma-4-E2B-it", *REQUEST, "--skip-layers", "sliding_window", "--context", "32768", "--json")
    )
    layers = printed.pop("layers")
    assert layers[0] == {
        "index": 0,
        "kind": "sliding_attention",
        "kv_cache_dtype": "bfloat16",
        "bytes_per_token": 1024.0,
        "num_pages": layers[0]["num_pages"],
        "window": 512,
        "shares_kv_with": None,
        "fingerprint": "kvq1-tail-k:bfloat16-v:bfloat16-p16-h1-dk256-dv256",
    }
    assert [layers[index]["bytes_per_token"] for index in (13, 14, 15, 34)] == [1024.0, 1032.0, 0.0, 0.0]
    assert (layers[34]["shares_kv_with"], layers[34]["window"], layers[34]["num_pages"]) == (14, None, 0)
    assert layers[34]["kv_cache_dtype"] == "int8_per_token_head"
    assert isinstance(printed.pop("advice")[0], str)
    # 12 windows of 33 pages of 16384 bytes and 3 layers of 2048 pages: 16512 bytes in int8, 32768 in bfloat16.
    sequence, sequence_bfloat16 = 107937792, 207814656
    sequences = 141_000_000_000 // sequence
    rest = (141_000_000_000 - sequences * sequence - 12 * 33 * 16384) // (3 * 16512) * 16
    rest_bfloat16 = (141_000_000_000 - 678 * sequence_bfloat16 - 12 * 33 * 16384) // (3 * 32768) * 16
    assert layers[14]["num_pages"] == sequences * 2048 + rest // 16
    assert printed == {
        "kv_cache_dtype": "int8_per_token_head",
        "skip_layers": ["sliding_window"],
        "page_size": 16,
        "context": 32768,
        "memory": 141_000_000_000,
        "bytes_per_token": 12 * 1024.0 + 3 * 1032,
        "bytes_per_sequence": sequence,
        "sequences": sequences,
        "tokens": sequences * 32768 + rest,
        "tokens_bfloat16": 678 * 32768 + rest_bfloat16,
        "bandwidth": 4e12,
        "decode_us": pytest.approx((28 * 512 * 1024 + 7 * 32768 * 1032) / 4e6),
        "decode_us_bfloat16": pytest.approx((28 * 512 * 1024 + 7 * 32768 * 2048) / 4e6),
    }


def test_recurrent_layers_have_neither_mode_nor_bytes(run):
    layers = json.loads(run("Qwen3-Next-80B-A3B", *REQUEST, "--json"))["layers"]
    assert layers[0] == {
        "index": 0,
        "kind": "linear_attention",
        "kv_cache_dtype": None,
        "bytes_per_token": 0.0,
        "num_pages": 0,
        "window": None,
        "shares_kv_with": None,
        "fingerprint": None,
    }


def test_the_table_groups_layers_and_compares_modes(run):
    text = run("gpt-oss-20b", *REQUEST, "--weights", "41GB", "--skip-layers", "sliding_window", "last:1")
    lines = [line.split() for line in text.splitlines()]
    assert "100.00 GB for KV pages (41.00 GB of weights taken off), sequences of 131072 tokens" in text
    evens = ",".join(str(index) for index in range(0, 22, 2))
    odds = ",".join(str(index) for index in range(1, 23, 2))
    assert [f"{evens},22", "sliding_attention", "128", "bfloat16", "8", "x", "64", "2048"] in lines
    assert [odds, "full_attention", "-", "int8_per_token_head", "8", "x", "64", "1088"] in lines
    assert ["23", "full_attention", "-", "bfloat16", "8", "x", "64", "2048"] in lines
    # 12 windows of 9 pages and 12 layers of 8192 pages of 32768 bytes: 31 sequences, and 12 x 73 pages in the rest.
    assert ["bfloat16", "49152", "3.225", "31", "4064400", "1.00x", "806", "us"] in lines
    plans = [line[0] for line in lines if line[-1:] == ["us"]]
    assert plans == ["int8_per_token_head,", "bfloat16", "fp8_e4m3", "int8_per_token_head", "fp8_per_token_head"]
    assert "\n- last:1 is not needed here" in text


def test_the_table_shows_shared_recurrent_and_latent_layers(run):
    assert "that of layer 13" in run("gemma-4-E2B-it", *REQUEST)
    assert "0-2,4-6,8-10" in run("Qwen3-Next-80B-A3B", *REQUEST)
    assert "latent 512 + rope 64" in run("DeepSeek-V3", *REQUEST)


def test_the_plan_asked_for_is_not_shown_twice(run):
    lines = run("Llama-3.1-8B", *REQUEST, "--kv-cache-dtype", "fp8").splitlines()
    names = [line.split()[0] for line in lines if line.endswith(" us")]
    assert names == ["fp8", "bfloat16", "int8_per_token_head", "fp8_per_token_head"]


def test_the_context_is_the_models_where_none_is_given(run):
    assert json.loads(run("gemma-4-31B-it", *REQUEST, "--json"))["context"] == 262144
    assert json.loads(run("gemma-4-31B-it", *REQUEST, "--context", "5", "--json"))["context"] == 5


@pytest.mark.parametrize(("text", "expected"), [("3.35", 3.35e12), ("3.35TB/s", 3.35e12), ("3350 GB/s", 3.35e12)])
def test_the_bandwidth_can_be_given(run, text, expected):
    printed = json.loads(run("Llama-3.1-8B", *REQUEST, "--context", "1000", "--bandwidth", text, "--json"))
    assert printed["bandwidth"] == expected
    assert printed["decode_us"] == pytest.approx(1000 * 67584 / expected * 1e6)


def test_weights_page_size_and_compute_dtype_reach_the_plan(run):
    options = ["--weights", "1GiB", "--page-size", "7", "--compute-dtype", "float32", "--skip-layers", "0-1,5"]
    printed = json.loads(run("Llama-3.1-8B", *REQUEST, *options, "--json"))
    assert printed["memory"] == 141_000_000_000 - 2**30
    assert printed["layers"][1]["fingerprint"] == "kvq1-tail-k:float32-v:float32-p7-h8-dk128-dv128"
    assert [layer["index"] for layer in printed["layers"] if layer["kv_cache_dtype"] == "float32"] == [0, 1, 5]


def test_a_folder_stands_for_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    main(["plan", str(tmp_path), *REQUEST])
    assert "32 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", *REQUEST], "No such file or directory: 'nowhere.json'"),
        (["LLAMA", *REQUEST, "--skip-layers", "sliding"], "'first:N' or 'last:N'; got 'sliding'"),
        (["LLAMA", "--kv-cache-dtype", "int4", "--gpu-memory", "1GB"], "expected a KV cache mode, one of ["),
        (["LLAMA", *REQUEST, "--weights", "142GB"], "--weights 142000000000 bytes exceed --gpu-memory 141000000000"),
        (["LLAMA", "--kv-cache-dtype", "fp8"], "the following arguments are required: --gpu-memory"),
        (["LLAMA", "--gpu-memory", "1GB"], "the following arguments are required: --kv-cache-dtype"),
        (["LLAMA", "--kv-cache-dtype", "fp8", "--gpu-memory", "80G"], "argument --gpu-memory: expected a size like"),
        (["LLAMA", *REQUEST, "--context", "128k"], "argument --context: expected an integer from 1; got '128k'"),
        (["LLAMA", *REQUEST, "--page-size", "0"], "argument --page-size: expected an integer from 1; got '0'"),
        (["LLAMA", *REQUEST, "--bandwidth", "0"], "argument --bandwidth: expected TB/s like '4.0' or '3350GB/s'"),
        (["LLAMA", *REQUEST, "--bandwidth", "fast"], "got 'fast'"),
    ],
)
def test_a_bad_request_ends_with_one_line(refuse, arguments, message):
    assert message in refuse(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "to hold JSON: Expecting property name"),
        ("[]", "to hold a JSON object; got list"),
        ("{}", "expected the config.json of a decoder, with num_hidden_layers"),
        (json.dumps({**CONFIGS["starcoder"]}), "the config has no max_position_embeddings: pass --context"),
        (json.dumps({**CONFIGS["Llama-7B"], "hidden_size": 3200}), "layer 0 (full_attention): expected head_dim"),
        (json.dumps({"layer_types": ["mamba"]}), "layers that keep keys and values; this one has none"),
    ],
)
def test_a_bad_config_ends_with_one_line(refuse, tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    context = [] if "n_positions" in text else ["--context", "4096"]
    assert message in refuse(str(tmp_path / "bad.json"), *REQUEST, *context)


def test_the_readme_shows_what_the_command_prints(tmp_path, capsys, monkeypatch):
    command, printed = re.findall(
        r"^```\n\$ python -m kvq_core (plan .*?[^\\])\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )[0]
    arguments = shlex.split(command.replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    Path(arguments[1]).write_text(json.dumps(CONFIGS["gpt-oss-20b"]))
    main(arguments)
    assert capsys.readouterr().out == printed
