"""Pre-trained weights from a folder or the local cache, without running anything they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def from_pretrained(auto: Any, name: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained(name)` for a model class: safetensors only, and no code of the model's.

    Weights in pickles (`pytorch_model.bin`, `.pt`) are never read: to unpickle is to run what they
    hold. Raises OSError or ValueError whatever is wrong with the files.
    """
    try:
        return auto.from_pretrained(
            str(name), use_safetensors=True, trust_remote_code=False, **options
        )
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def config_of(name: str | Path) -> Any:
    """The Hugging Face configuration in a folder; raises OSError or ValueError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
