"""`lilliput data convert`: what it writes, its table and JSON, and what a person gets wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilliput.cli.data_convert import parse_columns
from lilliput.errors import UsageError
from tests.cli.test_commands import answer, refusal, run

TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "Hi",
        "role": "prompter",
        "review_result": True,
        "replies": [
            {"text": "Ho", "role": "assistant", "review_result": True, "rank": 1, "lang": "en"},
            {"text": "He", "role": "assistant", "review_result": True, "rank": 0, "lang": "en"},
            {"text": "Spam", "role": "assistant", "review_result": False},
        ],
    },
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trees_become_chats(tmp_path: Path) -> None:
    path, out = write(tmp_path / "trees.jsonl", TREE), tmp_path / "chats.jsonl"
    found = answer("data", "convert", path, "-o", out)
    assert {key: found[key] for key in ("source", "target", "rows", "chats", "bad", "out")} == {
        "source": "oasst",
        "target": "messages",
        "rows": 1,
        "chats": 1,
        "bad": 0,
        "out": str(out),
    }
    assert found["dropped"] == {"messages that reviewers refused": 1}
    assert lines(out) == [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]}]
    assert answer("data", "convert", path, "-o", out, "--paths", "all")["chats"] == 2
    assert answer("data", "convert", path, "-o", out, "--from", "oasst", "--to", "p3", "--unreviewed")["chats"] == 1
    assert lines(out) == [{"inputs": "Hi", "targets": "He"}]


def test_the_table(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "id": 4}, {"prompt": "a"}, {"prompt": 1, "completion": "b"}, []]
    path = write(tmp_path / "a.jsonl", *rows, {})
    shown = run("data", "convert", path, "-o", tmp_path / "out.jsonl", "--skip-bad-rows")
    assert shown.exit_code == 0, shown.stderr
    for words in ("5 rows of", "1 rows to", "a.jsonl:2: has no 'completion'", "and 1 more", "not carried over", "id"):
        assert words in shown.stdout
    assert "dropped" not in shown.stdout


def test_orphans_are_shown(tmp_path: Path) -> None:
    message = {"role": "prompter", "review_result": True}
    rows = [
        {"message_id": "1", "parent_id": None, "text": "Hi", **message},
        {"message_id": "2", "parent_id": "1", "text": "Ho", **message, "role": "assistant"},
        {"message_id": "3", "parent_id": "9", "text": "Lost", **message},
    ]
    path = write(tmp_path / "m.jsonl", *rows)
    assert answer("data", "convert", path, "-o", tmp_path / "out.jsonl")["orphans"] == ["m.jsonl:3"]
    assert "1 messages whose tree" in run("data", "convert", path, "-o", tmp_path / "out.jsonl").stdout


def test_columns_and_csv(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text('question,answer,about\nWhy?,"So, so.",x\n')
    columns = "user=question, assistant=answer,input=about"
    answer("data", "convert", tmp_path / "faq.csv", "-o", tmp_path / "out.json", "--columns", columns, "--to", "alpaca")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"instruction": "Why?", "input": "x", "output": "So, so."}
    ]


def test_tokens_are_those_of_the_models_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    from lilliput.data import load_examples
    from lilliput.models import load_tokenizer

    turns = [{"role": role, "content": "The quick brown fox."} for role in ("user", "assistant") * 3]
    path, out = write(tmp_path / "a.jsonl", {"messages": turns}), tmp_path / "out.jsonl"
    tokenizer = load_tokenizer(str(tiny_model_dir))
    whole = len(load_examples(path, tokenizer, max_length=10_000, progress=False).examples[0])
    found = answer("data", "convert", path, "-o", out, "--max-tokens", whole - 1, "--model", tiny_model_dir)
    assert (found["chats"], found["changed"]) == (2, {"chats cut into several": 1})
    assert not load_examples(out, tokenizer, max_length=whole - 1, progress=False).overlong
    assert answer("data", "convert", path, "-o", out, "--max-tokens", whole, "--model", tiny_model_dir)["chats"] == 1


def test_every_engine_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "trees.jsonl", TREE)
    answer("data", "convert", path, "-o", tmp_path / "a.jsonl")
    answer("data", "convert", path, "-o", tmp_path / "b.jsonl", "--engine", "process")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "oast"], "unknown form 'oast'; did you mean 'oasst'"),
        (["--to", "csv"], "--to: unknown form 'csv'"),
        (["--paths", "worst"], "--paths: unknown value 'worst'"),
        (["--keep-html"], "--keep-html: means nothing for rows of the form oasst"),
        (["--columns", "question"], "--columns: 'question' is no PART=COLUMN"),
        (["--columns", "usr=prompt,assistant=b"], "did you mean 'user'"),
        (["--columns", "prompt=user,b=assistant"], "the part stands first: user=prompt"),
        (["--max-chars", 0], "0 is not a length from 1 up"),
        (["--max-chars", 5, "--max-tokens", 5], "--max-chars and --max-tokens are both said"),
        (["--max-tokens", 5], "--max-tokens says nothing without --model"),
        (["--model", "smollm2-135m-instruct"], "--model says nothing without --max-tokens"),
        (["--engine", "rey"], "--engine: unknown value 'rey'"),
        (["--form", "oasst"], "--form"),
    ],
    ids=lambda option: "-".join(map(str, option)) if isinstance(option, list) else "",
)
def test_wrong_options(options: list[object], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "trees.jsonl", TREE)
    assert said in refusal("data", "convert", path, "-o", tmp_path / "out.jsonl", *options, status=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_files(tmp_path: Path) -> None:
    path = write(tmp_path / "trees.jsonl", TREE)
    assert "--out" in refusal("data", "convert", path, status=2)
    assert "is the file that is read" in refusal("data", "convert", path, "-o", path, status=2)
    assert "no suffix of what is written" in refusal("data", "convert", path, "-o", tmp_path / "a.parquet", status=2)
    assert "no such file" in refusal("data", "convert", tmp_path / "none.jsonl", "-o", tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "is empty" in refusal("data", "convert", tmp_path / "empty.jsonl", "-o", tmp_path / "out.jsonl")
    wrong = json.loads(json.dumps(TREE))
    wrong["prompt"]["replies"][2]["text"] = None
    path = write(tmp_path / "oasst.jsonl", TREE, wrong)
    line = refusal("data", "convert", path, "-o", tmp_path / "out.jsonl")
    assert "oasst.jsonl:2: replies[2].text is null, not text; 1 of the first 2 rows is bad" in line


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl", {"question": "a", "answr": "b"})
    line = refusal("data", "convert", path, "-o", tmp_path / "o.jsonl", "--columns", "user=question,assistant=answer")
    assert "faq.jsonl:1: has no 'answer' (it has 'question', 'answr')" in line


def test_parse_columns() -> None:
    assert parse_columns("user=a, assistant = b") == {"user": "a", "assistant": "b"}
    assert parse_columns("user=a=b,assistant=c") == {"user": "a=b", "assistant": "c"}
    for wrong in ("", "a", "user=", "=a", "user=a,"):
        with pytest.raises(UsageError, match="is no PART=COLUMN"):
            parse_columns(wrong)
    with pytest.raises(UsageError, match="two columns are said to be the user"):
        parse_columns("user=a,user=b")


def test_names_with_half_a_character_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "completion": "b", "x\ud83d": ""}, {"prompt": "a", "y\ud83d": 1}]
    write(path, *rows)
    shown = run("data", "convert", path, "-o", tmp_path / "out.jsonl", "--skip-bad-rows")
    assert shown.exit_code == 0, shown.stderr
    assert all(
        words in shown.stdout for words in ("x\\ud83d", "a.jsonl:2: has no 'completion' (it has 'prompt', 'y\\ud83d')")
    )
