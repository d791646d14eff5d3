"""Tasks and templates: every template of the package on a row of its task, and every way a task file can be wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lilliput.errors import UsageError
from lilliput.synthesis.flan_mix import Mix
from lilliput.synthesis.flan_tasks import (
    Task,
    load_task,
    parse_task,
    parse_yaml,
    placeholders,
    render,
    task_names,
    task_source,
)

EXPECTED = [
    "classification", "closed-book-qa", "commonsense", "coreference", "data-to-text", "nli", "paraphrase",
    "reading-comprehension", "sentiment", "summarisation", "translation",
]  # fmt: skip
# A row of each task: its values, and its own choices.
ROWS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "classification": ({"text": "Rain {tomorrow}", "label": "weather", "kind": "headline", "what": "topic"}, ()),
    "closed-book-qa": ({"question": "How many legs has a spider?", "answer": "eight"}, ("six", "eight")),
    "commonsense": ({"situation": "He cracked the egg", "answer": "into a pan"}, ("into a pan", "into a car")),
    "coreference": ({"sentence": "The cup hit the bag; _ broke.", "pronoun": "_", "answer": "cup"}, ("cup", "bag")),
    "data-to-text": ({"facts": "name : Zizzi | food : pasta", "text": "Zizzi serves pasta."}, ()),
    "nli": ({"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": "entailment"}, ()),
    "paraphrase": ({"sentence1": "He left.", "sentence2": "He went away.", "label": "the same"}, ()),
    "reading-comprehension": ({"passage": "Ann ate a pear.", "question": "What did Ann eat?", "answer": "a pear"}, ()),
    "sentiment": ({"sentence": "a gripping film", "label": "positive"}, ()),
    "summarisation": ({"document": "It rained all day. The river rose.", "summary": "Rain made the river rise."}, ()),
    "translation": (
        {"source": "Guten Tag", "target": "Good day", "source_language": "German", "target_language": "English"}, (),
    ),
}  # fmt: skip
TEMPLATES = [(name, number) for name in EXPECTED for number in range(len(load_task(name).templates))]

OWN = """
name: tone
columns:
  words: {aliases: [text]}
  label: {kind: label}
labels: {calm: [0], angry: [1]}
answer: label
templates:
  - {prompt: "How does this sound, {options}? {words}"}
  - {prompt: "Say something that sounds {label}.", answer: "{words}", turned: true}
"""


def example(name: str) -> tuple[Task, dict[str, str], list[str]]:
    task = load_task(name)
    if name == "classification":
        task = task.model_copy(update={"labels": {"sport": (), "weather": ()}})
    values, choices = ROWS[name]
    return task, values, list(choices or task.labels)


def test_the_tasks_of_the_issue_are_there() -> None:
    assert task_names() == EXPECTED
    assert all(load_task(name).name == name for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_ten_templates_and_three_of_them_turned_around(name: str) -> None:
    templates = load_task(name).templates
    assert len(templates) >= 10
    assert sum(template.turned for template in templates[:10]) >= 3
    assert len({template.prompt for template in templates}) == len(templates)


@pytest.mark.parametrize(("name", "number"), TEMPLATES)
def test_a_template_writes_a_row_in_full(name: str, number: int) -> None:
    task, values, options = example(name)
    template = task.templates[number]
    prompt, answer = render(template, values, options, listed=template.options)
    written = (prompt + answer).replace("{tomorrow}", "")  # braces of a row are not those of a template
    assert not re.search(r"[{}]", written)
    assert prompt
    assert prompt == prompt.strip()
    assert all(values[column] in prompt + answer for column in template.asks if column != "label" or not template.words)
    if template.turned:
        assert task.answer not in placeholders(template.answer)
        asked = {values[column] for column in values if task.columns[column].kind in ("text", "facts")}
        assert answer in asked
        assert "Answer with one of these" not in prompt
    elif options and (template.options or template.inline):
        shown = re.findall(r"^- (.*)$", prompt, re.MULTILINE) if template.options else [answer]
        assert answer in shown
        assert answer in prompt
        assert len(shown) in (1, len(options))


@pytest.mark.parametrize("name", ["sentiment", "nli", "paraphrase"])
def test_every_label_is_an_option_in_the_templates_own_words(name: str) -> None:
    task, values, _ = example(name)
    for template in task.templates:
        for label in task.labels:
            prompt, answer = render(template, {**values, "label": label}, list(task.labels), listed=True)
            assert template.turned or f"- {answer}" in prompt.splitlines()
        assert not template.words or set(template.words) == set(task.labels)


def test_options_in_a_sentence_and_below() -> None:
    task = load_task("nli")
    values = {"premise": "p", "hypothesis": "h", "label": "neutral"}
    inline = next(template for template in task.templates if template.inline)
    prompt, answer = render(inline, values, ["neutral", "contradiction", "entailment"])
    assert "neutral, contradiction or entailment" in prompt
    assert answer == "neutral"
    listed = next(template for template in task.templates if template.options and not template.words)
    prompt, _ = render(listed, values, list(task.labels), listed=True)
    assert prompt.endswith("\n\nAnswer with one of these:\n- entailment\n- neutral\n- contradiction")
    assert "Answer with" not in render(listed, values, list(task.labels))[0]


# ---- a person's own ----------------------------------------------------------------------------------------------


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "tone.yaml").write_text(OWN)
    task = load_task(tmp_path / "tone.yaml")
    assert task.label_names() == {"0": "calm", "1": "angry", "calm": "calm", "angry": "angry"}
    assert render(task.templates[0], {"words": "Go.", "label": "angry"}, ["calm", "angry"]) == (
        "How does this sound, calm or angry? Go.", "angry",
    )  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_show_prints_can_be_read_again(name: str) -> None:
    assert parse_task(task_source(name), "copy.yaml") == load_task(name)


def test_labels_named_by_a_person() -> None:
    task = load_task("sentiment")
    other = task.with_labels({"1": "bad", "2": "good"})
    assert other.label_names() == {"1": "bad", "2": "good", "bad": "bad", "good": "good"}
    assert 0 < len(other.templates) < len(task.templates)
    assert not any(template.words for template in other.templates)
    same = task.with_labels({"1": "negative", "2": "positive"})
    assert same.templates == task.templates
    assert same.label_names()["2"] == "positive"
    assert list(task.with_labels({"2": "positive", "1": "negative"}).labels) == list(task.labels)
    with pytest.raises(UsageError, match="has no labels"):
        load_task("summarisation").with_labels({"0": "bad"})


def changed(**changes: object) -> str:
    """OWN with other values at the top; None takes a key away."""
    values = {**yaml.safe_load(OWN), **changes}
    return yaml.safe_dump({key: value for key, value in values.items() if value is not None})


def one(**template: object) -> str:
    return changed(templates=[template])


ASK = "Say it: {words}"
FAULTS = {
    "no yaml": ("a: [", "no YAML"),
    "no mapping": ("- a", "expected keys"),
    "unknown key": (changed(template=[]), "template: unknown key; did you mean 'templates'?"),
    "missing key": (changed(answer=None), "answer: is missing"),
    "no templates": (changed(templates=[]), "templates"),
    "unknown key of a template": (one(prompt=ASK, option=True), "templates[1].option: unknown key; did you mean 'opt"),
    "unknown key of a column": (changed(columns={"words": {"alias": []}}), "did you mean 'aliases'?"),
    "unknown kind": (changed(columns={"words": {}, "label": {"kind": "labels"}}), "columns.label.kind"),
    "unknown column": (one(prompt="Say it: {word}"), "{word}, which is no column; did you mean 'words'?"),
    "format": (one(prompt="Say it: {words:>3}"), "no column name in braces"),
    "index": (one(prompt="Say it: {words[0]}"), "no column name in braces"),
    "open brace": (one(prompt="Say it: {words"), "templates[1].prompt"),
    "no column": (one(prompt="Say it."), "names no column"),
    "shows its answer": (one(prompt="{words} is {label}"), "shows {label}"),
    "options of a turned one": (one(prompt="{label}?", answer="{words}", turned=True, options=True), "turned around"),
    "options without any": (
        changed(columns={"words": {}, "label": {}}, labels=None, templates=[{"prompt": ASK, "options": True}]),
        "neither labels nor choices",
    ),
    "choices by name": (
        changed(columns={"words": {}, "of": {"kind": "choices"}, "label": {"kind": "answer"}}, labels=None,
                templates=[{"prompt": "{words} {of}"}]),
        "say {options}",
    ),
    "options that a row may lack": (
        changed(columns={"words": {}, "of": {"kind": "choices", "optional": True}, "label": {"kind": "answer"}},
                labels=None, templates=[{"prompt": "{words} {options}"}]),
        "options: true instead",
    ),
    "words of no label": (one(prompt=ASK, words={"calmly": "yes"}), "'calmly' is no label; did you mean 'calm'?"),
    "words that YAML reads as a truth value": (one(prompt=ASK, words={"calm": True}), "put it in quotes"),
    "two label columns": (changed(columns={"words": {"kind": "label"}, "label": {"kind": "label"}}), "2 of kind label"),
    "a label twice": (changed(labels={"calm": [0], "angry": [0]}), "'0' stands for two labels"),
    "labels without a column": (changed(columns={"words": {}, "label": {}}), "no column of kind label"),
    "answer is no column": (changed(answer="lable"), "did you mean 'label'?"),
    "a column called options": (changed(columns={"options": {}}), "cannot be a column's name"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_task_file_says_where_and_what(fault: str, tmp_path: Path) -> None:
    text, said = FAULTS[fault]
    (tmp_path / "tone.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_task(tmp_path / "tone.yaml")
    assert str(error.value).startswith(str(tmp_path / "tone.yaml"))
    assert said in str(error.value)


def test_what_the_page_shows_can_be_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "flan.md").read_text(encoding="utf-8")
    mix, task = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(parse_yaml(mix, "flan.md", Mix).parts) == 3
    assert len(parse_task(task, "flan.md").templates) == 4
    for name in EXPECTED:
        columns, labels = re.findall(rf"^\| `{name}` \| (.*?) \|(.*)\|$", page, re.MULTILINE)[0]
        assert sorted(re.findall(r"\w+", columns)) == sorted(load_task(name).columns)
        assert all(f"{label} ({values[0]})" in labels for label, values in load_task(name).labels.items())


def test_no_such_task(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'sentiment'"):
        load_task("sentimnt")
    with pytest.raises(UsageError, match="no task and no file"):
        load_task(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UsageError, match="cannot be read"):
        load_task(tmp_path / "latin.yaml")
