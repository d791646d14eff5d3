"""The tokenizer of a MODEL: the one in its directory, or the one converted once from a GGUF file.

transformers rebuilds the vocabulary from GGUF metadata; how text is cut into words, and whether a BOS goes in front, it
takes from the architecture instead of the metadata, which is put right here.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lilliput.errors import CheckpointError
from lilliput.models.convert import NO_GGUF, drop_keys, kept, of_transformers
from lilliput.models.gguf import GgufFile, open_gguf
from lilliput.models.locate import locate
from lilliput.progress import warn

# Regular expressions by the name in `tokenizer.ggml.pre`, as llama.cpp applies them one after another
# (src/llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS % "{1,3}",),
    "llama3": (_WORDS % "{1,3}",),
    "qwen2": (_WORDS % "",),
}
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
    _set_bos(tokenizer, file)
    tokenizer.save_pretrained(directory)
    drop_keys(directory / "tokenizer_config.json", "is_local", "local_files_only")


def _set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Cut text into words as the metadata say."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or name in _AS_CONVERTED:
        return
    if name not in _SPLITS:
        warn(f"{file.path.name}: the pre-tokenizer '{name}' is not known here; text may be cut into other tokens")
        return
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[name]]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


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
