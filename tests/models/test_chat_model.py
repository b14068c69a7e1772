"""Loading chat models, and refusing what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prefmw.errors import ChatTemplateError, ModelError, ModelNotFoundError, UsageError
from prefmw.models import ModelSpec, check_transformers, load_chat_model
from prefmw.models.chat_model import fingerprint


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "copy"))


def test_a_chat_model_loads_with_its_limits(chat_model, toy):
    assert chat_model.name == str(toy)
    assert chat_model.capacity == 512
    assert chat_model.vocabulary == len(chat_model.tokenizer)
    assert chat_model.stop_ids == {chat_model.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert chat_model.load_s > 0
    assert not chat_model.module.training


def test_automatic_dtype_on_a_cpu_is_float32(copy):
    config = json.loads((copy / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (copy / "config.json").write_text(json.dumps(config))
    assert load_chat_model(ModelSpec(str(copy), device="cpu")).dtype == "float32"
    assert load_chat_model(ModelSpec(str(copy), device="cpu", dtype="bfloat16")).dtype == "bfloat16"


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_automatic_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, chosen):
    from prefmw.models.chat_model import find_device

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert find_device("auto").type == chosen


def test_an_end_token_behind_a_gap_of_ids_can_be_sampled(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    end = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    vocabulary = tokenizer["model"]["vocab"]
    del vocabulary["<|im_end|>"]
    lost = max(vocabulary, key=vocabulary.get)  # leaves a gap in front of the end token
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) != lost]
    end["id"] = vocabulary.pop(lost)
    vocabulary["<|im_end|>"] = end["id"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    chat = load_chat_model(ModelSpec(str(copy)))
    assert end["id"] in chat.stop_ids
    assert end["id"] < chat.vocabulary


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        ("GatedRepoError", ModelError, "hf auth login"),
        ("RepositoryNotFoundError", ModelNotFoundError, "knows no such id"),
        ("RevisionNotFoundError", ModelNotFoundError, "knows no such id or revision"),
        ("LocalEntryNotFoundError", ModelNotFoundError, "not in the local cache"),
        (None, ModelError, "No space left"),
    ],
)
def test_what_the_hub_says_is_told_for_what_it_is(cause, kind, message):
    from huggingface_hub import errors

    from prefmw.models.chat_model import _translated

    error = OSError("No space left on device")
    if cause:
        error.__cause__ = getattr(errors, cause).__new__(getattr(errors, cause))
    translated = _translated("some/model", "some/model", error)
    assert type(translated) is kind
    assert message in str(translated)


def test_automatic_dtype_on_an_accelerator_is_the_checkpoint_s():
    from prefmw.models.chat_model import _dtype

    gpu = torch.device("cuda")
    assert _dtype("auto", gpu, torch.float16) == torch.float16
    assert _dtype("auto", gpu, None) == torch.bfloat16


def test_device_map_passes_through(toy):
    assert load_chat_model(ModelSpec(str(toy), device_map={"": "cpu"})).device.type == "cpu"


def test_quantisation_config_passes_through(toy):
    # The package that reads this format is not installed, and transformers names it: so the config reached it.
    with pytest.raises(ModelError, match="(?i)hqq"):
        load_chat_model(ModelSpec(str(toy), device="cpu", quantization={"quant_method": "hqq", "nbits": 4}))


@pytest.mark.parametrize("config", [{}, {"quant_method": "no-such-method"}])
def test_a_quantisation_config_that_transformers_refuses_is_told(toy, config):
    with pytest.raises(UsageError, match="quantisation"):
        load_chat_model(ModelSpec(str(toy), quantization=config))


def test_revision_changes_with_the_files(copy):
    before = fingerprint(copy)
    assert fingerprint(copy) == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert fingerprint(copy) != before


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_path_that_does_not_exist_is_told(name):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_chat_model(ModelSpec(name))


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_a_hub_id_that_cannot_be_had_is_told(name):
    with pytest.raises(ModelNotFoundError, match="no model"):
        load_chat_model(ModelSpec(name))


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        load_chat_model(ModelSpec(str(file)))


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_chat_model(ModelSpec(str(tmp_path)))


def test_a_model_without_a_chat_template_is_told(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load_chat_model(ModelSpec(str(copy)))


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_chat_model(ModelSpec(str(copy)))


def test_weights_cut_short_are_told(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_chat_model(ModelSpec(str(copy)))


def test_code_that_comes_with_a_model_does_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError):
        load_chat_model(ModelSpec(str(copy)))


@pytest.mark.parametrize(
    "changes", [{"dtype": "float8"}, {"device": "tpu9"}, {"device": "cuda:99"}, {"device": "meta"}]
)
def test_unknown_dtype_or_device_is_told(toy, changes):
    with pytest.raises(UsageError, match="dtype|device"):
        load_chat_model(ModelSpec(str(toy), **changes))


@pytest.mark.parametrize("installed", ["4.57.1", "5.16.9", "6.0.0", "6.0.0.dev0", "6.0rc1"])
def test_transformers_outside_the_supported_range_is_refused(installed):
    with pytest.raises(ModelError, match="pip install 'transformers>=5.17,<6.0'"):
        check_transformers(installed)


@pytest.mark.parametrize("installed", ["5.17.0", "5.23.0", "5.99.1rc1"])
def test_transformers_within_the_supported_range_is_taken(installed):
    check_transformers(installed)
