"""A talk: the answer is generate's own, the memory of turns, stopping, and what happens when the context is full."""

from __future__ import annotations

import threading

import pytest
import torch

from lilliput.data import Chat, Turn, prompt_ids
from lilliput.errors import DataError, UsageError
from lilliput.generation import ChatSession, Sampling
from lilliput.generation.chat import Detokenizer, end_tokens

# as Qwen3's: an earlier answer loses its thoughts
THINKING = (
    "{% for m in messages %}{% set words = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def talker(tiny_llama, tiny_tokenizer):
    """A session over the tiny model, which talks nonsense, but always the same."""

    def make(system: str | None = None, **sampling: object) -> ChatSession:
        options = {"max_new_tokens": 12, **sampling}
        return ChatSession(tiny_llama(), tiny_tokenizer, system, Sampling(**options))

    return make


def test_greedy_answer_equals_transformers_generate(talker) -> None:
    session = talker()
    answer = "".join(session.reply("What is the capital of France?"))
    ids = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    made = session.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert answer == session.tokenizer.decode(made, skip_special_tokens=True)
    assert answer


def test_the_prompt_is_the_one_of_training(talker) -> None:
    session = talker(system="Be brief.")
    first = "".join(session.reply("Hello"))
    turns = (Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", first), Turn("user", "More"))
    assert session._prompt((*session.turns, Turn("user", "More"))) == prompt_ids(Chat(turns, ""), session.tokenizer)


def test_turns_are_remembered_and_reset_forgets_them(talker) -> None:
    session = talker()
    one = "".join(session.reply("Hello"))
    two = "".join(session.reply("And now?"))
    assert [turn.content for turn in session.turns] == ["Hello", one, "And now?", two]
    session.reset(session.system)
    assert session.turns == ()
    assert "".join(session.reply("Hello")) == one


def test_thoughts_are_not_remembered_where_the_template_drops_them(talker, monkeypatch) -> None:
    session = talker()
    session.tokenizer.chat_template = THINKING
    said = iter(["<think>\nA greeting.\n</think>\n\nHello!", "<think>\nWhat now", "Bye."])
    monkeypatch.setattr(session, "_stream", lambda ids: iter([next(said)]))
    assert "A greeting." in "".join(session.reply("Hi"))
    list(session.reply("And?"))  # cut short while it thought: nothing was said
    list(session.reply("Bye"))
    assert [turn.content.strip() for turn in session.turns] == ["Hi", "Hello!", "Bye", "Bye."]


def test_seeded_talks_are_equal_and_others_are_not(talker) -> None:
    def talk(seed: int) -> list[str]:
        session = talker(temperature=1.5, seed=seed)
        return ["".join(session.reply(text)) for text in ("Hello", "Hello again")]

    assert talk(4) == talk(4) != talk(5)


def test_the_answer_ends_at_the_end_of_turn_token(talker) -> None:
    session = talker(max_new_tokens=50)
    [stop] = session.stop_tokens
    head = session.model.get_output_embeddings()
    with torch.no_grad():  # a model that wants nothing but to end its turn
        head.weight.zero_()
    assert session.tokenizer.convert_ids_to_tokens(stop) == "<|im_end|>"
    session._sampler = lambda scores, seen: stop
    assert "".join(session.reply("Hello")) == ""
    assert session.tokens_out == 1
    assert session.turns == ()  # no words, no turn


def test_a_checkpoints_list_of_end_tokens_counts(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = [0, 17]
    assert end_tokens(model, tiny_tokenizer) == {0, 2, 17}


def test_a_stopped_answer_stops_the_model_and_keeps_what_was_said(talker) -> None:
    session, before = talker(max_new_tokens=400), threading.active_count()
    pieces = session.reply("Hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert threading.active_count() == before
    assert session.tokens_out < 400
    assert session.turns[-1].content == said
    assert "".join(session.reply("Go on"))


def test_an_error_in_the_model_surfaces_and_the_turn_is_not_remembered(talker) -> None:
    session = talker()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the model broke")

    session.model.forward = broken
    with pytest.raises(RuntimeError, match="the model broke"):
        list(session.reply("Hello"))
    assert session.turns == ()


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tiny_llama, tiny_tokenizer, capsys) -> None:
    model = tiny_llama(max_position_embeddings=128)
    session = ChatSession(model, tiny_tokenizer, "Be brief.", Sampling(max_new_tokens=16))
    for number in range(8):
        list(session.reply(f"Question number {number}, please."))
    assert session.turns[-2].content == "Question number 7, please."
    assert session.turns[0].role == "user"
    assert len(session.turns) < 16
    assert len(session._prompt(session.turns[:-1])) + 16 <= 128
    assert "forgotten" in capsys.readouterr().err


def test_a_message_longer_than_the_context_is_refused(tiny_llama, tiny_tokenizer) -> None:
    session = ChatSession(tiny_llama(max_position_embeddings=64), tiny_tokenizer)
    with pytest.raises(DataError, match="context is 64"):
        list(session.reply("word " * 100))
    assert session.turns == ()


def test_an_answer_never_runs_past_the_context(tiny_llama, tiny_tokenizer) -> None:
    session = ChatSession(
        tiny_llama(max_position_embeddings=64), tiny_tokenizer, sampling=Sampling(max_new_tokens=1000)
    )
    session.stop_tokens = frozenset()
    list(session.reply("Hello"))
    assert len(session._prompt(session.turns[:1])) + session.tokens_out == 64


def test_pieces_join_to_the_decoded_text_and_never_hold_half_a_character(tiny_tokenizer) -> None:
    text = "Größe 中文 🙂 fin.  Two  spaces\n\n and 12 345"
    ids = tiny_tokenizer(text)["input_ids"]
    words = Detokenizer(tiny_tokenizer)
    pieces = [words.push(token) for token in ids]
    assert "".join(pieces) + words.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10


def test_a_cut_character_at_the_end_is_shown_as_broken(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("ok 🙂")["input_ids"][:-1]
    words = Detokenizer(tiny_tokenizer)
    text = "".join(words.push(token) for token in ids) + words.flush()
    assert text.startswith("ok ")
    assert "\ufffd" in text


def test_wrong_sampling_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="top-p"):
        Sampling(top_p=2)
