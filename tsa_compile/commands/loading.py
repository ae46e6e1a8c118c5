"""A model folder, also of one .gguf file, or a built-in shape, as a transformers model on a device with memory for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsa_compile import shapes
from tsa_compile.commands import texts
from tsa_compile.commands.checkpoint import TOKENIZER, WEIGHTS, check_weights, why
from tsa_compile.costs import memory
from tsa_compile.costs.models import require_transformers
from tsa_compile.errors import ConfigError

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer_config.json",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or the Hub, which `folder` names, or a shape with random weights."""

    name: str
    folder: Path | None
    config: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return int(self.config.get_text_config().num_hidden_layers)

    def check(self, length: int, batch: int = 1) -> None:
        """Raises MemoryShortage if the model and a prefill of this size do not fit the device's free memory."""
        trust = self.trust_remote_code
        memory.check_memory(self.config, self.dtype, self.device, length, batch, trust_remote_code=trust)
        if self.folder is not None and self.device.type != "cpu":  # through which the weights of a folder are loaded
            memory.check_memory(self.config, self.dtype, "cpu", 1, trust_remote_code=trust)

    def load(self, length: int, batch: int = 1) -> Any:
        """The model, once it is clear that it fits, with a prefill of this size."""
        self.check(length, batch)
        if self.folder is None:
            return shapes.build(self.config, self.device, self.dtype)
        options = {"config": self.config, "dtype": self.dtype, **_where(self.folder, self.trust_remote_code)}
        options.update(unpacked(texts.gguf_file(self.folder)))
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are told, not ignored
        try:
            model, found = _transformers().AutoModelForCausalLM.from_pretrained(str(self.folder), **options, **told)
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of transformers, safetensors, pickle, huggingface_hub, the folder's own code, ...
            reason = why(self.folder, error, WEIGHTS)
            raise ConfigError(f"{str(self.folder)!r} cannot be loaded as a causal language model: {reason}") from error
        check_weights(self.folder, model, found)
        return model.to(self.device).eval()

    def tokenizer(self, advice: str = "put its files there, or pass a JSONL file with input_ids") -> Any:
        """The folder's tokenizer; where there is none, a ConfigError that ends in the advice."""
        if self.folder is None:
            raise ConfigError(f"the shape {self.name!r} has no tokenizer: use --random, or a file of token ids (JSONL)")
        try:
            options = _where(self.folder, self.trust_remote_code)
            return _transformers().AutoTokenizer.from_pretrained(str(self.folder), **options)
        except MemoryError:
            raise
        except Exception as error:  # of tokenizers, sentencepiece, a package that is missing, ...
            inside = texts.is_hub_id(self.folder) or texts.gguf_file(self.folder) is not None
            if not inside and not any((self.folder / name).exists() for name in _TOKENIZER_FILES):
                few = ", ".join(_TOKENIZER_FILES[:3])
                raise ConfigError(f"{str(self.folder)!r} holds no tokenizer ({few}, ...): {advice}") from error
            reason = why(self.folder, error, TOKENIZER)
            raise ConfigError(f"{str(self.folder)!r} has no tokenizer that can be loaded ({reason}): {advice}") from error


def source(
    folder: Path | None, shape: str | None, layers: int | None, device: str, dtype: str, trust_remote_code: bool
) -> Source:
    """What the options of a command name.

    Raises:
        ConfigError: a folder that holds no model, a shape, device or dtype that is not there.
    """
    where = find_device(device)
    if shape is not None:
        config, name = shapes.model_config(shape, layers), shape
    else:
        assert folder is not None
        config, name = folder_config(folder, trust_remote_code), str(folder)
    return Source(name, folder, config, where, find_dtype(dtype, config, where), trust_remote_code)


def folder_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder, for which nothing is fetched, or of a model on the Hugging Face Hub.

    Raises:
        ConfigError: there is no such folder or model, or it holds no configuration of a causal language model.
    """
    texts.check_folder(folder)
    try:
        config = _transformers().AutoConfig.from_pretrained(str(folder), **_where(folder, trust_remote_code))
        text = config.get_text_config()
        assert text.num_hidden_layers > 0 and text.hidden_size > 0
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of transformers, huggingface_hub's checks of fields, the folder's own code, ...
        if texts.is_hub_id(folder) and isinstance(error, OSError):
            raise ConfigError(
                f"there is no folder {str(folder)!r}, and no such model could be had from the Hugging Face Hub "
                f"({_first_sentence(error)}): pass a model folder, check the id and the network, or log in for gated models"
            ) from error
        hint = (
            ""
            if trust_remote_code or "trust_remote_code" not in str(error)
            else "; --trust-remote-code runs the folder's code"
        )
        text = _first_sentence(error) or "no decoder layers"
        raise ConfigError(
            f"{str(folder / (texts.gguf_file(folder) or 'config.json'))!r} is no causal language model's configuration: "
            f"{text}{hint}"
        ) from error
    return config


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300].split(". ")[0]


def _where(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What every `from_pretrained` is told about a folder, for which nothing is fetched, or a model on the Hub."""
    file = texts.gguf_file(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not texts.is_hub_id(folder)}
    return options if file is None else {**options, "gguf_file": file}


def unpacked(file: str | None) -> dict[str, Any]:
    """What gives a GGUF file's weights as plain tensors, where transformers would keep them packed."""
    packed = getattr(require_transformers(), "GgufConfig", None)
    return {} if packed is None or file is None else {"quantization_config": packed(dequantize=True)}


def find_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one. ConfigError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts.check_device(name)
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices are there" if count else "no CUDA device was found"
            raise ConfigError(f"--device {name}: {found}; use --device cpu, or check the driver and PyTorch's build")
    return device


def find_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """ "auto": what the folder's weights are stored in; of a shape, bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        stored = getattr(config, "dtype", None)
        if isinstance(stored, torch.dtype) and stored in DTYPES:
            return stored
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, texts.dtype(name))


def _transformers() -> Any:
    """The package without its bars and advice on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers = require_transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
