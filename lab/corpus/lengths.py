"""How long the sequences of a corpus are, by the context of the model that it is for. All lengths are tokens.

An indexer must be trained at every position at which it serves. So the corpus for a longer context is not a longer list:
its sequences, chats, prompts and needles are longer themselves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The lengths of one corpus.

    Attributes:
        context: no sequence is longer.
        packed: lengths of sequences of running text, with the share of each.
        pasted: of documents that a chat begins with.
        explained: of chats that explain one section after another.
        hidden: of sequences with facts to find.
        asked: of texts that are pasted into prompts for the model's own answers.
        longest_prompt: such a prompt has at most so many, so that the context has room for an answer.
        long_prompts: of the prompts that faithfulness is measured on; a prompt has at most so many, and at least nine
            tenths unless its texts end before.
        needles: exact lengths of prompts with a needle.
        code_tasks: of code tasks; none if empty, because a small model solves none.
    """

    context: int
    packed: tuple[tuple[int, float], ...]
    pasted: tuple[int, ...]
    explained: tuple[int, ...]
    hidden: tuple[int, ...]
    asked: tuple[int, ...]
    longest_prompt: int
    long_prompts: tuple[int, ...]
    needles: tuple[int, ...]
    code_tasks: tuple[int, ...] = ()


OF_8K = Lengths(
    context=8192,
    packed=((8192, 0.6), (6144, 0.2), (4096, 0.2)),
    pasted=(700, 1500, 3000, 5000, 7000),
    explained=(1500, 3000, 6000, 7500),
    hidden=(1024, 2048, 3072, 4096, 6144, 8192, 8192),
    asked=(400, 800, 1500, 2500, 4000, 6000),
    longest_prompt=6500,
    long_prompts=(700, 1300, 2200, 3400, 5000, 6900),
    needles=(512, 1024, 2048, 3072, 4096, 6144, 8000),
)
# With 2048 selected, everything up to 2048 tokens is dense: shorter prompts and needles would measure nothing.
OF_32K = Lengths(
    context=32768,
    packed=((32768, 0.3), (16384, 0.4), (8192, 0.3)),
    pasted=(1500, 3000, 6000, 10000, 16000, 22000, 30000),
    explained=(3000, 6000, 12000, 20000, 28000),
    hidden=(4096, 8192, 12288, 16384, 24576, 32768, 32768),
    asked=(2500, 4000, 6000, 9000, 14000, 20000, 27000),
    longest_prompt=29000,
    long_prompts=(3500, 7000, 14000, 28000),
    needles=(2560, 4096, 6144, 8192, 12288, 20480, 30000),
    code_tasks=(3500, 7000, 14000, 28000),
)
BY_CONTEXT = {lengths.context: lengths for lengths in (OF_8K, OF_32K)}
"""The corpora that can be built: context -> lengths."""
