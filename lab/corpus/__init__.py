"""The corpus that the indexer is distilled on, built from freely licensed packages by one seeded command.

`dsa corpus --out DIR --model MODEL`, or `build_corpus`. Trains nothing and imports no torch.
"""

from lab.corpus.build import build_corpus
from lab.corpus.manifest import Manifest, load_manifest, load_tokens

__all__ = ["Manifest", "build_corpus", "load_manifest", "load_tokens"]
