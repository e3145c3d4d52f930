"""`flashedu doctor --model`: real classes from tiny configs, and machines that are imagined."""

from __future__ import annotations

import importlib
import json
import socket
import sys
from pathlib import Path

import pytest

from flashedu import cli, doctor, doctor_model
from flashedu.doctor import Card, Facts, Finding
from flashedu.doctor_model import ModelFacts, diagnose, effect

transformers = pytest.importorskip("transformers")

from flashedu.integrations import named  # noqa: E402
from flashedu.integrations.probe import NAME, Seen, attention_layers, probe  # noqa: E402

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
TINY = {
    "llama": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    "bert": {**SIZES, "intermediate_size": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64},
    "vit": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
            "intermediate_size": 32, "image_size": 16, "patch_size": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64},
    "deberta-v2": {**SIZES, "intermediate_size": 32},
    "xlnet": {"d_model": 32, "n_head": 4, "n_layer": 2, "d_inner": 32, "vocab_size": 64},
    "falcon": {**SIZES},
    "gpt_neo": {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64,
                "attention_types": [[["global"], 2]]},
}  # fmt: skip
H200 = Card("NVIDIA H200", "580.1", (9, 0), 141 * 2**30)
T4 = Card("Tesla T4", "580.1", (7, 5), 15 * 2**30)


def folder(path: Path, kind: str, **more: object) -> str:
    values = {"model_type": kind, **TINY[kind], **more}
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def seen_in(path: Path, kind: str, **more: object) -> Seen:
    found = named.find(folder(path, kind, **more))
    return probe(found.model_class, found.config)


def model(seen: Seen | None = None, **facts: object) -> ModelFacts:
    """Llama in bfloat16, unless told otherwise."""
    facts = {
        "class_name": "LlamaModel", "source": "imagined", "supports_flash": True,
        "dtype": "bfloat16", "head_sizes": ((128, 128),),
        "seen": seen or Seen("meta", called={"LlamaAttention": 2}), **facts,
    }  # fmt: skip
    return ModelFacts(**facts)  # type: ignore[arg-type]


def machine(**facts: object) -> Facts:
    """One that has all that flash_attention_2 needs, unless told otherwise."""
    versions = {"torch": "2.13.0", "transformers": "5.24.0", "flash-attn": "2.8.3"}
    facts = {
        "python": "3.12.4", "versions": versions, "cards": (H200,), "torch_cuda": "13.0",
        "torch_sees_gpu": True, **facts,
    }  # fmt: skip
    return Facts(**facts)  # type: ignore[arg-type]


def blocking(machine: Facts, model: ModelFacts) -> list[str]:
    return [finding.name for finding in diagnose(machine, model) if finding.blocks]


def finding(name: str, machine: Facts, model: ModelFacts) -> Finding:
    (found,) = (f for f in diagnose(machine, model) if f.name == name)
    return found


def setting(seen: Seen | None, **facts: object) -> str:
    return finding("attn_implementation", machine(), model(seen, **facts)).found


def run_main(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["doctor", *args])
    out, err = capsys.readouterr()
    return code, out, err


# by calling


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_attention_layer_is_seen_to_call(tmp_path, kind) -> None:
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip(f"{kind} has no dispatch in Transformers {transformers.__version__}")
    seen = seen_in(tmp_path, kind)
    layers = 6 if kind == "t5" else 2  # encoder, decoder, and decoder to encoder
    assert (seen.how, sum(seen.called.values()), seen.head_sizes) == ("meta", layers, ((8, 8),))
    assert (seen.silent, seen.idle, seen.refused, seen.error) == ({}, {}, False, "")


@pytest.mark.parametrize(
    ("kind", "how", "layers"),
    [("bloom", "meta", {"BloomAttention": 2}), ("mpt", "meta", {"MptAttention": 2}),
     ("deberta-v2", "cpu", {"DisentangledSelfAttention": 2}),
     ("xlnet", "cpu", {"XLNetRelativeAttention": 2})],
)  # fmt: skip
def test_layers_that_ran_and_did_not_call_are_counted(tmp_path, kind, how, layers) -> None:
    seen = seen_in(tmp_path, kind)
    assert (seen.how, seen.called, seen.silent, seen.idle) == (how, {}, layers, {})


@pytest.mark.parametrize("kind", ["falcon", "gpt_neo"])
def test_a_class_with_a_table_of_its_own_refuses_the_name(tmp_path, kind) -> None:
    seen = seen_in(tmp_path, kind)
    assert seen.refused
    assert NAME in seen.error


def test_a_config_that_cannot_be_built_at_all_is_not_taken_for_a_refusal(tmp_path) -> None:
    found = named.find(folder(tmp_path, "bert"))
    found.config.hidden_size = 33  # not a multiple of the heads
    seen = probe(found.model_class, found.config)
    assert not seen.refused
    assert "33" in seen.error
    assert effect(model(seen)) == "unknown"


def test_flashedu_registered_before_changes_nothing(tmp_path) -> None:
    from flashedu.integrations.transformers import register

    register()
    assert seen_in(tmp_path, "llama").called


def test_a_class_without_attention_has_nothing_to_set(tmp_path) -> None:
    assert effect(model(seen_in(tmp_path, "mamba"))) == "none"


def test_a_forward_that_stops_early_proves_no_silence() -> None:
    assert not Seen("meta", silent={"Linear": 1}, idle={"Full": 1}, error="stopped").tells
    assert Seen("meta", silent={"Full": 1}, idle={"Full": 1}, error="stopped").tells


def test_size_does_not_matter_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(hidden_size=65536, num_attention_heads=512, num_hidden_layers=1)
    assert probe(LlamaModel, config).called == {"LlamaAttention": 1}


def test_the_config_that_was_asked_about_is_not_changed(tmp_path) -> None:
    found = named.find(folder(tmp_path, "llama"))
    before = found.config.to_dict(), found.config._attn_implementation
    probe(found.model_class, found.config)
    assert (found.config.to_dict(), found.config._attn_implementation) == before


def test_a_module_that_holds_an_attention_layer_is_none_itself() -> None:
    from transformers import BertConfig, BertModel

    layers = attention_layers(BertModel(BertConfig(**TINY["bert"])))
    assert [type(layer).__name__ for layer in layers] == ["BertSelfAttention"] * 2


# from a name to a config


def test_a_folder_its_file_a_type_and_a_class_name_a_model(tmp_path) -> None:
    path = folder(tmp_path, "llama", architectures=["LlamaForCausalLM"])
    for name in (path, f"{path}/config.json"):
        found = named.find(name)
        assert (found.class_name, found.config.hidden_size) == ("LlamaForCausalLM", 32)
    assert named.find("llama").class_name == "LlamaModel"
    assert named.find("BloomForCausalLM").class_name == "BloomForCausalLM"


def test_a_name_is_looked_up_in_the_local_hub_cache(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    folder(repository / "snapshots" / "abc", "gpt2")
    found = named.find("someone/small")
    assert (found.class_name, found.source) == ("GPT2Model", "from the local Hub cache")


WRONG = {
    "nothing": ("nobody/nothing", "is not here, and nothing is downloaded; name a folder"),
    "a path": ("./no/such/place", "'./no/such/place' is not here"),
    "no name": ("", "'' is not here"),
    "a long name": ("x" * 5000, "is not here"),
    "a slip": ("lama", "did you mean llama?"),
    "a class": ("LlamaForCausalML", "did you mean LlamaForCausalLM?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_name_is_one_line_that_asks_no_network(capsys, monkeypatch, case: str) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    name, said = WRONG[case]
    code, out, err = run_main(capsys, "--model", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flashedu doctor: --model: ")
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON: Expecting property name"),
        ("[1]", "is no config: it holds a list"),
        ("{}", "has no model_type"),
        ('{"model_type": "llamba"}', "has no model_type 'llamba'"),
        ('{"model_type": ["llama"]}', "has no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no config of llama"),
        ('{"model_type": "llama", "architectures": 5}', "architectures must be a list"),
        ('{"model_type": "mine", "auto_map": {}, "dtype": "float3"}', "is no config of mine"),
        (b"\xff\xfe{", "is not JSON"),
    ],
)
def test_a_wrong_config_is_one_line(capsys, tmp_path, text, said: str) -> None:
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "config.json").write_bytes(data)
    code, out, err = run_main(capsys, "--model", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_code_beside_the_config_is_not_run(capsys, tmp_path) -> None:
    values = {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text("raise AssertionError('run')")
    code, out, err = run_main(capsys, "--model", str(tmp_path), "--json")
    report = json.loads(out)
    assert (code, err, report["effect"]) == (1, "", "unknown")
    assert report["model"]["dtype"] == "float16"
    assert any("auto_map" in f["found"] for f in report["findings"])


def test_code_beside_a_config_that_transformers_knows_is_mentioned(tmp_path) -> None:
    _, facts = doctor_model.look(folder(tmp_path, "llama", auto_map={"AutoModel": "mine.Model"}))
    assert effect(facts) == "takes effect"
    assert "trust_remote_code" in finding("auto_map", machine(), facts).advice


def test_a_config_without_a_model_is_told_to_be_a_part() -> None:
    class Part(transformers.PreTrainedConfig):
        model_type = "part"

    with pytest.raises(named.UnknownModel, match="'part' is a part of a model; name the model"):
        named._class_for(Part())


# from facts to findings


def test_nothing_is_in_the_way_on_a_good_machine() -> None:
    assert all(f.status == "ok" for f in diagnose(machine(), model()))


@pytest.mark.parametrize(
    ("facts", "name", "said"),
    [
        ({"cards": ()}, "GPU", "no NVIDIA GPU"),
        ({"cards": (T4,)}, "GPU", "Tesla T4, compute capability 7.5"),
        ({"torch_cuda": None}, "CUDA in torch", "built for the CPU"),
        ({"torch_sees_gpu": False, "cards": (Card("H100", "535.9", (9, 0), 2**36),)},
         "CUDA in torch", "driver 535.9, but CUDA 13.0 needs 580 or later"),
        ({"torch_sees_gpu": False, "torch_gpu_warning": "no device"}, "CUDA in torch",
         "torch sees no GPU: no device"),
        ({"versions": {}}, "flash-attn", "not installed"),
        ({"versions": {"flash-attn": "2.1.0"}}, "flash-attn", "2.1.0"),
        ({"broken": {"flash-attn": "ImportError: undefined symbol"}}, "flash-attn", "undefined"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_in_the_way(facts, name, said) -> None:
    assert blocking(machine(**facts), model()) == [name]
    found = finding(name, machine(**facts), model())
    assert said in found.found
    assert found.advice


@pytest.mark.parametrize(
    ("facts", "name", "said"),
    [
        ({"dtype": "float32"}, "dtype", "float32, but flash-attn takes float16 and bfloat16 only"),
        ({"head_sizes": ((320, 320),)}, "head size", "320, but flash-attn takes 256 at most"),
        ({"supports_flash": False}, "support", "does not support flash_attention_2"),
    ],
)
def test_what_a_model_has_can_be_in_the_way(facts, name, said) -> None:
    assert blocking(machine(), model(**facts)) == [name]
    assert said in finding(name, machine(), model(**facts)).found


@pytest.mark.parametrize(
    ("size", "status", "advice"),
    [((64, 64), "ok", ""), ((256, 256), "ok", ""), ((20, 20), "note", "multiple of 8"),
     ((192, 128), "note", "one size for q, k and v")],
)  # fmt: skip
def test_a_head_size_that_needs_padding_is_a_note(size, status, advice) -> None:
    found = finding("head size", machine(), model(head_sizes=(size,)))
    assert found.status == status
    assert advice in found.advice


def test_no_dtype_and_the_hub_kernel_are_notes() -> None:
    hub = machine(versions={"torch": "2.13.0", "kernels": "0.11"})
    assert blocking(hub, model(dtype=None)) == []
    assert finding("flash-attn", hub, model()).status == "note"
    assert finding("dtype", hub, model(dtype=None)).status == "note"


def test_a_second_card_that_is_too_old_is_a_note() -> None:
    found = finding("GPU", machine(cards=(H200, T4)), model())
    assert (found.status, found.blocks) == ("note", False)


def test_each_outcome_has_its_sentence() -> None:
    a, b = {"A": 2}, {"B": 1}
    assert setting(Seen("meta", called=a)) == (
        "takes effect: 2 of 2 attention layers called what it names, "
        "in a forward on the meta device"
    )
    assert "in part: 2 of 3" in setting(Seen("meta", called=a, silent=b))
    assert setting(Seen("cpu", silent=a)) == (
        "is ignored: none of A (2) called what it names, in a forward of two layers on the CPU"
    )
    assert "is refused" in setting(Seen("meta", refused=True, error="KeyError"))
    assert setting(Seen("source", called=a, silent=b, error="no")) == (
        "should take effect, as its source says: A (2) looks it up, B (1) does not; "
        "not run here: no"
    )
    assert "nothing to set" in setting(Seen("meta"))
    assert setting(Seen("source", error="why")) == "not found out: why"
    assert "the dummy input did not reach B (1)" in setting(Seen("meta", called=a, idle=b))


def test_what_is_ignored_is_in_the_way_and_what_is_refused_may_not_be() -> None:
    assert blocking(machine(), model(Seen("meta", silent={"A": 2}))) == ["attn_implementation"]
    refused = model(Seen("meta", refused=True, error="KeyError"))
    assert blocking(machine(), refused) == []
    assert "flash_attention_2" in finding("attn_implementation", machine(), refused).advice


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    bare = Facts(python="3.12.4")
    models = [model(), model(Seen("meta", silent={"A": 1}), dtype="float32", supports_flash=False)]
    models += [model(Seen("source", error="why"), head_sizes=(), dtype=None)]
    for facts in models:
        assert all(f.advice for f in diagnose(bare, facts) if f.status != "ok")


# the command


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [("llama", 0, "attn_implementation takes effect in LlamaModel."),
     ("bloom", 1, "attn_implementation is ignored in BloomModel."),
     ("falcon", 1, "attn_implementation is refused in FalconModel.")],
)  # fmt: skip
def test_the_command_says_it_and_its_exit_code_too(capsys, tmp_path, kind, code, last) -> None:
    path = folder(tmp_path, kind)
    found, out, err = run_main(capsys, "--model", path)
    assert (found, err) == (code, "")
    assert last in out
    found, out, err = run_main(capsys, "--model", path, "--json")
    report = json.loads(out)
    assert (found, err, report["takes_effect"]) == (code, "", code == 0)
    assert report["flash_attention_2_runs"] == (not any(f["blocks"] for f in report["findings"]))


def test_without_transformers_it_is_one_line_with_the_command(capsys, monkeypatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: None if name == "transformers" else installed(name)
    )
    code, out, err = run_main(capsys, "--model", "llama")
    assert (code, out) == (1, "")
    assert err == (
        'flashedu doctor: --model needs transformers: pip install "transformers>=5.5,<6"\n'
    )


def test_a_transformers_that_fails_to_import_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run_main(capsys, "--model", "llama")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "fails to import" in err
