"""`FAMILIES` is the only table of `model_type`: other tables with these keys have exactly its entries."""

from __future__ import annotations

import pytest

from engine.checkpoint import gguf
from engine.errors import CheckpointError
from engine.models import FAMILIES, read_config
from engine.models.gqa.config import MEMBERS


def test_every_member_of_the_llama_family_has_its_fields() -> None:
    assert {
        kind for kind, module in FAMILIES.items() if module == "engine.models.gqa.family"
    } == MEMBERS.keys()


def test_every_architecture_of_gguf_files_is_one_of_a_family() -> None:
    assert gguf.ARCHITECTURES.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_line_leads_to_a_family_that_reads(kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"c\.json lacks '\w+', which a {kind} model needs"):
        read_config({"model_type": kind}, "c.json")


def test_another_is_refused_with_the_list() -> None:
    with pytest.raises(
        CheckpointError, match=r"model_type 'gpt2', which is not supported; supported: deepseek_v3, "
    ):
        read_config({"model_type": "gpt2"}, "c.json")
