"""The chat templates of the field, in our own words, and small tokenizers of the kinds they come with.

Each `Style` says what its template makes of one chat, by hand: the whole text, the labels between « and ».
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lilliput.data import Chat, Turn

CHAT = Chat(
    (Turn("user", "Hi!"), Turn("assistant", "Hello there."), Turn("user", "Why?"), Turn("assistant", "Because.")),
    "here:1",
)
WITH_SYSTEM = Chat((Turn("system", "Be kind."), *CHAT.turns), "here:2")


@dataclass(frozen=True)
class Style:
    """A template, the tokens it needs, and what CHAT becomes: labels between « and »."""

    name: str
    template: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    text: str
    adds_bos: bool = False  # the tokenizer puts BOS before a text by itself
    system: bool = True  # the template takes a system turn
    like_engines: bool = True  # apply_chat_template(tokenize=True) gives the same ids, but for what we add


CHATML = Style(
    "chatml",
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    None,
    "<|im_end|>",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n«Hello there.<|im_end|>»\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«Because.<|im_end|>»\n",
)
SMOLLM2 = Style(
    "smollm2 (default system prompt, BOS opens each turn)",
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    + str(CHATML.template),
    CHATML.special,
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>system\nYou are small.<|im_end|>\n" + CHATML.text,
)
LLAMA2 = Style(
    "llama-2 (system inside the first user turn, BOS at each user turn, all trimmed)",
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% if loop.first and sys %}{% set words = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set words = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + words.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + words.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    (),
    "<s>",
    "</s>",
    "<s>[INST] Hi! [/INST]« Hello there. </s>»<s>[INST] Why? [/INST]« Because. </s>»",
    adds_bos=True,
)
LLAMA3 = Style(
    "llama-3 (headers, trimmed)",
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello there.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Because.<|eot_id|>»",
    adds_bos=True,
    like_engines=False,  # tokenized in one go, "\n\nB" may share no boundary with the prompt that ends in "\n\n"
)
MISTRAL = Style(
    "mistral (no system, no generation prompt, EOS right behind the words)",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    (),
    "<s>",
    "</s>",
    "<s>[INST] Hi! [/INST]«Hello there.</s>»[INST] Why? [/INST]«Because.</s>»",
    adds_bos=True,
    system=False,
)
ZEPHYR = Style(
    "zephyr (no BOS in the template, the tokenizer adds it; markers are plain text)",
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    (),
    "<s>",
    "</s>",
    "<s><|user|>\nHi!</s>\n<|assistant|>\n«Hello there.</s>»\n<|user|>\nWhy?</s>\n<|assistant|>\n«Because.</s>»\n",
    adds_bos=True,
)
GEMMA = Style(
    "gemma (the assistant is called model, trimmed, no system)",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<start_of_turn>", "<end_of_turn>"),
    "<bos>",
    "<eos>",
    "<bos><start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\n«Hello there.<end_of_turn>»\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n«Because.<end_of_turn>»\n",
    adds_bos=True,
    system=False,
)
PHI3 = Style(
    "phi-3 (EOS behind the whole chat, <|end|> behind a turn)",
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<s>",
    "<|endoftext|>",
    "<|user|>\nHi!<|end|>\n<|assistant|>\n«Hello there.<|end|>»\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\n«Because.<|end|>»\n<|endoftext|>",
)
VICUNA = Style(
    "vicuna (one line, markers are plain text)",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    (),
    "<s>",
    "</s>",
    "<s>USER: Hi! ASSISTANT:« Hello there.</s>»USER: Why? ASSISTANT:« Because.</s>»",
    adds_bos=True,
)
VICUNA_SPACE = Style(
    "vicuna whose generation prompt ends with a space",
    str(VICUNA.template).replace("'ASSISTANT:'", "'ASSISTANT: '"),
    (),
    "<s>",
    "</s>",
    "<s>USER: Hi! ASSISTANT: «Hello there.</s>»USER: Why? ASSISTANT: «Because.</s>»",
    adds_bos=True,
    like_engines=False,  # tokenized in one go, " Hello" is one token that is half prompt
)
QWEN3 = Style(
    "qwen-3 (an empty thought before the last answer, which the generation prompt leaves to the model)",
    "{% for m in messages %}"
    "{% set thought = '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '' %}"
    "{{ '<|im_start|>' + m.role + '\n' + thought + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    None,
    "<|im_end|>",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n«Hello there.<|im_end|>»\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«Because.<|im_end|>»\n",
    like_engines=False,
)
NO_ENDING = Style(
    "plain text without an end of turn: EOS is put there",
    "{% for m in messages %}{{ m.role | title + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    (),
    None,
    "</s>",
    "User: Hi!\nAssistant:« Hello there.</s>»\nUser: Why?\nAssistant:« Because.</s>»\n",
    like_engines=False,
)
ALPACA = Style(
    "no template: the Alpaca prompt",
    None,
    (),
    "<s>",
    "</s>",
    "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi!\n\n### Response:\n«Hello there.</s>»\n\n"
    "### Instruction:\nWhy?\n\n### Response:\n«Because.</s>»",
    adds_bos=True,
    like_engines=False,
)
STYLES = (
    CHATML,
    SMOLLM2,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    ZEPHYR,
    GEMMA,
    PHI3,
    VICUNA,
    VICUNA_SPACE,
    QWEN3,
    NO_ENDING,
    ALPACA,
)

# ---- tokenizers --------------------------------------------------------------------------------------------------

CORPUS = [
    "Hi! Hello there. Why? Because.",
    "user assistant system model [INST] [/INST] <<SYS>> USER: ASSISTANT: <|user|> <|assistant|>",
    "### Instruction: ### Input: ### Response: Below is an instruction that describes a task.",
    "The quick brown fox jumps over the lazy dog. 12 345 6789, yes: no; maybe (so)!",
    "What is the capital of France? The capital of France is Paris.\n\nOne more line.\n",
] * 4
UNK = "<unk>"


def _byte_level() -> Tokenizer:
    """As GPT-2's: bytes, words told apart by a pattern; the offsets of a token leave its space out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    """As Llama-2's: a space is put before every stretch of text, by a normalizer; unknown letters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[UNK], show_progress=False)
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    return _with_byte_fallback(tokenizer)


def _metaspace_bpe() -> Tokenizer:
    """As newer ones of the kind: a space is put before the first stretch of text only."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[UNK], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_byte_fallback(tokenizer)


def _unigram() -> Tokenizer:
    """As T5's or ALBERT's: pieces by probability, a space before every word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=[UNK], unk_token=UNK, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    return Tokenizer.from_str(json.dumps(state))


def _with_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(state))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece_bpe,
    "metaspace": _metaspace_bpe,
    "unigram": _unigram,
}


@cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


@cache
def make_tokenizer(style: Style, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind with the style's template and special tokens. Shared: do not change it."""
    return new_tokenizer(style, kind)


def new_tokenizer(style: Style, kind: str) -> PreTrainedTokenizerFast:
    """The same, one's own."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    special = dict.fromkeys([*style.special, *([style.bos] if style.bos else []), style.eos])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if style.adds_bos:
        bos = str(style.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token=style.eos,
        unk_token=None if kind == "byte-level" else UNK,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = style.template
    return fast
