"""The models of the accuracy study: their sizes, and their folders in transformers' form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from modeling_recall import RecallConfig, RecallForCausalLM
from starts import align
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHARD = "14MB"  # a shard stays below 15 MB
LIMIT = 50_000_000  # bytes of all weights
GAIN = 1.5  # of the norms of queries and keys, at the start: sharper attention than with 1
SIZES = dict(
    vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=32768,
)  # fmt: skip


def build_model(
    token_shift: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, aligned: bool = True, **sizes: Any
) -> Any:
    """A model with random weights: 15M parameters with SIZES, any of which `sizes` replaces.

    Args:
        token_shift: a `RecallForCausalLM`; without it, a plain `Qwen3ForCausalLM`.
        seed: of the weights, which do not depend on the device; the global generator is left as it was.
        aligned: starts from `starts.align`; else every projection is drawn by itself.
    """
    config_class, model_class = (RecallConfig, RecallForCausalLM) if token_shift else (Qwen3Config, Qwen3ForCausalLM)
    config = config_class(
        **(SIZES | sizes), rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        if aligned:
            align(model)
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.q_norm.weight, GAIN)
        nn.init.constant_(layer.self_attn.k_norm.weight, GAIN)
    return cast_parameters(model, dtype)


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Casts the parameters in place, as loading does. `model.to(dtype)` would round RoPE's frequencies too, which at 16K
    positions is another encoding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_checkpoint(model: Any, folder: str | Path, facts: dict[str, Any] | None = None) -> Path:
    """Writes bfloat16 safetensors in shards below 15 MB, config.json and, with a token shift, modeling_recall.py.

    The folder is replaced as a whole, by renaming: a reader never sees half of it.

    Args:
        facts: what is known about the weights, written to `training.json` beside them.

    Raises:
        ValueError: the weights need more than 50 MB.
    """
    folder = Path(folder)
    size = 2 * parameter_count(model)
    if size > LIMIT:
        raise ValueError(f"the weights need {size / 1e6:.0f} MB in bfloat16; a checkpoint may have {LIMIT / 1e6:.0f} MB")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write(model, new)
    if facts is not None:
        (new / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _write(model: Any, folder: Path) -> None:
    """Through a copy on the CPU, so that neither training's dtype nor its compiled layers are touched."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    cast_parameters(copy, torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if isinstance(model, RecallForCausalLM):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_recall.RecallConfig",
            "AutoModelForCausalLM": "modeling_recall.RecallForCausalLM",
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(Path(__file__).with_name("modeling_recall.py"), folder / "modeling_recall.py")


def load_checkpoint(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a folder, for evaluation.

    Raises:
        FileNotFoundError: there is no model in it. Asked for it, transformers would look for a repository of that name.
    """
    if not Path(folder, "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no config.json: pass the folder of a trained model (train.py)")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
