"""A tiny sentencepiece tokenizer, as Llama 1 and 2 have one: the trained pieces, and the same in transformers."""

from __future__ import annotations

import io

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.conftest import CORPUS

SIZE = 340  # 3 special tokens, 256 bytes, the rest is learnt


def train_pieces() -> sentencepiece.SentencePieceProcessor:
    """BPE with byte fallback, as Llama's; the same one each time."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=file,
        vocab_size=SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def as_fast(pieces: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """What transformers makes of it: merges in the order of the scores, a blank in front, BOS."""
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}
    merges = [
        (-scores[word], (word[:cut], word[cut:]))
        for word in scores
        for cut in range(1, len(word))
        if word[:cut] in scores and word[cut:] in scores and not word.startswith("<")
    ]
    ordered = [pair for _, pair in sorted(merges, key=lambda entry: entry[0])]
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocabulary, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
