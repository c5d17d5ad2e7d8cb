"""The README is executed, and its figures are recomputed or those of the committed runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import quotes
from bench.rows import JAX
from kvq_core import CacheLayout, MLALayout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUN = quotes.committed()
QUOTES = quotes.documents(RUN)
CODE_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
FIELDS = ("k_codes", "v_codes", "k_scales", "v_scales")


def table_rows(first_cell: str) -> list[list[str]]:
    """Cells of the table rows whose first cell starts with ``first_cell``."""
    rows = re.findall(rf"^\| ({first_cell}.*) \|$", README, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_torch_and_jax_examples_run_and_print_the_same_digest(capsys):
    names = [{}, {}]
    for code, namespace in zip(CODE_BLOCKS, names, strict=False):
        exec(code, namespace)
    assert [tuple(namespace["out"].shape) for namespace in names] == [(1, 32, 128)] * 2
    torch_digest, jax_digest = capsys.readouterr().out.split()
    assert torch_digest == jax_digest


def test_literal_bytes_of_the_byte_format_hold():
    exec(CODE_BLOCKS[2], {})


@pytest.mark.parametrize("cells", table_rows("`kvq1-tail-"), ids=lambda cells: cells[0].strip("`"))
def test_offsets_of_the_byte_format_are_those_of_the_layout(cells):
    layout = CacheLayout.from_fingerprint(cells[0].strip("`"))
    offsets = [str(layout.fields[name].offset) if name in layout.fields else "-" for name in FIELDS]
    assert cells[1:] == [*offsets, str(layout.shape(1)[-1])]  # record_bytes or row_bytes


@pytest.mark.parametrize("cells", table_rows("`kvq1-mla-"), ids=lambda cells: cells[0].strip("`"))
def test_offsets_of_mla_records_are_those_of_the_layout(cells):
    layout = MLALayout.from_fingerprint(cells[0].strip("`"))
    names = ("latent_codes", "rope_codes", "latent_scales")
    offsets = [str(layout.fields[name].offset) if name in layout.fields else "-" for name in names]
    assert cells[1:] == [*offsets, str(layout.record_bytes)]


def first_table():
    """Mode, bytes per token, share of bfloat16, decode time and the peer's: the rows of the first table."""
    return [row for row in table_rows("`") if len(row) == 5 and row[2].endswith("%")]


def test_bytes_per_token_of_the_first_table_are_those_of_the_layout():
    assert first_table()
    for modes, bytes_per_token, share, *_ in first_table():
        for mode in re.findall(r"`([^`]+)`", modes):
            layout = CacheLayout(mode, page_size=16, num_kv_heads=8, head_dim=128)
            assert layout.bytes_per_token == float(bytes_per_token)
            assert f"{layout.bytes_per_token / 4096:.1%}" == share


@pytest.mark.parametrize("path", QUOTES)
def test_documents_quote_the_committed_runs(path):
    text = (ROOT / path).read_text()
    assert quotes.renewed(text, RUN, QUOTES[path]) == text, "run `python -m bench.quotes --write`"


def test_every_time_and_rate_of_the_readme_is_a_quote():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r".*\d\s(?:us|TB/s|TFLOP/s)\b.*", quotes.without(prose, QUOTES["README.md"]))


def test_what_misses_its_bar_is_what_the_readme_lists():
    missed = {JAX if row.impl == JAX else row.case for row in quotes.Figures(RUN).missed}
    assert missed == {JAX, "append + attention"}


def test_fp8_takes_no_longer_than_bfloat16_with_many_latent_heads():
    """A bar of issue 4 that no row carries, and a sentence of the changelog."""
    of = quotes.Figures(RUN)
    for mode in ("fp8_e4m3", "fp8_per_token_head"):
        assert of.us("mla 128 heads", mode) <= of.us("mla 128 heads", "bfloat16")


ADVICE = README.split("## Which mode when\n")[1].split("\n## ")[0]
SENTENCES = [
    sentence
    for item in re.findall(r"^- (.*?)(?=^- |\Z)", ADVICE, flags=re.MULTILINE | re.DOTALL)
    for sentence in re.split(r"(?<=\)\.) ", " ".join(item.split()))
]
STUDIES = ("vLLM blog, 22 April 2026", 'SGLang documentation, "Quantized KV Cache"')


@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_advice_ends_with_a_committed_run_or_a_named_study(sentence):
    evidence = re.fullmatch(r".* \((.*)\)\.", sentence)
    assert evidence
    run = re.fullmatch(r"\[\w+\]\((.*)\)", evidence[1])
    assert (ROOT / run[1]).is_file() if run else evidence[1].endswith(STUDIES)


def advised_errors():
    """Attention errors and changes of the bits per byte out of the committed run of the demo."""
    demo = {row["mode"]: row for row in json.loads((ROOT / "bench/results/cpu-demo.json").read_text())}
    error = {mode: f"{row['attention_relative_error']:.1e}".replace("e-0", "e-") for mode, row in demo.items()}
    change = {mode: f"{row['bits_per_byte_delta']:+.4f}" for mode, row in demo.items()}
    int8, fp8 = "int8_per_token_head", "fp8_per_token_head"
    unquantized = demo[int8]["bits_per_byte"] - demo[int8]["bits_per_byte_delta"]
    return [
        f"changes the bits per byte by {change[f'{int8}/{fp8}']},",
        f"{error[int8]}, for {change[int8]} bits per byte on {unquantized:.4f}",
        f"{error[fp8]}, for {change[fp8]} bits per byte",
        f"{error['fp8_e4m3']} and {error['fp8_e5m2']}, for {change['fp8_e4m3']} and {change['fp8_e5m2']} bits per byte",
        f"`bfloat16/{int8}` is {error[f'bfloat16/{int8}']} and that of `{int8}/bfloat16` {error[f'{int8}/bfloat16']}",
    ]


def test_figures_of_the_advice_are_those_of_the_committed_runs():
    text = " ".join(quotes.without(ADVICE, QUOTES["README.md"]).split())
    for figures in advised_errors():
        assert figures in text
        text = text.replace(figures, "")
    assert not re.search(r"\d us|\de-\d|bits per byte", text)


def test_int8_has_the_smallest_attention_error_of_the_8_bit_modes():
    demo = json.loads((ROOT / "bench/results/cpu-demo.json").read_text())
    eight_bits = [row for row in demo if "float" not in row["mode"]]
    assert min(eight_bits, key=lambda row: row["attention_relative_error"])["mode"] == "int8_per_token_head"
