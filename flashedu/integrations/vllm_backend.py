"""What vLLM sees of FlashEdu: a backend, a builder of metadata, and the attention of a layer.

1. The backend is a list of answers: which dtypes, head sizes and pages; who builds, who computes.
2. The builder is asked once a step. It splits the step in two where it must: sequences that bring
   one query, which vLLM puts first, and those that bring more. Each part is a `Step` of the stage.
3. A layer writes its keys and values into their pages, by vLLM's own operator, and then calls
   `attend` for each part. It waits for nothing and allocates nothing that depends on a value, so a
   step of single queries can be held in a CUDA graph.

Imports vLLM. See `flashedu.integrations.vllm` for how to turn it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import flashedu
from flashedu.stages import triton_mode  # before vLLM imports Triton
from flashedu.stages.contract import dtype_name
from flashedu.stages.descriptors import tiles_of
from flashedu.stages.paged import MAX_D
from flashedu.stages.paged_varlen import Step, attend, plan

from vllm._custom_ops import reshape_and_cache_flash  # isort: skip
from vllm.logger import init_logger  # isort: skip
from vllm.v1.attention.backend import (  # isort: skip
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)

logger = init_logger("vllm.flashedu")  # vLLM prints what is logged under its own name

PAGE_SIZES = (16, 32, 64, 128, 256)
PAGE_SIZE = 64  # a tile of keys lies in one page, and has 64 at most; pages of 16 halve the speed
CAPABILITY = (8, 0)
DTYPES = "float16 and bfloat16"

# vLLM's reasons, with the setting's name and what would do.
SENTENCES = {
    "head_size not supported": f"head_size must be a multiple of 8 up to {MAX_D}, got "
    "{head_size}",
    "dtype not supported": f"dtype must be one of {DTYPES}, got {{dtype}}",
    "kv_cache_dtype not supported": "kv_cache_dtype must be auto, or the model's dtype, got "
    "{kv_cache_dtype}: FlashEdu reads no cache of 8 bits",
    "block_size not supported": "block_size must be a multiple of 16, got {block_size}",
    "MLA not supported": "use_mla is set: FlashEdu has no multi-head latent attention (MLA)",
    "attention sinks not supported": "the model has attention sinks: FlashEdu has none",
    "sparse not supported": "use_sparse is set: FlashEdu has no sparse attention",
    "compute capability not supported": "compute capability must be 8.0 or more, got "
    "{device_capability}",
    "sliding window not supported": "the model has a sliding_window: FlashEdu has none in vLLM",
    "batch invariance not supported": "VLLM_BATCH_INVARIANT is set: FlashEdu's splits depend on "
    "the batch",
    "non-causal attention not supported": "use_non_causal is set: FlashEdu is causal in vLLM",
}


class FlashEduBackend(AttentionBackend):
    """What FlashEdu answers when vLLM asks."""

    accept_output_buffer: bool = True
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False  # a call of its own: `do_kv_cache_update`

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashEduImpl]:
        return FlashEduImpl

    @staticmethod
    def get_builder_cls() -> type[FlashEduMetadataBuilder]:
        return FlashEduMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return list(PAGE_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PAGE_SIZE

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 8 <= head_size <= MAX_D  # rows of whole 16 bytes

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool((capability.major, capability.minor) >= CAPABILITY)

    @classmethod
    def validate_configuration(cls, *args: Any, **settings: Any) -> list[str]:
        """vLLM's reasons, as sentences that name the setting."""
        reasons = super().validate_configuration(*args, **settings)
        told = [SENTENCES.get(reason, reason).format_map(_Named(settings)) for reason in reasons]
        cache, dtype = settings.get("kv_cache_dtype"), settings.get("dtype")
        if (
            cache in ("float16", "bfloat16")
            and dtype is not None
            and str(dtype) != f"torch.{cache}"
        ):
            told.append(f"kv_cache_dtype must be auto, or the model's dtype {dtype}, got {cache}")
        return told

    # vLLM 0.24 asks for the shape of the cache; 0.33 makes it itself

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:  # fmt: skip
        if block_size not in PAGE_SIZES:
            raise ValueError(
                f"block_size must be one of {', '.join(map(str, PAGE_SIZES))} for FlashEdu, got "
                f"{block_size}"
            )
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """How those dimensions lie in memory: any order with whole rows would do."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        if get_kv_cache_layout() == "HND":  # the rows of a head side by side
            return (1, 4, 0, 2, 3, 5) if include_num_layers_dimension else (0, 1, 3, 2, 4)
        return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)


class _Named(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return f"another {name}"


@dataclass
class FlashEduMetadata(AttentionMetadata):
    """One step, for all layers of a group."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    parts: list[tuple[slice, Step]]  # rows of the queries, and the step of their sequences


class FlashEduMetadataBuilder(AttentionMetadataBuilder[FlashEduMetadata]):
    """Makes the metadata of a step, on sizes that the host knows."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # sequences with one query first
        config, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.heads = config.get_num_attention_heads(parallel)
        self.dtype = config.dtype
        spec = kv_cache_spec
        self.k_shape = (0, spec.num_kv_heads, spec.block_size, spec.head_size)
        logger.info(
            "FlashEdu %s is the CUSTOM attention backend: stage paged_varlen, %d layers, %d heads "
            "on %d of size %d, pages of %d keys.",
            flashedu.__version__, len(layer_names), self.heads, spec.num_kv_heads,
            spec.head_size, spec.block_size,
        )  # fmt: skip

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> FlashEduMetadata:
        """Captured on sequences of one key, and cut into splits for any that may come."""
        common_attn_metadata.seq_lens.fill_(1)
        longest = self.vllm_config.model_config.max_model_len
        return self.build(0, common_attn_metadata.replace(max_seq_len=longest))

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashEduMetadata:
        step = common_attn_metadata
        if step.causal is not True:
            raise ValueError("causal must be True for FlashEdu in vLLM, got a step that is not")
        if getattr(step, "mm_req_doc_ranges", None) is not None:
            raise ValueError("FlashEdu in vLLM has no prefixes that see each other's later tokens")
        n, n_tokens = step.num_reqs, step.num_actual_tokens
        few = leading_single_queries(step.query_start_loc_cpu, n, n_tokens, step.max_query_len)
        parts = []
        if few:
            parts.append((slice(0, few), self._plan(step, slice(0, few), few, few=True)))
        if few < n:
            rest = self._plan(step, slice(few, n), n_tokens - few, few=False)
            parts.append((slice(0, n_tokens), rest))
        return FlashEduMetadata(n_tokens, step.slot_mapping, parts)

    def _plan(self, step: Any, sequences: slice, n_tokens: int, *, few: bool) -> Step:
        starts = step.query_start_loc[sequences.start : sequences.stop + 1]
        q_shape = (1, self.heads, n_tokens, self.k_shape[3])
        return plan(
            step.block_table_tensor[sequences], step.seq_lens[sequences], starts,
            q_shape, self.k_shape, self.dtype, few=few, longest=step.max_seq_len,
        )  # fmt: skip


def leading_single_queries(starts: torch.Tensor, n: int, n_tokens: int, most: int) -> int:
    """How many sequences at the front bring one query each.

    starts: on the CPU. most: queries of the sequence that has most. A step of a CUDA graph is
    filled up with sequences without a key: where all others bring one query, these count too.
    """
    if most == 1 and n == n_tokens:
        return n
    single = starts[: n + 1].diff() == 1
    return int(n if single.all() else single.int().argmin())


class FlashEduImpl(AttentionImpl[FlashEduMetadata]):
    """Attention of one layer."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None,
        kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            "kv_cache_dtype": None if kv_cache_dtype in FlashEduBackend.supported_kv_cache_dtypes
            else kv_cache_dtype,
            "decode_context_parallel_size": _more_than_one(self, "dcp_world_size"),
            "prefill_context_parallel_size": _more_than_one(self, "pcp_world_size"),
            **{name: None if value is False else value for name, value in more.items()},
        }  # fmt: skip
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"the attention backend CUSTOM, which is FlashEdu's, cannot do what {name} "
                    f"asks for, got {value!r:.60}: FLASH_ATTN and TRITON_ATTN may"
                )
        if scale <= 0:
            raise ValueError(f"scale must be positive for FlashEdu in vLLM, got {scale}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._pages: dict[Any, tuple[Any, Any]] = {}  # k and v, by the cache and the tile

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, attn_metadata: FlashEduMetadata | None, output: torch.Tensor,
        output_scale: torch.Tensor | None = None, output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Write the attention of query, (N, H, D), to output, (N, H, D).

        key and value are in the cache already. Rows behind the step's last token are not written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("FlashEdu in vLLM writes no output of 8 bits")
        if attn_metadata is None:  # a run that measures memory
            return output.fill_(0)
        q = query.transpose(0, 1)[None]
        for rows, step in attn_metadata.parts:
            K, V = self._tiles(kv_cache, query, step.tile.block_k)
            attend(q[:, :, rows], K, V, output[rows], None, step, self.scale)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write key and value, (N, H_kv, D), to the rows of pages that slot_mapping names."""
        k, v = (x.transpose(1, 2) for x in pages_of(kv_cache, self.head_size))
        reshape_and_cache_flash(
            key, value, k, v, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def _tiles(self, kv_cache: torch.Tensor, query: torch.Tensor, block_k: int) -> tuple[Any, Any]:
        """k and v as kernels take them: made once, as a layer's cache stays where it is."""
        which = kv_cache.data_ptr(), kv_cache.shape, block_k
        if which not in self._pages:
            if kv_cache.dtype != query.dtype:
                raise TypeError(
                    f"kv_cache_dtype must be the model's dtype for FlashEdu, {dtype_name(query)}, "
                    f"got {dtype_name(kv_cache)}"
                )
            k, v = pages_of(kv_cache, self.head_size)
            self._pages = (
                {  # of this cache only
                    key: tiles for key, tiles in self._pages.items() if key[:2] == which[:2]
                }
                | {which: (_in_place(k, block_k), _in_place(v, block_k))}
            )
        return self._pages[which]


def _more_than_one(impl: Any, name: str) -> int | None:
    size = getattr(impl, name, 1)
    return size if size > 1 else None


def pages_of(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, ...]:
    """k and v, (n_pages, H_kv, page_size, D), as they lie in vLLM's cache.

    vLLM 0.24: (n_pages, 2, page_size, H_kv, D). vLLM 0.33: (n_pages, H_kv, page_size, 2 D).
    """
    if kv_cache.ndim == 5:
        return tuple(x.transpose(1, 2) for x in kv_cache.unbind(1))
    return kv_cache.split(head_size, -1)


def _in_place(pages: torch.Tensor, block_k: int) -> Any:
    """`tiles_of`, which may copy what it cannot address; a copy would miss the keys to come."""
    last = pages.shape[3] * (16 // pages.itemsize)  # a dimension of 1 may have any stride
    strides = [s if n > 1 else last for n, s in zip(pages.shape, pages.stride(), strict=True)]
    tiles = tiles_of(pages.as_strided(pages.shape, (*strides[:3], pages.stride(3))), block_k)
    base = tiles[0] if isinstance(tiles, tuple) else tiles.base
    if base.data_ptr() != pages.data_ptr():
        raise ValueError(
            f"the cache's rows must lie on whole 16 bytes for FlashEdu, got shape "
            f"{tuple(pages.shape)} with strides {pages.stride()}"
        )
    return tiles


if triton_mode.COMPILE_ONLY:
    raise ImportError("TRITON_INTERPRET=0 only compiles where there is no GPU: unset it for vLLM")
