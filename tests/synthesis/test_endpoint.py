"""An endpoint: whatever a server plays, each request gets its answer or a person learns why not and what to do."""

from __future__ import annotations

import asyncio
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from lilliput.errors import TeacherError, UsageError
from lilliput.synthesis import pace
from lilliput.synthesis.endpoint import Endpoint, EndpointSettings
from lilliput.synthesis.pace import retry_after
from lilliput.synthesis.teacher import Decoding, Reply, Request, cut, spoken
from tests.synthesis.endpoint_server import FakeEndpoint, echo, faults

KEY = "sk-test-1234567890"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens: this machine is asked without a proxy


@pytest.fixture
def fake() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as server:
        yield server


def endpoint(fake: FakeEndpoint, **changes: object) -> Endpoint:
    """A quick one: it hardly waits."""
    settings = {"model": "fake-1", "first_wait": 0.01, "longest_wait": 0.02, "timeout": 5.0, "retries": 3, **changes}
    return Endpoint(EndpointSettings(fake.url, **settings))


def ask(teacher: Endpoint, *prompts: str, **changes: object) -> list[Reply]:
    requests = [Request(f"k{number}", prompt, **changes) for number, prompt in enumerate(prompts)]
    replies = dict(teacher.complete(requests))
    return [replies[number] for number in range(len(prompts))]


def played(script: str, **changes: object) -> tuple[list[Reply], FakeEndpoint]:
    """One prompt against a script of faults."""
    with FakeEndpoint(faults=faults(script)) as fake:
        return ask(endpoint(fake, **changes), "Say something."), fake


# ---- good answers --------------------------------------------------------------------------------------------------


def test_answers_and_counts(fake: FakeEndpoint) -> None:
    prompts = [f"prompt {'x ' * number}" for number in range(20)]
    replies = ask(endpoint(fake), *prompts)
    assert [reply.text for reply in replies] == [echo(prompt) for prompt in prompts]
    assert replies[0].finish == "stop"
    assert replies[0].model == "fake-1"
    assert (replies[0].prompt_tokens, replies[0].completion_tokens, replies[0].tries) == (1, 3, 1)
    assert replies[0].seconds > 0
    assert ask(endpoint(fake)) == []


def test_the_request_is_in_the_words_of_the_api(fake: FakeEndpoint) -> None:
    decoding = Decoding(0.5, 0.9, 30, ("\n\n", "1", "2", "3", "4"), 1.0, 0.25)
    ask(endpoint(fake), "Hello.", decoding=decoding, system="Be brief.", seed=7, schema={"type": "object"})
    assert fake.seen[0].body == {
        "model": "fake-1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 30,
        "stop": ["\n\n", "1", "2", "3"],  # the API takes four
        "presence_penalty": 1.0,
        "frequency_penalty": 0.25,
        "seed": 7,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
    }
    assert "authorization" not in fake.seen[0].headers


def test_what_says_nothing_is_not_sent(fake: FakeEndpoint) -> None:
    ask(endpoint(fake), "Hello.")
    assert set(fake.seen[0].body) == {"model", "messages", "temperature", "max_tokens", "seed"}


def test_plain_continuation(fake: FakeEndpoint) -> None:
    [reply] = ask(endpoint(fake, completions=True), "Once upon a time", system="A tale.")
    assert fake.seen[0].path == "/v1/completions"
    assert fake.seen[0].body["prompt"] == "A tale.\n\nOnce upon a time"
    assert "messages" not in fake.seen[0].body
    assert reply.text == echo("A tale.\n\nOnce upon a time")


def test_an_answer_ends_at_a_stop_text_or_at_its_length() -> None:
    with FakeEndpoint(brain=lambda prompt: "one two\nthree END four") as fake:
        [stopped] = ask(endpoint(fake), "x", decoding=Decoding(stop=("a", "b", "c", "d", "END")))  # the fifth
        [cut_short] = ask(endpoint(fake), "x", decoding=Decoding(max_tokens=2))
    assert (stopped.text, stopped.finish) == ("one two\nthree ", "stop")
    assert (cut_short.text, cut_short.finish) == ("one two\n", "length")


def test_thoughts_are_left_out() -> None:
    with FakeEndpoint(brain=lambda prompt: "<think>\nHm END.\n</think>\n\nFive.") as fake:
        assert ask(endpoint(fake), "2 + 3?")[0].text == "Five."
    assert spoken("<think>Hm") == ""
    assert spoken("Five </think>") == "Five </think>"
    assert cut("abc", ("c", "b")) == ("a", True)
    assert cut("abc", ("", "x")) == ("abc", False)


def test_as_many_in_flight_as_allowed() -> None:
    together = threading.Barrier(8)  # an answer comes when eight are asked for

    def brain(prompt: str) -> str:
        together.wait(timeout=30)
        return prompt

    with FakeEndpoint(brain) as fake:
        replies = ask(endpoint(fake, concurrency=8, timeout=60), *map(str, range(24)))
        assert [reply.text for reply in replies] == [str(number) for number in range(24)]
        assert fake.most == 8


def test_one_at_a_time(fake: FakeEndpoint) -> None:
    ask(endpoint(fake, concurrency=1), *map(str, range(5)))
    assert fake.most == 1
    assert [seen.body["messages"][0]["content"] for seen in fake.seen] == list("01234")


def test_an_answer_is_there_before_the_others() -> None:
    with FakeEndpoint(always={"wait": "slow=90"}) as fake:
        started = time.monotonic()
        replies = endpoint(fake, timeout=90).complete([Request("a", "wait"), Request("b", "go")])
        assert next(replies)[0] == 1
        replies.close()  # and the other is no longer waited for
        assert time.monotonic() - started < 60


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pace.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def turns(self, keeper: pace.Pace, expected: int, used: int, count: int = 4) -> list[float]:
        """When each of some turns begins, one after another."""

        async def take() -> list[float]:
            begun = []
            for _ in range(count):
                await keeper.turn(expected)
                begun.append(round(self.now - 100, 6))
                keeper.correct(expected, used)
            return begun

        return asyncio.run(take())


def test_requests_and_tokens_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert clock.turns(pace.Pace(), 1000, 10) == [0, 0, 0, 0]
    assert clock.turns(pace.Pace(requests=60), 1000, 10) == [0, 1, 2, 3]
    clock.now = 100.0
    assert clock.turns(pace.Pace(tokens=60_000), 1000, 500) == [0, 0.5, 1, 1.5]  # by what was used
    clock.now = 100.0
    assert clock.turns(pace.Pace(tokens=60_000), 1000, 2000) == [0, 2, 4, 6]
    clock.now = 100.0
    assert clock.turns(pace.Pace(requests=60, tokens=60_000), 1000, 10) == [0, 1, 2, 3]


def test_a_pause_holds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    keeper = pace.Pace()
    keeper.hold(30)
    keeper.hold(5)
    assert clock.turns(keeper, 1, 1) == [30, 30, 30, 30]


def test_the_rate_reaches_the_endpoint(fake: FakeEndpoint) -> None:
    started = time.monotonic()
    ask(endpoint(fake, requests_per_minute=600), *map(str, range(4)))
    assert time.monotonic() - started >= 0.3


def test_structured_output_is_given_up_once_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(unknown=("response_format",)) as fake:
        teacher = endpoint(fake, concurrency=1)
        replies = ask(teacher, "a", "b", "c", schema={"type": "object"})
        assert ["response_format" in seen.body for seen in fake.seen] == [True, False, False, False]
    assert [reply.error for reply in replies] == ["", "", ""]
    assert capsys.readouterr().err.count("does not take 'response_format'") == 1


def test_fields_that_are_not_taken_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(unknown=("seed", "max_tokens", "stop", "presence_penalty")) as fake:
        decoding = Decoding(max_tokens=2, stop=("END",), presence_penalty=1.0)
        replies = ask(endpoint(fake), *map(str, range(6)), decoding=decoding)
        assert set(fake.seen[-1].body) == {"model", "messages", "temperature", "max_completion_tokens"}
    assert {(reply.finish, reply.error) for reply in replies} == {("length", "")}
    said = capsys.readouterr().err
    assert [said.count(f"does not take '{name}'") for name in ("seed", "max_tokens", "stop")] == [1, 1, 1]


# ---- what may be better the next time ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "500", "503", "die", "html", "half", "no choices", "list"])
def test_a_fault_is_tried_again(fault: str) -> None:
    [reply], fake = played(f"{fault} x2")
    assert reply.text == echo("Say something.")
    assert (reply.tries, reply.error, len(fake.seen)) == (3, "", 3)


def test_waits_grow() -> None:
    _, fake = played("500 x3", first_wait=0.1, longest_wait=10)
    times = [seen.at for seen in fake.seen]
    assert times[1] - times[0] > 0.05  # 0.1 s, half to one and a half of it
    assert times[2] - times[1] > 0.1
    assert times[3] - times[2] > 0.2


@pytest.mark.parametrize("fault", ["429", "503"])
def test_retry_after_is_honoured_by_all_requests(fault: str) -> None:
    with FakeEndpoint(faults=[f"{fault}=1"]) as fake:
        teacher = endpoint(fake, concurrency=1, first_wait=0.0)
        ask(teacher, "a", "b")
        times = [seen.at for seen in fake.seen]
    assert times[1] - times[0] >= 1


def test_retry_after_as_seconds_or_date() -> None:
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert 28 < (retry_after(soon) or 0) <= 30
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after(said) for said in ("2.5", "0", "-1", None, "", "soon")] == [2.5, 0, 0, None, None, None]


def test_a_pause_of_hours_ends_the_run() -> None:
    with pytest.raises(TeacherError, match=r"asks for a pause of 10\.0 hours\. Run the same command again after that"):
        played("429=36000")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", r"answers 429: Too many requests\.; 4 tries\. Ask less at once \(--concurrency, --rpm"),
        ("503=0", r"answers 503: Overloaded\.; 4 tries"),
        ("500", r"answers no request: answers 500: The server had an error\.; 4 tries"),
        ("die", r"cannot be reached \(.+\); 4 tries\. Is the URL right"),
        ("html", r"answers no request: answers what no client understands: <html>Please log in</html>; 4 tries"),
    ],
)
def test_a_fault_that_does_not_end_ends_the_run(fault: str, said: str) -> None:
    with FakeEndpoint(always={"": fault}) as fake, pytest.raises(TeacherError, match=said) as caught:
        ask(endpoint(fake), "Say something.")
    assert caught.value.where == fake.url


def test_too_slow_is_tried_twice_again() -> None:
    with FakeEndpoint(always={"": "slow=0.4"}) as fake:
        with pytest.raises(TeacherError, match=r"no answer within 0.1 s; 3 tries\. Give it more time \(--timeout\)"):
            ask(endpoint(fake, timeout=0.1), "Say something.")
        assert len(fake.seen) == 3


def test_an_answer_that_drips_for_ever_is_too_slow() -> None:
    with FakeEndpoint(faults=["drip=0.05"]) as fake:
        [reply] = ask(endpoint(fake, timeout=1.0), "Say something.")
    assert reply.tries >= 2
    assert reply.error == ""


def test_nobody_there_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        TeacherError, match=rf"{url}: cannot be reached \(.*refused.*\)\. Is the URL right, and the ser"
    ):
        ask(Endpoint(EndpointSettings(url, "m")), "x")
    with pytest.raises(TeacherError, match="cannot be reached"):
        Endpoint(EndpointSettings(url, "m")).models()


def test_a_server_that_comes_back_is_waited_for(fake: FakeEndpoint) -> None:
    teacher = endpoint(fake, retries=50)
    ask(teacher, "a")
    fake.stop()
    replies = teacher.complete([Request("b", "b")])
    fake.port = int(fake.url.rpartition(":")[2].partition("/")[0])
    again = FakeEndpoint(port=fake.port)
    threading.Timer(0.3, again.start).start()
    [(_, reply)] = list(replies)
    assert reply.tries > 1
    again.stop()
    fake.start()  # for the fixture


# ---- one request alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "finish", "said"),
    [
        ("400", "refused", "answers 400: I do not like this request."),
        ("filter", "refused", "answers 400: Blocked by our policy."),
        ("long", "refused", "answers 400: This model's maximum context length is 10 tokens."),
        ("filtered", "refused", "held back by the endpoint's content filter"),
        ("refusal", "refused", "I cannot help with that."),
        ("500", "failed", "answers 500: The server had an error.; 4 tries"),
        ("half", "failed", "answers what no client understands"),
    ],
)
def test_one_bad_request_does_not_end_the_others(fault: str, finish: str, said: str) -> None:
    with FakeEndpoint(always={"bad": fault}) as fake:
        good, bad = ask(endpoint(fake), "good", "bad")
    assert (good.text, good.error) == (echo("good"), "")
    assert (bad.text, bad.finish) == ("", finish)
    assert bad.error.startswith(said)


def test_what_refuses_every_request_ends_the_run() -> None:
    with FakeEndpoint(always={"": "400"}) as fake:
        with pytest.raises(TeacherError, match=r"answers no request: answers 400: I do not like this request\."):
            ask(endpoint(fake), "Say something.")
        assert fake.seen[-1].body["messages"] == [{"role": "user", "content": "Hi"}]


def test_no_tokens_counted_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(always={"": "no usage"}) as fake:
        replies = ask(endpoint(fake), "a", "b")
    assert [reply.prompt_tokens for reply in replies] == [0, 0]
    assert replies[0].text == echo("a")
    assert capsys.readouterr().err.count("does not count tokens") == 1


# ---- what ends a run at once ---------------------------------------------------------------------------------------


def test_no_key_is_told(fake: FakeEndpoint) -> None:
    fake.key = KEY
    with pytest.raises(
        TeacherError, match=r"asks for a key, and none was sent .* variable OPENAI_API_KEY, or .*--key-env"
    ):
        ask(endpoint(fake), "x")
    assert len(fake.seen) == 1


def test_a_wrong_key_is_told_without_it(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = KEY
    monkeypatch.setenv("MY_KEY", "sk-wrong-0987654321\n")
    for call in (lambda teacher: ask(teacher, "x"), Endpoint.models):
        with pytest.raises(TeacherError) as caught:
            call(endpoint(fake, key_env="MY_KEY"))
        assert "answers 401: Incorrect API key provided: ***" in str(caught.value)
        assert "MY_KEY" in str(caught.value)
        assert "sk-wrong" not in repr(caught.value)


def test_the_right_key_is_sent(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    teacher = endpoint(fake)
    assert ask(teacher, "x")[0].text == echo("x")
    assert KEY not in repr(teacher.settings)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\N{GREEK SMALL LETTER ALPHA}")
    with pytest.raises(UsageError, match="environment variable OPENAI_API_KEY: holds characters that no key has"):
        ask(teacher, "x")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.example.com/v1", True),
        ("http://api.example.com/v1", False),
        ("http://192.168.1.7:8000/v1", False),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000/v1", True),
    ],
)
def test_the_key_does_not_travel_unencrypted(
    url: str, sent: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert ("Authorization" in Endpoint(EndpointSettings(url, "m")).connection()["headers"]) == sent
    assert ("--key-over-http" in capsys.readouterr().err) != sent
    asked_for = Endpoint(EndpointSettings(url, "m", key_over_http=True))
    assert asked_for.connection()["headers"]["Authorization"] == f"Bearer {KEY}"


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(TeacherError, match=r"sends us on to http://127.0.0.1:9/v1/chat/completions"):
        played("moved")


def test_no_credit_ends_the_run_at_once() -> None:
    with pytest.raises(TeacherError, match=r"answers 429: You exceeded your quota\. Add credit there"):
        played("quota")


def test_an_unknown_model_is_told_with_the_known_ones(fake: FakeEndpoint) -> None:
    fake.models = ("writer-large", "writer-small")
    with pytest.raises(
        TeacherError, match=r"has no model 'writer-lrge'; did you mean 'writer-large'\? Known \(--name\): w"
    ):
        ask(endpoint(fake, model="writer-lrge"), "x")


def test_a_wrong_path_is_told(fake: FakeEndpoint) -> None:
    bare = fake.url.removesuffix("/v1")
    with pytest.raises(TeacherError, match=rf"answers 404: no route /chat/completions\. Is it {fake.url}\?"):
        ask(Endpoint(EndpointSettings(bare, "fake-1")), "x")
    with pytest.raises(TeacherError, match=rf"answers 404: no route /models\. Is it {fake.url}\?"):
        Endpoint(EndpointSettings(bare, "fake-1")).models()


@pytest.mark.parametrize("behind", ["", "/", "/chat/completions", "/completions/", " "])
def test_what_people_paste_behind_the_url_is_taken_off(fake: FakeEndpoint, behind: str) -> None:
    teacher = Endpoint(EndpointSettings(fake.url + behind, "fake-1"))
    assert teacher.settings.base == fake.url
    assert teacher.models() == ["fake-1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "ftp://there/v1"}, "--model: 'ftp://there/v1' is no URL of an endpoint"),
        ({"url": "http://"}, "is no URL of an endpoint"),
        ({"url": "http://me:secret@there/v1"}, "the URL of there holds a name or password"),
        ({"url": "http://there/v1?key=secret"}, r"the URL of there holds a query"),
        ({"concurrency": 0}, "--concurrency: 0 is not a whole number from 1 up"),
        ({"requests_per_minute": 0.0}, r"--rpm: 0\.0 is not a number above 0"),
        ({"tokens_per_minute": -1.0}, "--tpm: -1.0 is not"),
        ({"timeout": 0.0}, "--timeout: 0.0 is not"),
        ({"retries": -1}, "--retries: -1 is not"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        EndpointSettings(**{"url": "http://there/v1", "model": "m", **change})  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


# ---- a batch as a whole --------------------------------------------------------------------------------------------


def test_answers_before_the_end_stand() -> None:
    with FakeEndpoint(always={"bad": "quota"}, seconds=0.02) as fake:
        replies = endpoint(fake, concurrency=1).complete([Request(text, text) for text in ("a", "b", "bad", "c")])
        assert [next(replies)[0], next(replies)[0]] == [0, 1]
        with pytest.raises(TeacherError):
            next(replies)
        assert len(fake.seen) == 3  # nothing was asked after the end


def test_other_processes_can_make_the_same_endpoint(fake: FakeEndpoint) -> None:
    settings = pickle.loads(pickle.dumps(endpoint(fake).settings))
    assert ask(Endpoint(settings), "x")[0].text == echo("x")


def test_the_fake_endpoint_is_a_program_too() -> None:
    command = [sys.executable, "-m", "tests.synthesis.endpoint_server", "--faults", "500, good", "--key", KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        teacher = Endpoint(EndpointSettings(url, "fake-1", key_env="MY_KEY", first_wait=0.01))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MY_KEY", KEY)
            assert ask(teacher, "x")[0].tries == 2
        server.kill()


def test_half_a_character_can_be_asked() -> None:
    with FakeEndpoint(brain=lambda prompt: "yes \ud83e") as fake:
        assert ask(endpoint(fake), "x \ud83d")[0].text == "yes \ud83e"  # `Run` replaces it
        assert fake.seen[0].body["messages"][0]["content"] == "x \ud83d"
