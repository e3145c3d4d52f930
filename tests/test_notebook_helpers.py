"""What the chapters show beside figures, and the units they show it in."""

from __future__ import annotations

import pytest

from flashedu import notebook
from flashedu.stages import naive
from flashedu.units import human_bytes, human_seconds


def test_a_table_names_its_columns_once_and_aligns_numbers_right():
    shown = notebook.table([{"a": "x", "b": 1234567, "c": True}, {"a": "y", "b": 0, "c": False}])
    assert shown.data.splitlines() == [
        "| a | b | c |",
        "| --- | ---: | --- |",
        "| x | 1,234,567 | yes |",
        "| y | 0 | no |",
    ]


def test_the_source_shown_is_the_packages_own():
    shown = notebook.source(naive.forward).data
    assert shown.startswith("```python\ndef forward(")
    assert shown.endswith("return O.data, P.data\n```")


def test_a_record_names_its_card_and_date():
    text = notebook.label(notebook.record("standard_attention_h200_2026-11-23"))
    assert text.startswith("recorded 2026-11-23 on an NVIDIA H200, torch 2.11.0")


def test_a_record_that_is_not_there_gets_a_list_of_those_that_are():
    with pytest.raises(FileNotFoundError, match=r"standard_attention_h200.*got 'nothing'"):
        notebook.record("nothing")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (99328, "97 KiB"),
     (34619392, "33 MiB"), (2**40, "1 TiB"), (2**50, "1,024 TiB"), (1023 * 2**20, "1,023 MiB")],
)  # fmt: skip
def test_bytes_have_three_digits_and_a_unit(n_bytes, text):
    assert human_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.03e-6, "2.03 µs"), (0.25, "250 ms"), (1.0, "1 s"), (100.2, "100 s"), (5e-11, "0.05 ns")],
)
def test_seconds_have_three_digits_and_a_unit(seconds, text):
    assert human_seconds(seconds) == text
