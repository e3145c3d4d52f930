"""The section `decode` of `flashedu bench`: what is measured, checked, and not checked."""

from __future__ import annotations

import pytest
import torch

from flashedu.bench import device as devices
from flashedu.bench.cases import Case, Choice, plan
from flashedu.bench.run import Check, run
from flashedu.memory import Problem
from flashedu.stages import rung

if rung("decode").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from tests.test_bench import BY_NAME, Toy

DECODING = Problem(B=2, H=4, H_kv=2, Nq=1, Nk=300, D=16, dtype="float16")


def test_decoding_is_one_query_against_a_long_cache():
    found = plan(Choice(), ("decode",))
    problems = [case.problem for case in found]
    assert [(p.B, p.Nk) for p in problems] == [(B, 8192 * 2**i) for B in (1, 8) for i in range(5)]
    assert {(p.H, p.H_kv, p.Nq, p.D, p.dtype) for p in problems} == {(16, 2, 1, 128, "bfloat16")}
    assert {"decode", "sdpa-flash", "sdpa-math", "copy"} <= set(found[0].peers)
    read = 2 * 2 * 8192 * 128 * 2  # k and v
    assert found[0].bytes == read + 2 * 16 * 128 * 2
    assert str(found[0]).startswith("decode: fwd B 1 H 16 Nq 1 Nk 8192 D 128")


def test_decode_and_its_peers_pass_the_check_and_the_copy_is_timed_unchecked():
    names = ("decode", "flash2", "sdpa-math", "copy")
    case = Case("decode", DECODING, "fwd", names)
    (found,) = run([case], BY_NAME, Toy(), rounds=2, on_case=lambda *_: None)
    assert (found["N"], found["Nq"], found["H_kv"]) == (300, 1, 2)
    for entry in found["runs"]:
        assert entry["why"] is None
        assert len(entry["seconds"]) == 2
        assert set(entry["errors"]) == ({"o"} if entry["peer"] != "copy" else set())


def test_the_copy_moves_as_many_bytes_as_k_and_v_hold():
    q, k, v, _ = devices.draw(DECODING, 0, "cpu")
    copied = BY_NAME["copy"].prepare(DECODING, "cpu")(q, k, v)
    assert torch.equal(copied, k)
    assert copied.data_ptr() != k.data_ptr()
    assert k.nbytes + copied.nbytes == k.nbytes + v.nbytes


def test_a_head_is_checked_against_its_own_key_head():
    p = DECODING
    q, k, v, _ = devices.draw(p, 0, "cpu")
    check = Check((q, k, v, q), p, 0, gradients=False)
    assert check.heads[-1] == (1, 3)
    o = BY_NAME["sdpa-math"].prepare(p, "cpu")(q, k, v)
    assert check.errors({"o": o})["o"].within
    mixed = BY_NAME["sdpa-math"].prepare(p, "cpu")(q, k.flip(1), v.flip(1))
    assert not check.errors({"o": mixed})["o"].within
