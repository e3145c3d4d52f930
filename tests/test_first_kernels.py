"""The two first kernels: right at every size, and they touch their arrays and nothing else."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashedu.memory import Machine
from flashedu.stages import rung

if rung("flash1").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu import first_kernels
from flashedu.first_kernels import LONGEST_ROW, add, add_kernel, count, softmax, softmax_kernel
from flashedu.stages import triton_mode

from triton.runtime.errors import InterpreterError

DEVICE = "cpu" if triton_mode.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16)
SIZES = (1, 15, 16, 17, 31, 257, 1023, 1024, 1025)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE, dtype)


def assert_is_softmax(p: torch.Tensor, x: torch.Tensor) -> None:
    """Twice the error of PyTorch's, and a few roundings of the largest value, which is 1 at most.

    float32 exponentials differ from library to library by a few units of the last place.
    """
    exact = torch.softmax(x.double(), -1)
    usual = (torch.softmax(x, -1) - exact).abs().max()
    assert p.dtype == x.dtype
    assert (p - exact).abs().max() <= 2 * usual + 4 * torch.finfo(torch.float32).eps


def check_sums(module: ModuleType) -> None:
    for n in SIZES:
        for dtype in DTYPES:
            x, y = normal(2, n, dtype=dtype)
            assert torch.equal(module.add(x, y, block=16), x + y), n


def check_rows(module: ModuleType) -> None:
    for n in SIZES:
        for factor in (1, 200):  # e to the power of 200 is past float32
            x = factor * normal(3, n)
            assert_is_softmax(module.softmax(x), x)


def check_all_below_zero(module: ModuleType) -> None:
    """A masked number that counts as 0 would be the largest."""
    x = normal(3, 17) - 1000
    assert_is_softmax(module.softmax(x), x)


def check_nothing_behind_a_vector_is_touched(module: ModuleType) -> None:
    around = torch.full((64,), 7.0, device=DEVICE)
    x = torch.ones(64, device=DEVICE)
    module.add_kernel[(3,)](x, x, around, 37, BLOCK=16)
    assert (around[:37] == 2).all()
    assert (around[37:] == 7).all()


def check_nothing_behind_a_matrix_is_touched(module: ModuleType) -> None:
    """Each row's mask ends where the next row begins; behind the last one lies what is not ours."""
    x, p = torch.full((2, 256), 1e30, device=DEVICE)
    x[: 3 * 17] = 1
    module.softmax_kernel[(3,)](x, p, 17, BLOCK=32)
    torch.testing.assert_close(p[: 3 * 17], torch.full_like(p[: 3 * 17], 1 / 17))
    assert (p[3 * 17 :] == 1e30).all()


def check_no_load_beyond_the_arrays(module: ModuleType) -> None:
    """The counter knows each address of the arrays, and raises at any other."""
    try:
        module.count(module.add, torch.ones(17), torch.ones(17))
        module.count(module.softmax, torch.ones(2, 17))
    except InterpreterError as error:  # as Triton wraps what is raised in a kernel
        if "at an address that no array has" in str(error):
            raise AssertionError(str(error)) from error
        raise


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_the_first_kernels_pass(name: str) -> None:
    CHECKS[name](first_kernels)


MUTANTS = [
    ("no mask in the load", "check_no_load_beyond_the_arrays",
     "x = tl.load(X + here, mask=here < N)", "x = tl.load(X + here)"),
    ("no mask in the row's load", "check_no_load_beyond_the_arrays",
     'x = tl.load(X + here, mask=cols < N, other=float("-inf"))', "x = tl.load(X + here)"),
    ("no mask in the store", "check_nothing_behind_a_vector_is_touched",
     "tl.store(Z + here, x + y, mask=here < N)", "tl.store(Z + here, x + y)"),
    ("a mask that is one short", "check_sums",
     "tl.store(Z + here, x + y, mask=here < N)", "tl.store(Z + here, x + y, mask=here < N - 1)"),
    ("every program the first tile", "check_sums",
     "tl.program_id(0) * BLOCK + tl.arange", "tl.arange"),
    ("the last program forgotten", "check_sums", "triton.cdiv(len(x), block)", "len(x) // block"),
    ("masked numbers count as 0", "check_all_below_zero", 'other=float("-inf")', "other=0"),
    ("no maximum subtracted", "check_rows", "tl.exp(x - tl.max(x, 0))", "tl.exp(x)"),
    ("rows that are BLOCK apart", "check_nothing_behind_a_matrix_is_touched",
     "here = tl.program_id(0) * N + cols", "here = tl.program_id(0) * BLOCK + cols"),
    ("no mask in the row's store", "check_nothing_behind_a_matrix_is_touched",
     "tl.store(P + here, p / tl.sum(p, 0), mask=cols < N)",
     "tl.store(P + here, p / tl.sum(p, 0))"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may overflow
@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter knows the addresses")
@pytest.mark.parametrize(
    ("caught_by", "old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS]
)
def test_mutant_is_caught(tmp_path: Path, caught_by: str, old: str, new: str) -> None:
    """In a file, as Triton wants it. No mutant here reaches beyond its test's memory."""
    source = Path(first_kernels.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in first_kernels"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError):
        CHECKS[caught_by](mutant)


@every_dtype
def test_a_sum_moves_three_vectors_and_a_softmax_two_matrices(dtype: torch.dtype) -> None:
    x = torch.ones(1030, dtype=dtype)
    counted = count(add, x, x.clone())
    assert counted.bytes_by_tensor() == {
        "x": (x.nbytes, 0), "y": (x.nbytes, 0), "z": (0, x.nbytes)
    }  # fmt: skip
    assert counted.programs == {"add": 2}
    assert count(add, x, x.clone(), block=128).programs == {"add": 9}
    x = torch.ones(7, 33, dtype=dtype)
    counted = count(softmax, x)
    assert counted.bytes_by_tensor() == {"x": (x.nbytes, 0), "p": (0, x.nbytes)}
    assert counted.programs == {"softmax": 7}


def test_a_count_can_come_back_from_another_process() -> None:
    machine = count(add, torch.ones(5), torch.ones(5))
    assert pickle.loads(pickle.dumps(machine)).bytes_by_tensor() == machine.bytes_by_tensor()


@every_dtype
def test_softmax_sums_in_float32(dtype: torch.dtype) -> None:
    x = normal(2, 4096, dtype=dtype)
    p = softmax(x)
    assert_is_softmax(p, x)
    torch.testing.assert_close(softmax(0 * x), torch.full_like(x, 1 / 4096))


def test_the_longest_row_is_done_and_a_longer_one_gets_a_sentence() -> None:
    x = normal(1, LONGEST_ROW)
    assert_is_softmax(softmax(x), x)
    with pytest.raises(ValueError, match=r"x must have rows of 1 to 16,384 numbers.*got 16,385"):
        softmax(torch.ones(1, LONGEST_ROW + 1, device=DEVICE))


def test_masked_scores_get_no_weight() -> None:
    x = normal(2, 5)
    x[:, 3:] = -torch.inf
    p = softmax(x)
    assert not p[:, 3:].any()
    assert_is_softmax(p, x)


def test_strides_do_not_matter() -> None:
    x = normal(33, 6)
    assert torch.equal(softmax(x.T), softmax(x.T.contiguous()))
    assert torch.equal(add(x[:, 0], x[:, 1]), x[:, 0] + x[:, 1])
    assert torch.equal(add(x[0], x[0]), 2 * x[0])


def test_nothing_in_gives_nothing_out() -> None:
    none = torch.ones(0, 5, device=DEVICE)
    assert softmax(none).shape == (0, 5)
    assert add(none[:, 0], none[:, 0]).shape == (0,)


X = torch.ones(3, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: add([1.0], X), TypeError, "x must be a torch tensor, got list"),
        (lambda: add(X, X.int()), TypeError, "y must be float32 or float16, got torch.int32"),
        (lambda: add(X[None], X[None]), ValueError, r"x must have shape \(N,\), got \(1, 3\)"),
        (lambda: softmax(X), ValueError, r"x must have shape \(rows, N\), got \(3,\)"),
        (lambda: add(X, X[:2]), ValueError, r"y must have the .* of x, \(3,\) float32, got \(2,\)"),
        (lambda: add(X, X.half()), ValueError, r"y must have .* float32, got \(3,\) float16"),
        (lambda: add(X, X, block=24), ValueError, "block must be a power of two .*, got 24"),
        (lambda: add(X, X, block=1.5), ValueError, r"block must be a power of two .*, got 1\.5"),
        (lambda: softmax(X[None, :0]), ValueError, "x must have rows of 1 to 16,384 .*, got 0"),
        (lambda: add(X.to("meta"), X), ValueError, f"x must be on {DEVICE}, .*, got meta"),
        (lambda: add(X.clone().requires_grad_(), X), ValueError, "must not require gradients"),
        (lambda: add(X[:1].expand(2**30 + 1), X), ValueError,
         r"x must have at most 2\*\*30 numbers"),
    ],
)  # fmt: skip
def test_bad_inputs_get_a_sentence(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE == "cpu", reason="kernels are interpreted here, and can be counted")
@pytest.mark.gpu
def test_a_machine_where_kernels_are_compiled_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"machine must be None where kernels are compiled; count"):
        add(X, X, machine=Machine())


def test_kernels_have_their_source_for_the_chapter() -> None:
    for kernel in (add_kernel, softmax_kernel):
        assert kernel.fn.__doc__
