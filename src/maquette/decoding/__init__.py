"""Decoding with a frozen language model under constraints from a static analyser."""
