"""A local chat model: weights, tokenizer, template and limits, loaded by path or hub id.

Weights are read from safetensors only, and code that comes with a model runs only where it is asked for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from prefmw.at_hand import nearest_model
from prefmw.errors import ModelError, ModelNotFoundError, PrefmwError, UsageError
from prefmw.models.templating import ChatTemplate

TRANSFORMERS_MIN, TRANSFORMERS_BELOW = (5, 17), (6, 0)
"""The transformers versions that prefmw is tested with; the same range stands in pyproject.toml."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """Which chat model to load, and how.

    Args:
        name: a path, or a hub id such as ``Qwen/Qwen2.5-0.5B-Instruct``.
        path: a folder to load instead of looking ``name`` up.
        revision: of a hub id: branch, tag or commit.
        device: ``auto`` (cuda, else mps, else cpu) or a torch device.
        dtype: ``auto`` (the checkpoint's on an accelerator, bfloat16 if it names none; float32 on a CPU), ``float32``,
            ``bfloat16`` or ``float16``.
        device_map: handed to transformers; takes the place of ``device``.
        quantization: handed to transformers as its quantisation config, ``{"load_in_4bit": true}`` say.
        trust_remote_code: run code that comes with the model.
        template_options: variables of the chat template, ``{"enable_thinking": false}`` say.
    """

    name: str
    path: Path | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatModel:
    """A loaded chat model.

    ``revision`` is the hub's commit, or a fingerprint of a local folder's files; ``load_s`` the seconds that weights
    and tokenizer took, imports apart.
    """

    name: str
    revision: str
    module: Any
    tokenizer: Any
    template: ChatTemplate
    load_s: float
    spec: ModelSpec

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> str:
        """Type of the weights, ``bfloat16`` say."""
        return str(self.module.dtype).removeprefix("torch.")

    @cached_property
    def capacity(self) -> int:
        """Tokens that the model can attend to, prompt and reply together."""
        config = self.module.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    @cached_property
    def vocabulary(self) -> int:
        """Columns of the logits that are real tokens."""
        columns = int(self.module.config.get_text_config().vocab_size)
        ids: dict[str, int] = self.tokenizer.get_vocab()
        return min(max(ids.values()) + 1, columns)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the generation config's, the tokenizer's, and the template's end of turn."""
        named = self.module.generation_config.eos_token_id
        ids = set(named) if isinstance(named, list) else {named}
        ids |= {self.tokenizer.eos_token_id} | self.template.end_of_turn
        return frozenset(index for index in ids if index is not None)


def load_chat_model(spec: ModelSpec) -> ChatModel:
    """Load a chat model.

    Raises:
        ModelNotFoundError: nothing at that path, or nothing on the hub by that id.
        ChatTemplateError: the model has no chat template.
        ModelError: transformers is outside the supported range, or weights or tokenizer cannot be read.
        UsageError: an unknown dtype or device.
    """
    check_transformers()
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = find_device(spec.device)
    common: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    weights = dict(common, use_safetensors=True)
    if spec.device_map is not None:
        weights["device_map"] = spec.device_map
    elif spec.quantization is not None:  # quantised weights are put in place as they are read
        weights["device_map"] = {"": str(device)}
    source = _locate(spec)
    try:
        if spec.quantization is not None:
            weights["quantization_config"] = _quantization(spec.quantization)
        config = AutoConfig.from_pretrained(source, **common)
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports the architecture's code, which is not loading
        started = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        template = ChatTemplate(tokenizer, name=spec.name, options=spec.template_options)
        dtype = _dtype(spec.dtype, device, config.dtype)
        module = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **weights)
        if "device_map" not in weights:
            module = module.to(device)
    except PrefmwError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise what they like here
        raise _translated(spec.name, source, error) from error
    return ChatModel(
        name=spec.name,
        revision=_revision(source, spec.revision),
        module=module.eval(),
        tokenizer=tokenizer,
        template=template,
        load_s=time.perf_counter() - started,
        spec=spec,
    )


def check_transformers(installed: str | None = None) -> None:
    """Raise ModelError if transformers, in the ``installed`` version, is outside the supported range."""
    installed = installed or version("transformers")
    release = Version(installed).release[:2]
    if not TRANSFORMERS_MIN <= release < TRANSFORMERS_BELOW:
        low, high = (".".join(map(str, bound)) for bound in (TRANSFORMERS_MIN, TRANSFORMERS_BELOW))
        raise ModelError(
            f"transformers {installed} is outside the supported range: pip install 'transformers>={low},<{high}'"
        )


def find_device(name: str) -> torch.device:
    """The torch device of that name; ``auto`` is cuda, else mps, else cpu.

    Raises:
        UsageError: there is no such device here.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the backend
            raise UsageError(f"no device '{name[:40]}' here; choose auto, cuda, mps or cpu") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _dtype(name: str, device: torch.device, checkpoint: torch.dtype | None) -> torch.dtype:
    """The type to load weights in; ``checkpoint`` is the one its config names, if any."""
    if name != "auto":
        if name not in _DTYPES:
            raise UsageError(f"no dtype '{name[:40]}'; choose auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else checkpoint or torch.bfloat16


def _quantization(config: Mapping[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(config))
    except ImportError:
        raise  # the package that reads this format, which the caller tells of
    except Exception as error:
        raise UsageError(f"transformers refuses this quantisation config: {_one_line(error)}") from error


def _locate(spec: ModelSpec) -> str:
    """The folder or hub id to load from; tells a mistyped path from a hub id before transformers takes it for one."""
    try:
        path = spec.path or Path(spec.name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
        has_config = (path / "config.json").is_file()
    except (RuntimeError, OSError) as error:  # ~somebody who does not exist; a name too long; a folder that is not ours
        reason = getattr(error, "strerror", None) or "write the path out"
        raise ModelNotFoundError(f"model '{spec.name[:80]}' does not exist or cannot be read: {reason}") from error
    looks_like_path = spec.name.startswith((".", "~", "/")) or spec.name.count("/") > 1 or not spec.name
    if is_file or (looks_like_path and not is_folder):
        what = "is a file" if is_file else "does not exist"
        raise ModelNotFoundError(f"model '{spec.name}' {what}; name the folder that holds config.json, or a hub id")
    if is_folder and not has_config:
        raise ModelNotFoundError(f"the folder '{spec.name}' holds no config.json; name the folder of a saved model")
    return str(path) if is_folder else spec.name


def _translated(name: str, source: str, error: Exception) -> PrefmwError:
    """The error of this tree that says what ``error`` means for a person who named a model."""
    if isinstance(error, OSError) and not Path(source).is_dir():
        return _from_hub(name, error)
    if isinstance(error, ImportError):
        return ModelError(f"model '{name}' needs a package that is not installed: {_one_line(error)}")
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(f"model '{name}' does not fit the device's memory; quantise it, or choose a smaller one")
    return ModelError(f"model '{name}' could not be loaded: {type(error).__name__}: {_one_line(error)}")


def _from_hub(name: str, error: OSError) -> PrefmwError:
    """What the hub, or its absence, means: transformers wraps the hub's own exceptions in OSError."""
    from huggingface_hub import constants, errors

    nowhere = f"no model '{name}': no such folder here"
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return ModelError(f"model '{name}' is gated: accept its terms on the hub, then run: hf auth login")
    if any(isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError) for cause in causes):
        return ModelNotFoundError(f"{nowhere}, and the hub knows no such id or revision; {nearest_model(name)}")
    if any(isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) for cause in causes):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return ModelNotFoundError(f"{nowhere}, not in the local cache, and {why}; {nearest_model(name)}")
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return ModelNotFoundError(f"{nowhere}, and no hub id looks like this; {nearest_model(name)}")
    return ModelError(f"model '{name}' could not be had from the hub: {_one_line(error)}")


def _revision(source: str, revision: str | None) -> str:
    """The commit of the hub's files that were loaded, or the fingerprint of a local folder."""
    if Path(source).is_dir():
        return fingerprint(Path(source))
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else "unknown"


def fingerprint(folder: Path) -> str:
    """Twelve hex digits that change when a model's files do: small files whole, large ones by size and samples."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in {".json", ".safetensors", ".jinja", ".model", ".txt"}:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= 1 << 24:
                digest.update(file.read())
                continue
            for place in range(16):
                file.seek(size * place // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:12]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
