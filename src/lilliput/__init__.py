"""Lilliput fine-tunes, shrinks and runs large language models on the computer you already own."""

__version__ = "0.1.0"
