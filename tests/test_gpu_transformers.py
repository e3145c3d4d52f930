"""FlashEdu in Transformers' models on a card, where kernels are compiled: each takes its part.

`pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from flashedu.integrations.transformers import attention_report
from flashedu.stages import rung
from tests.test_transformers import (
    FAMILIES,
    IDS,
    WAYS,
    WRITERS,
    assert_as_exact_as_eager,
    build,
    generated,
    padding,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none"
    ),
    # Of the first product in a fresh process: harmless. T5 takes the formula, and says so.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore::flashedu.integrations.transformers.SlowerPath"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_as_exact_as_eager(
    family: str, side: str, dtype: torch.dtype
) -> None:
    model = build(family, "FlashEdu", dtype).cuda()
    with attention_report(model) as report:
        assert_as_exact_as_eager(model, padding(side))
    assert not report.other
    on_hopper = dtype == torch.bfloat16 and rung("flash3").missing() is None
    stages = {stage for ran in report.stages.values() for stage in ran}
    assert stages <= {"flash3" if on_hopper else "flash2", "varlen"}
    assert stages or report.slower


@pytest.mark.filterwarnings("default")  # with a static cache, generate compiles the model
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", WRITERS)
def test_every_token_is_eagers(family: str, way: str) -> None:
    model = build(family, "FlashEdu").cuda()
    with attention_report(model) as report:
        tokens = generated(model, **WAYS[way])
    assert not report.slower
    assert {stage for ran in report.stages.values() for stage in ran} == {"decode"}  # 22 rows
    assert torch.equal(tokens, generated(build(family, "eager").cuda(), **WAYS[way]))


@pytest.mark.skipif(
    rung("flash3").missing() is not None, reason=rung("flash3").missing() or "it runs here"
)
def test_a_model_in_half_precision_takes_flash3_and_its_logits_are_as_exact_as_eager() -> None:
    half, longer = torch.bfloat16, dict(max_position_embeddings=128)
    model = build("llama", "FlashEdu", half, **longer).cuda()
    exact, eager = (build("llama", "eager", x, **longer).cuda() for x in (torch.float32, half))
    ids = torch.randint(3, 60, (2, 100), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad(), attention_report(model) as report:
        got, want = model(ids).logits, exact(ids).logits
    assert {stage for ran in report.stages.values() for stage in ran} == {"flash3"}
    with torch.no_grad():
        of_eager = (eager(ids).logits - want).norm()
    assert (got - want).norm() <= 2 * of_eager


def test_a_long_padded_prompt_goes_to_varlen_and_its_tokens_are_eagers() -> None:
    ids = torch.randint(3, 60, (2, 60), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    results = []
    for implementation in ("FlashEdu", "eager"):
        model = build("llama", implementation, max_position_embeddings=128).cuda()
        with attention_report(model) as report:
            results.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0)
            )
        if implementation == "FlashEdu":
            for ran in report.stages.values():
                assert dict(ran) == {"varlen": 1, "decode": 7}
    assert torch.equal(*results)


@pytest.mark.filterwarnings("default")  # torch.compile warns, by version
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_compiled_forward_gives_the_logits_of_the_model(side: str) -> None:
    model, mask = build("llama", "FlashEdu").cuda(), padding(side).cuda()
    ids = IDS.cuda()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        got = torch.compile(model)(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4 * want.abs().max())
