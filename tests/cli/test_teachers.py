"""The options of commands that let a model write, and a model on this machine that answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

from lilliput.cli.door import Answer, Door, Stopped, command
from lilliput.cli.local_teacher import LocalTeacher
from lilliput.cli.teachers import TeacherOptions, resumable, takes_teacher
from lilliput.data import Chat, Turn, prompt_ids
from lilliput.errors import TeacherError, UsageError
from lilliput.synthesis.endpoint import Endpoint
from lilliput.synthesis.run import Run
from lilliput.synthesis.teacher import Decoding, Reply, Request
from tests.synthesis.endpoint_server import FakeEndpoint

GREEDY = Decoding(temperature=0.0, max_tokens=12)
QUESTION = "What is the capital of France?"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def local(tiny_llama, tiny_tokenizer) -> LocalTeacher:
    return LocalTeacher(tiny_llama(), tiny_tokenizer, "tiny")


def ask(teacher: LocalTeacher, *requests: Request) -> list[Reply]:
    replies = dict(teacher.complete(requests))
    return [replace(replies[number], seconds=0.0) for number in range(len(requests))]


# ---- the model on this machine -------------------------------------------------------------------------------------


def test_a_greedy_answer_is_generates_own(local: LocalTeacher) -> None:
    [reply] = ask(local, Request("a", QUESTION, GREEDY, system="Be brief."))
    ids = prompt_ids(Chat((Turn("system", "Be brief."), Turn("user", QUESTION)), ""), local.tokenizer)
    made = local.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert reply.text == local.tokenizer.decode(made, skip_special_tokens=True) != ""
    assert (reply.model, reply.prompt_tokens, reply.completion_tokens) == ("tiny", len(ids), len(made))
    assert reply.finish == "length"


def test_plain_text_is_continued(tiny_llama, tiny_tokenizer) -> None:
    teacher = LocalTeacher(tiny_llama(), tiny_tokenizer, "tiny", completions=True)
    [reply] = ask(teacher, Request("a", QUESTION, GREEDY, system="A quiz."))
    ids = tiny_tokenizer(f"A quiz.\n\n{QUESTION}")["input_ids"]
    made = teacher.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert reply.text == tiny_tokenizer.decode(made, skip_special_tokens=True)


def test_an_answer_depends_on_its_seed_and_not_on_its_neighbours(local: LocalTeacher) -> None:
    def request(seed: int) -> Request:
        return Request(f"{seed}", QUESTION, Decoding(temperature=1.5, top_p=0.95, max_tokens=12), seed=seed)

    together = ask(local, request(1), request(2), request(3))
    assert together[1:] == ask(local, request(2), request(3))
    assert together[0] == ask(local, request(1))[0]
    assert len({reply.text for reply in together}) == 3


def test_an_answer_ends_at_a_stop_text(local: LocalTeacher) -> None:
    [whole] = ask(local, Request("a", QUESTION, GREEDY))
    stop = whole.text[8:11]
    assert stop not in whole.text[:8]
    [reply] = ask(local, Request("a", QUESTION, replace(GREEDY, stop=("nowhere", stop))))
    assert reply.text == whole.text[: whole.text.index(stop)]
    assert reply.finish == "stop"
    assert reply.completion_tokens < whole.completion_tokens


def test_an_answer_that_ends_by_itself(local: LocalTeacher) -> None:
    local.end = frozenset(range(512))  # whatever it says ends it
    [reply] = ask(local, Request("a", QUESTION, GREEDY))
    assert (reply.text, reply.finish, reply.completion_tokens) == ("", "stop", 1)


def test_penalties_are_openais(local: LocalTeacher) -> None:
    """Against a loop that subtracts them from the logits, as the API reference writes it."""
    decoding = replace(GREEDY, presence_penalty=-1.5, frequency_penalty=0.25)
    [reply] = ask(local, Request("a", QUESTION, decoding))
    ids = prompt_ids(Chat((Turn("user", QUESTION),), ""), local.tokenizer)
    made: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            scores = local.model(torch.tensor([ids + made])).logits[0, -1]
            for token in set(made):
                scores[token] -= -1.5 + 0.25 * made.count(token)
            made.append(int(scores.argmax()))
    assert reply.text == local.tokenizer.decode(made, skip_special_tokens=True)
    assert reply.text != ask(local, Request("a", QUESTION, GREEDY))[0].text


def test_a_prompt_that_is_too_long_is_no_crash(local: LocalTeacher) -> None:
    long, short = ask(local, Request("a", QUESTION * 100, GREEDY), Request("b", QUESTION, GREEDY))
    assert (long.text, long.finish) == ("", "failed")
    assert long.error.startswith("the prompt has ")
    assert "context is 512" in long.error
    assert short.error == ""


def test_an_answer_is_cut_at_the_models_context(local: LocalTeacher) -> None:
    prompt = QUESTION * 60
    ids = prompt_ids(Chat((Turn("user", prompt),), ""), local.tokenizer)
    assert 400 < len(ids) < 490
    [reply] = ask(local, Request("a", prompt, replace(GREEDY, max_tokens=1024)))
    assert reply.prompt_tokens + reply.completion_tokens == 512
    assert reply.finish == "length"


def test_a_template_without_system_turns(local: LocalTeacher, capsys: pytest.CaptureFixture[str]) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}"
    [joined] = ask(local, Request("a", f"Be brief.\n\n{QUESTION}", GREEDY))
    local.tokenizer.chat_template, plain = refuses + local.tokenizer.chat_template, local.tokenizer.chat_template
    try:
        replies = ask(local, *(Request(key, QUESTION, GREEDY, system="Be brief.") for key in "ab"))
    finally:
        local.tokenizer.chat_template = plain
    assert replies == [joined, joined]
    assert " ".join(capsys.readouterr().err.split()).count("its chat template takes no system turn") == 1


def test_a_run_with_a_local_model(local: LocalTeacher, tmp_path: Path) -> None:
    asked = [Request(f"{number}", QUESTION, GREEDY, seed=number) for number in range(3)]
    with Run(tmp_path, local, {"seed": 1}, progress=False) as run:
        first = run.ask(asked[:2])
    with Run(tmp_path, local, {"seed": 1}, progress=False) as run:
        assert run.ask(asked)[:2] == first


# ---- options -------------------------------------------------------------------------------------------------------


@takes_teacher
def write(teacher: TeacherOptions, out: Annotated[Path, typer.Option("--out", "-o")], rows: int = 5) -> Answer:
    """Write rows."""
    opened = teacher.open()
    return Answer(
        {"name": opened.name, "kind": type(opened).__name__, "rows": rows, "cost": teacher.price.of(10**6, 0)}
    )


@pytest.fixture
def run():
    app = typer.Typer(cls=Door)
    app.command(name="write")(command(write))
    app.callback()(lambda: None)

    def call(*words: str) -> tuple[int, dict]:
        done = CliRunner().invoke(app, ["write", "-o", "out", *words, "--json"])
        return done.exit_code, json.loads(done.stdout.splitlines()[-1])

    return call


def test_a_command_takes_all_options(run, tiny_model_dir: Path) -> None:
    status, said = run("--model", str(tiny_model_dir), "--format", "nf4", "--rows", "7", "--price-in", "2.5")
    assert status == 0
    assert said == {"name": f"{tiny_model_dir} as nf4", "kind": "LocalTeacher", "rows": 7, "cost": 2.5}


def test_a_url_is_an_endpoint(run) -> None:
    with FakeEndpoint(models=("writer-1",)) as fake:
        status, said = run("--model", fake.url, "--concurrency", "3")
        assert (status, said["name"], said["kind"]) == (0, "writer-1", "Endpoint")
        assert run("--model", fake.url, "--name", "writer-2")[1]["name"] == "writer-2"
        assert [seen.path for seen in fake.seen] == ["/v1/models"]  # a name that was given is not looked up


def test_options_reach_the_endpoint() -> None:
    options = TeacherOptions(
        "https://there/v1", name="m", rpm=60, tpm=1e5, timeout=5, retries=1, key_env="K", completions=True
    )
    teacher = options.open()
    assert isinstance(teacher, Endpoint)
    settings = teacher.settings
    assert (settings.requests_per_minute, settings.tokens_per_minute, settings.timeout) == (60, 1e5, 5)
    assert (settings.retries, settings.key_env, settings.completions) == (1, "K", True)
    assert teacher.name == "m (plain text)"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing option '--model'"),
        (["--model", "there.gguf", "--name", "x"], "--name: goes with the URL of an endpoint"),
        (["--model", "there.gguf", "--rpm", "5"], "--rpm: goes with the URL"),
        (["--model", "localhost:8000/v1"], "'localhost:8000/v1' is no URL. Do you mean http://localhost:8000/v1?"),
        (["--model", "http://there/v1", "--name", "m", "--adapter", "x"], "--adapter: goes with a model on"),
        (["--model", "http://there/v1", "--name", "m", "--format", "nf4"], "--format: goes with a model on"),
        (["--model", "http://there/v1", "--name", "m", "--concurrency", "0"], "--concurrency: 0 is not"),
        (["--model", "ftp://there/v1", "--name", "m"], "--model: 'ftp://there/v1' is no URL of an endpoint"),
        (["--model", "https://there/v1", "--name", "m", "--price-in", "-1"], "--price-in: -1.0 is not a price"),
    ],
)  # fmt: skip
def test_wrong_options_are_told(run, words: list[str], said: str) -> None:
    status, answer = run(*words)
    assert status == 2
    assert said in answer["error"]


def test_several_models_want_a_name(run) -> None:
    with FakeEndpoint(models=("large", "small")) as fake:
        status, said = run("--model", fake.url)
        assert status == 2
        assert said["error"] == f"{fake.url}: has 2 models, and none is named. Choose one with --name: large, small."
        fake.models = ()
        assert run("--model", fake.url)[1]["error"] == f"{fake.url}: has no models"


def test_an_endpoint_that_asks_for_a_key(run, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeEndpoint(key="sk-right") as fake:
        status, said = run("--model", fake.url)
        assert status == 1
        assert said["kind"] == TeacherError.__name__
        assert "variable OPENAI_API_KEY" in said["error"]
        monkeypatch.setenv("MINE", "sk-right")
        assert run("--model", fake.url, "--key-env", "MINE")[0] == 0


def test_ctrl_c_says_how_to_go_on() -> None:
    kept = r"out: stopped \(Ctrl-C\)\. Everything so far is kept: give the same command again"
    with pytest.raises(Stopped, match=kept), resumable("out"):
        raise KeyboardInterrupt
    with pytest.raises(UsageError), resumable("out"):
        raise UsageError("x")


def test_the_options_do_not_load_torch() -> None:
    program = (
        "import sys, lilliput.cli.teachers; print([m for m in ('torch', 'transformers', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
