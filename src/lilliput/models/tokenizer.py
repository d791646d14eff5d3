"""The tokenizer of a MODEL: the one in its directory, or the one converted once from a GGUF file.

transformers rebuilds the vocabulary from GGUF metadata; how text is cut into words, and whether a BOS goes in front, it
takes from the architecture instead of the metadata, which is put right here.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lilliput.errors import CheckpointError
from lilliput.models.convert import NO_GGUF, drop_keys, kept, of_transformers
from lilliput.models.gguf import GgufFile, open_gguf
from lilliput.models.locate import locate
from lilliput.models.pre_tokenizers import cut_named
from lilliput.progress import warn

_AS_CONVERTED = ("default", "gpt-2")  # what transformers makes of them is right


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, which is anything that `load_model` takes.

    Raises CheckpointError when there is none, or a broken one.
    """
    source = locate(model)
    directory = source.path if source.kind == "directory" else tokenizer_directory(open_gguf(source.path))
    todo = "tokenizer.json and tokenizer_config.json belong beside config.json."
    with of_transformers(directory, "has no tokenizer that can be read", todo):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def tokenizer_directory(file: GgufFile) -> Path:
    """The directory with the tokenizer of a GGUF file, as transformers saves it; made on the first call.

    Raises CheckpointError when the metadata hold none, or one that transformers cannot rebuild.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise CheckpointError("holds no tokenizer ('tokenizer.ggml.tokens' is missing)", where=str(file.path))
    return kept(file, "tokenizer", lambda directory: _convert(file, directory))


def _convert(file: GgufFile, directory: Path) -> None:
    with of_transformers(file.path, "transformers cannot make a tokenizer of its metadata", NO_GGUF):
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    if (length := file.metadata.get(f"{file.architecture}.context_length")) is not None:
        tokenizer.model_max_length = length
    _set_pre_tokenizer(tokenizer, file)
    _set_blanks(tokenizer, file)
    _set_bos(tokenizer, file)
    tokenizer.save_pretrained(directory)
    drop_keys(directory / "tokenizer_config.json", "is_local", "local_files_only")


def _set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Cut text into words as the metadata say."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or name in _AS_CONVERTED:
        return
    if (cut := cut_named(name)) is None:
        warn(f"{file.path.name}: the pre-tokenizer '{name}' is not known here; text may be cut into other tokens")
        return
    tokenizer.backend_tokenizer.pre_tokenizer = cut.pre_tokenizer()
    if cut.ignore_merges:
        tokenizer.backend_tokenizer.model.ignore_merges = True


def _set_blanks(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """For sentencepiece: put a blank in front of text, or none, as the metadata say; also where it begins with one."""
    if file.metadata.get("tokenizer.ggml.model") != "llama":
        return
    front = [Prepend("▁")] if file.metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.backend_tokenizer.normalizer = Sequence([*front, Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None


def _set_bos(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Put one BOS in front, or none, as the metadata say; where they are silent a sentencepiece vocabulary has one."""
    wanted = file.metadata.get("tokenizer.ggml.add_bos_token", file.metadata.get("tokenizer.ggml.model") == "llama")
    bos = tokenizer.bos_token
    if bos is None or (tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]) == wanted:
        return
    front = f"{bos} " if wanted else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{front}$A", pair=f"{front}$A {front}$B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
