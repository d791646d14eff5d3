"""Calibration texts: plain files, rows with texts, rows with chats; how they are cut; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lilliput.data.calibration import load_calibration
from lilliput.errors import DataError, UsageError

TEXT = "One small step for a man, and then another one. " * 40


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_segments_are_spread_over_a_text(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    everything = ids_of(tiny_tokenizer, TEXT)
    found = load_calibration(path, tiny_tokenizer, samples=5, length=16)
    assert found.ids.shape == (5, 16)
    assert (found.tokens, found.available) == (80, len(everything))
    assert found.ids[0].tolist() == everything[:16]
    assert found.ids[-1].tolist() == everything[-16:]


def test_a_short_text_gives_what_it_has(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A few words only.")
    count = len(ids_of(tiny_tokenizer, "A few words only."))
    assert load_calibration(path, tiny_tokenizer, samples=9, length=2048).ids.shape == (1, count)
    assert load_calibration(path, tiny_tokenizer, samples=9, length=2).ids.shape == (count // 2, 2)


def test_rows_with_texts_end_with_the_end_of_text(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Row {n}."}) for n in range(3)))
    expected = [
        token for n in range(3) for token in [*ids_of(tiny_tokenizer, f"Row {n}."), tiny_tokenizer.eos_token_id]
    ]
    assert load_calibration(path, tiny_tokenizer, samples=1, length=len(expected)).ids[0].tolist() == expected


def test_chats_go_through_the_template(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"instruction": "Say hi.", "input": "", "output": "Hi!"}))
    found = load_calibration(path, tiny_tokenizer, samples=1, length=64)
    assert "<|im_start|>user" in tiny_tokenizer.decode(found.ids[0])
    assert "Hi!" in tiny_tokenizer.decode(found.ids[0])


def test_bad_input_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_calibration(tmp_path / "none.txt", tiny_tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="0 tokens"):
        load_calibration(tmp_path / "empty.txt", tiny_tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(DataError, match="not UTF-8"):
        load_calibration(tmp_path / "latin.txt", tiny_tokenizer)
    for wrong in ({"samples": 0}, {"length": 1}):
        with pytest.raises(UsageError, match="calibrate nothing"):
            load_calibration(tmp_path / "empty.txt", tiny_tokenizer, **wrong)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_calibration(tmp_path / "folder.txt", tiny_tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        load_calibration(tmp_path / "rows.jsonl", tiny_tokenizer)


def test_a_byte_that_is_not_utf8_is_told_by_its_place_in_the_file(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"a " * 30_000 + b"\xe9 and more")
    with pytest.raises(DataError, match="byte 60000 is not UTF-8"):
        load_calibration(path, tiny_tokenizer, samples=128, length=2048)
