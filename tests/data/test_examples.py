"""Files become sets of examples: lengths, counts, refusals; the real tokenizer on real rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lilliput.data import load_examples, make_example, prompt_ids, read_records, to_chat
from lilliput.errors import DataError, UsageError
from tests.data.templates import CHATML, LLAMA2, make_tokenizer

TOKENIZER = make_tokenizer(CHATML, "byte-level")


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(words: int, answer: int = 1) -> dict[str, str]:
    return {"prompt": "Hi " * words, "completion": "yes " * answer}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two short rows, one with a long question, one with a long answer."""
    return write(tmp_path / "rows.jsonl", [row(1), row(500), row(1, 500), row(2)])


def test_the_examples_of_a_file(mixed: Path) -> None:
    found = load_examples(mixed, TOKENIZER, max_length=4000, progress=False)
    records = read_records(mixed)
    assert found.examples == [make_example(to_chat(record), TOKENIZER) for record in records]
    assert found.sha256 == records.sha256
    assert found.report() == "4 examples"
    assert [example.origin for example in found] == [f"rows.jsonl:{line}" for line in (1, 2, 3, 4)]
    assert found.records is not None
    assert [record.fields for record in found.records] == [record.fields for record in records]


def test_overlong_rows_are_dropped_and_counted(mixed: Path) -> None:
    found = load_examples(mixed, TOKENIZER, max_length=100, progress=False)
    assert [example.origin for example in found] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert found.overlong == ["rows.jsonl:2", "rows.jsonl:3"]
    assert found.report() == "2 examples, 2 over-long rows dropped"


def test_overlong_rows_are_truncated_and_dropped_when_no_label_is_left(mixed: Path) -> None:
    whole = load_examples(mixed, TOKENIZER, max_length=4000, progress=False)
    found = load_examples(mixed, TOKENIZER, max_length=100, overlong="truncate", progress=False)
    assert [example.origin for example in found] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert found.overlong == ["rows.jsonl:2", "rows.jsonl:3"]
    assert found.unlabelled == ["rows.jsonl:2"]
    assert found.examples[1].input_ids == whole.examples[2].input_ids[:100]
    assert found.examples[1].label_mask == whole.examples[2].label_mask[:100]
    assert found.report() == "3 examples, 2 over-long rows truncated, 1 of them dropped because no label was left"


def test_overlong_rows_are_an_error_when_asked(mixed: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: .* tokens, and max_length is 100; 2 of 4 rows are longer"):
        load_examples(mixed, TOKENIZER, max_length=100, overlong="error", progress=False)
    assert len(load_examples(mixed, TOKENIZER, max_length=4000, overlong="error", progress=False)) == 4


def test_a_set_without_a_label_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(500), row(600)])
    for overlong in ("drop", "truncate"):
        with pytest.raises(DataError, match=r"no example with a label is left within 100 tokens; the shortest row has"):
            load_examples(path, TOKENIZER, max_length=100, overlong=overlong, progress=False)


def test_options_are_checked(mixed: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown overlong 'trunc'.*did you mean 'truncate'"):
        load_examples(mixed, TOKENIZER, max_length=100, overlong="trunc", progress=False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_length is 1"):
        load_examples(mixed, TOKENIZER, max_length=1, progress=False)


def test_bad_rows_of_all_sorts_are_counted_together_and_listed_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(1), {"prompt": "a", "completion": ""}, 17, row(1), {"text": "a"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'completion' is empty; 3 of 5 rows are bad.*--skip-bad-rows"):
        load_examples(path, TOKENIZER, max_length=100, progress=False)
    found = load_examples(path, TOKENIZER, max_length=100, skip_bad_rows=True, progress=False)
    assert len(found) == 2
    assert [skipped.origin for skipped in found.skipped] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:5"]
    assert [skipped.reason.split(";")[0] for skipped in found.skipped] == [
        "'completion' is empty",
        "is a number, not an object with named fields",
        "is of no known form",
    ]
    assert found.report() == "2 examples, 3 bad rows skipped"


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns * 2}])
    tokenizer = make_tokenizer(LLAMA2, "sentencepiece")
    assert len(load_examples(path, tokenizer, max_length=100, progress=False)) == 2
    path = write(tmp_path / "bad.jsonl", [{"messages": turns}, {"messages": turns[1:]}])
    with pytest.raises(DataError, match=r"bad.jsonl:2: turn 1 is the assistant's"):
        load_examples(path, tokenizer, max_length=100, progress=False)


def test_a_label_needs_a_token_before_it() -> None:
    from lilliput.data import Example

    assert Example([1, 2, 3], [True, False, True]).labels == 1


# ---- real rows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_tokenizer(smollm2: str) -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer with its chat template."""
    from lilliput.models import load_tokenizer

    return load_tokenizer(smollm2)


def test_smollm2_on_alpaca_rows(shared_data: Path, real_tokenizer: PreTrainedTokenizerBase) -> None:
    path = shared_data / "alpaca-en-1k.json"
    found = load_examples(path, real_tokenizer, max_length=100_000, progress=False)
    assert len(found) == 999
    end = real_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record, example in zip(read_records(path), found, strict=True):
        chat = to_chat(record)
        labels = [token for token, label in zip(example.input_ids, example.label_mask, strict=True) if label]
        assert real_tokenizer.decode(labels) == chat.turns[-1].content + "<|im_end|>"
        assert labels.count(end) == 1
        asked = prompt_ids(chat.prompt, real_tokenizer)
        assert example.input_ids[: len(asked)] == asked
        assert not any(example.label_mask[: len(asked)])
        assert example.label_mask[len(asked)]
        # what the template gives in one go, where words cannot be mistaken for tokens
        messages = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
        assert example.input_ids == real_tokenizer.apply_chat_template(messages, return_dict=False)


def test_smollm2_text_of_a_real_example(real_tokenizer: PreTrainedTokenizerBase) -> None:
    from lilliput.data import Record

    example = make_example(to_chat(Record({"prompt": "Hi", "completion": "Hello!"}, "")), real_tokenizer)
    assert real_tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["alpaca-gpteacher-roleplay.json", "alpaca-gsm8k-train.json"])
def test_real_files_without_a_loss(name: str, shared_data: Path) -> None:
    tokenizer = make_tokenizer(LLAMA2, "sentencepiece")
    records = read_records(shared_data / name)[:300]
    for record in records:
        chat = to_chat(record)
        example = make_example(chat, tokenizer)
        labels = [token for token, label in zip(example.input_ids, example.label_mask, strict=True) if label]
        said = tokenizer.decode(labels)
        assert said.endswith("</s>")
        assert said.removesuffix("</s>").strip() == chat.turns[-1].content.strip()
