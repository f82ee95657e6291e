"""From text to token ids and back: tokenizers, and incremental decoding with stop strings."""
