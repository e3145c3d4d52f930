"""FlashEdu as vLLM's CUSTOM backend: against vLLM's interfaces, where vLLM is installed.

Kernels are interpreted; no engine runs here.
"""

from __future__ import annotations

import inspect
import sys
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashedu.integrations import vllm as adapter
from flashedu.stages import rung

if rung("decode").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)


def test_without_vllm_registering_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'vLLM is not installed: pip install "flashedu\[vllm\]"'):
        adapter.register()


def test_the_entry_point_is_register() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)["project"]["entry-points"][adapter.GROUP]
    assert found == {"flashedu": f"{adapter.__name__}:{adapter.register.__name__}"}


# with vLLM


@pytest.fixture(scope="module")
def backend() -> Any:
    """The module that vLLM gets; tests skip where there is no vLLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that vLLM imports
        pytest.importorskip("vllm", reason="vLLM is not installed: the extra [vllm] has it")
        adapter.register()
        from flashedu.integrations import vllm_backend
    return vllm_backend


@pytest.fixture
def custom(backend: Any) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.CUSTOM


def test_vllm_gets_the_backend_under_custom(backend: Any, custom: Any) -> None:
    adapter.register()
    assert custom.get_path() == adapter.BACKEND
    assert custom.get_class() is backend.FlashEduBackend
    assert custom.get_class().get_name() == "CUSTOM"


def test_the_backend_of_another_plugin_stays_and_is_named(backend: Any, custom: Any) -> None:
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(custom, "another.Backend")
    try:
        with pytest.warns(adapter.TakenByAnother, match=r"another\.Backend.*VLLM_PLUGINS=flashedu"):
            adapter.register()
        assert custom.get_path() == "another.Backend"
    finally:
        register_backend(custom, adapter.BACKEND)


@pytest.mark.parametrize("name", ["Backend", "Impl", "MetadataBuilder"])
def test_all_that_vllm_declares_abstract_is_there(backend: Any, name: str) -> None:
    assert not getattr(backend, f"FlashEdu{name}").__abstractmethods__


@pytest.mark.parametrize("method", ["forward", "do_kv_cache_update"])
def test_methods_take_what_vllms_own_backend_takes(backend: Any, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script, in what it imports
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
    ours, theirs = (
        list(inspect.signature(getattr(impl, method)).parameters)
        for impl in (backend.FlashEduImpl, TritonAttentionImpl)
    )
    assert ours == theirs


def settings(**changes: Any) -> dict[str, Any]:
    from vllm.platforms.interface import DeviceCapability

    return {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder", **changes,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_llama_is_taken(backend: Any, dtype: torch.dtype) -> None:
    for size in (64, 80, 128, 256):
        assert not backend.FlashEduBackend.validate_configuration(
            **settings(dtype=dtype, head_size=size, block_size=16)
        )


REFUSED = {
    "head_size must be a multiple of 8 up to 256, got 260": {"head_size": 260},
    "dtype must be one of float16 and bfloat16, got torch.float32": {"dtype": torch.float32},
    "got fp8: FlashEdu reads no cache of 8 bits": {"kv_cache_dtype": "fp8"},
    "the model's dtype torch.bfloat16, got float16": {"kv_cache_dtype": "float16"},
    "block_size must be a multiple of 16, got 24": {"block_size": 24},
    "no multi-head latent attention": {"use_mla": True},
    "attention sinks": {"has_sink": True},
    "sparse attention": {"use_sparse": True},
    "attention type encoder not supported": {"attn_type": "encoder"},
    "VLLM_BATCH_INVARIANT is set": {"use_batch_invariant": True},
    "use_non_causal is set": {"use_non_causal": True},
}


@pytest.mark.parametrize(("words", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_by_name(
    backend: Any, words: str, changes: dict[str, Any]
) -> None:
    (reason,) = backend.FlashEduBackend.validate_configuration(**settings(**changes))
    assert words in reason


def layer(backend: Any, H: int = 6, H_kv: int = 2, D: int = 16, **changes: Any) -> Any:
    usual = {
        "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto",
        "logits_soft_cap": None, "attn_type": "decoder", "kv_sharing_target_layer_name": None,
    }  # fmt: skip
    return backend.FlashEduImpl(H, D, D**-0.5, H_kv, **{**usual, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [("alibi_slopes", [0.5] * 6), ("sliding_window", 4096), ("logits_soft_cap", 30.0),
     ("attn_type", "encoder_only"), ("kv_cache_dtype", "fp8"), ("sinks", torch.zeros(6)),
     ("use_alibi_sqrt", True), ("anything_to_come", 3)],
)  # fmt: skip
def test_a_layer_that_asks_for_more_gets_a_sentence(backend: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot do what {name} asks for"):
        layer(backend, **{name: value})


def test_context_parallelism_is_refused(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.FlashEduImpl, "__new__", _in_a_group_of_two)
    with pytest.raises(ValueError, match="decode_context_parallel_size asks for, got 2"):
        layer(backend)


def _in_a_group_of_two(cls: type, *args: Any, **kwargs: Any) -> Any:
    made = object.__new__(cls)
    made.dcp_world_size, made.pcp_world_size = 2, 1
    return made


# a step


SIZES = [(1, 97), (1, 16), (5, 70), (17, 17), (1, 33)]  # queries, keys: chunks among tokens
LAYOUTS = {
    "0.24, NHD": lambda n, page, H, D: torch.empty(n, 2, page, H, D),
    "0.24, HND": lambda n, page, H, D: torch.empty(n, 2, H, page, D).transpose(2, 3),
    "0.33, HND": lambda n, page, H, D: torch.empty(n, H, page, 2 * D),
    "0.33, NHD": lambda n, page, H, D: torch.empty(n, page, H, 2 * D).transpose(1, 2),
}


def common(sizes: list[tuple[int, int]], page: int, **changes: Any) -> Any:
    """vLLM's metadata of a step, with pages in any order."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *(n for n, _ in sizes)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([n for _, n in sizes], dtype=torch.int32)
    pages = [-(-n // page) for _, n in sizes]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(sizes), max(pages) + 2, dtype=torch.int32)
    slots = []
    for b, (Nq, Nk) in enumerate(sizes):
        table[b, : pages[b]] = order[sum(pages[:b]) : sum(pages[: b + 1])]
        slots += [int(table[b, j // page]) * page + j % page for j in range(Nk - Nq, Nk)]
    made = {
        "query_start_loc": starts, "query_start_loc_cpu": starts, "seq_lens": lengths,
        "num_reqs": len(sizes), "num_actual_tokens": int(starts[-1]),
        "max_query_len": max(n for n, _ in sizes), "max_seq_len": int(lengths.max()),
        "block_table_tensor": table, "slot_mapping": torch.tensor(slots), "causal": True,
    }  # fmt: skip
    return CommonAttentionMetadata(**{**made, **changes})


def builder(backend: Any, page: int, H: int = 6, H_kv: int = 2, D: int = 16) -> Any:
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: H, dtype=torch.float16, max_model_len=512
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
    )
    spec = SimpleNamespace(num_kv_heads=H_kv, block_size=page, head_size=D)
    return backend.FlashEduMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def store(key: Any, value: Any, k: Any, v: Any, slots: Any, *rest: Any) -> None:
    """What vLLM's reshape_and_cache_flash does; its operator is for the GPU."""
    for new, cache in ((key, k), (value, v)):
        cache[slots // cache.shape[1], slots % cache.shape[1]] = new


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, and the tensors are on the CPU"
)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", [16, 64])
def test_a_step_is_right_in_each_layout_of_the_cache(
    backend: Any, monkeypatch: pytest.MonkeyPatch, layout: str, page: int
) -> None:
    """The past is in the cache, the step's own keys are put there, and each sequence is right."""
    from flashedu.stages import online
    from flashedu.stages.reference import Reference
    from flashedu.testing import assert_right

    monkeypatch.setattr(backend, "reshape_and_cache_flash", store)
    step, impl, random = common(SIZES, page), layer(backend), torch.Generator().manual_seed(0)
    cache = LAYOUTS[layout](sum(-(-n // page) for _, n in SIZES), page, 2, 16).half()
    cache.fill_(torch.nan)
    rows = [torch.randn(2, n, 2, 16, generator=random).half() for _, n in SIZES]
    stub = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))
    for b, (Nq, Nk) in enumerate(SIZES):
        j = torch.arange(Nk - Nq)
        slots = step.block_table_tensor[b, j // page] * page + j % page
        impl.do_kv_cache_update(stub, *rows[b][:, : Nk - Nq], cache, slots)
    new = torch.cat([row[:, Nk - Nq :] for row, (Nq, Nk) in zip(rows, SIZES, strict=True)], 1)
    impl.do_kv_cache_update(stub, *new, cache, step.slot_mapping)

    query = torch.randn(27, 6, 16, generator=random).half()  # two rows more than the step has
    output = torch.full_like(query, 7)
    metadata = builder(backend, page).build(0, step)
    assert impl.forward(stub, query, *new, cache, metadata, output) is output
    assert (output[25:] == 7).all()
    o, q = (x[:25].transpose(0, 1)[None] for x in (output, query))
    begin = 0
    for (Nq, _), (k, v) in zip(SIZES, rows, strict=True):
        mine = slice(begin, begin := begin + Nq)
        k, v = (x.transpose(0, 1)[None] for x in (k, v))
        lse = online.attention_with_lse(q[:, :, mine], k, v, causal=True)[1]  # vLLM wants none
        assert_right(Reference(o[:, :, mine], lse), q[:, :, mine], k, v, causal=True)


@interpreted
def test_a_step_of_single_tokens_may_be_split(backend: Any) -> None:
    step = common([(1, 97), (1, 16), (1, 1)], 16)
    metadata = builder(backend, 16).build(0, step)
    ((rows, part),) = metadata.parts
    assert rows == slice(0, 3)
    assert part.splits == 3
    cache = torch.randn(9, 2, 16, 2, 16).half()
    query, one, three = (torch.randn(3, 6, 16).half() for _ in range(3))
    impl = layer(backend)
    impl.forward(None, query, query, query, cache, metadata, three)
    single = replace(metadata, parts=[(rows, part._replace(splits=1))])
    impl.forward(None, query, query, query, cache, single, one)
    torch.testing.assert_close(one, three, rtol=2e-3, atol=2e-3)


SPLIT = [  # queries of each sequence; how many at the front are single; parts
    ([1, 1, 1], 3, 1),
    ([1, 1, 5, 9], 2, 2),
    ([5, 9], 0, 1),
    ([1, 5, 1], 1, 2),
    ([5, 1, 1], 0, 1),
]


@pytest.mark.parametrize(("lengths", "few", "parts"), SPLIT)
def test_single_tokens_at_the_front_are_a_part_of_their_own(
    backend: Any, lengths: list[int], few: int, parts: int
) -> None:
    step = common([(n, n + 20) for n in lengths], 16)
    metadata = builder(backend, 16).build(0, step)
    assert len(metadata.parts) == parts
    single = [part for _, part in metadata.parts if part.tiles is None]
    assert sum(len(part.lengths) for part in single) == few


def test_a_captured_step_reads_vllms_own_tables(backend: Any) -> None:
    """A CUDA graph sees what they hold when it is replayed; sequences without a key fill it up."""
    step = common([(1, 97), (1, 16), (1, 1)], 16, max_query_len=1)
    metadata = builder(backend, 16).build_for_cudagraph_capture(step)
    ((_, part),) = metadata.parts
    assert part.block_table.data_ptr() == step.block_table_tensor.data_ptr()
    assert part.lengths.data_ptr() == step.seq_lens.data_ptr()
    assert part.problem.Nk == 512
    padded = common([(1, 97), (1, 16), (0, 16)], 16, num_actual_tokens=3, max_query_len=1)
    ((_, part),) = builder(backend, 16).build(0, padded).parts
    assert part.tiles is None


def test_a_run_that_measures_memory_gives_zeros(backend: Any) -> None:
    output = torch.ones(3, 6, 16)
    layer(backend).forward(None, output, output, output, torch.empty(0), None, output)
    assert not output.any()


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])])
def test_a_step_that_is_not_causal_gets_a_sentence(backend: Any, causal: Any) -> None:
    step = common([(1, 97), (1, 16)], 16, causal=causal)
    with pytest.raises(ValueError, match="causal must be True"):
        builder(backend, 16).build(0, step)


def test_a_cache_of_another_dtype_gets_a_sentence(backend: Any) -> None:
    metadata = builder(backend, 16).build(0, common([(1, 9)], 16))
    query, cache = torch.empty(1, 6, 16).half(), torch.empty(4, 2, 16, 2, 16)
    with pytest.raises(TypeError, match="the model's dtype for FlashEdu, float16, got float32"):
        layer(backend).forward(None, query, query, query, cache, metadata, query)


def test_a_cache_that_would_be_copied_is_refused(backend: Any) -> None:
    """A copy would be read for ever, and never see another key."""
    with pytest.raises(ValueError, match="rows must lie on whole 16 bytes"):
        backend._in_place(torch.empty(4, 2, 16, 17).half()[..., 1:], 16)
    one_head = torch.empty(4, 16, 1, 16).half().as_strided((4, 1, 16, 16), (256, 1, 16, 1))
    assert backend._in_place(one_head, 16).base.data_ptr() == one_head.data_ptr()


def test_pages_are_of_64_keys_unless_asked_otherwise(backend: Any) -> None:
    assert backend.FlashEduBackend.get_preferred_block_size(16) == 64
    assert all(backend.FlashEduBackend.supports_block_size(n) for n in (None, 16, 64, 48, 256))
    with pytest.raises(ValueError, match="block_size must be one of 16, 32, 64, 128, 256"):
        backend.FlashEduBackend.get_kv_cache_shape(7, 48, 2, 16)


def test_without_a_gpu_vllm_picks_nothing_and_says_so(backend: Any) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        pytest.skip("there is a GPU here")
    assert adapter.ask() == adapter.Choice(sees_gpu=False, custom_path=adapter.BACKEND)
