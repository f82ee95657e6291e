"""Builds the corpus that the indexer is trained on and measured with, from freely licensed packages.

Start it with `dsa corpus --out DIR --model MODEL` or `build_corpus`. It trains nothing and imports no torch.
"""

from lab.corpus.build import build_corpus
from lab.corpus.manifest import Manifest, load_manifest, load_tokens

__all__ = ["Manifest", "build_corpus", "load_manifest", "load_tokens"]
