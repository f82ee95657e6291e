"""Writes the default model for servers that do not read GGUF files: the same weights in plain bfloat16.

`python -m benchmarks.peer_weights DIR` writes a folder as Hugging Face's save_pretrained does, with the tokenizer, for
vLLM and `transformers serve`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.hub.models import resolve


def main() -> None:
    """Read the GGUF file, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR")
    out: Path = parser.parse_args().out
    weights = resolve().weights
    stored = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )  # fmt: skip
    # transformers does not save a model that it read from a GGUF file, but it saves a plain model of the same config.
    config = stored.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(stored.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
