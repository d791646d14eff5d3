"""`lilliput demo`: the whole road in minutes: a small model in 4 bits learns to turn messages into JSON records.

An adapter is trained on generated messages (QLoRA); then the base answers held-out ones, without it and with it.
The data: `lilliput.data.demo`. The training: `recipes/demo.yaml`, through the same `tune` as everybody's own rows.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lilliput.cli.base import size
from lilliput.cli.door import FORMATS, Answer, Stopped, choose
from lilliput.progress import say

if TYPE_CHECKING:
    from lilliput.data.demo import DemoRow
    from lilliput.evaluation import ExactResult
    from lilliput.training import RunResult

MODEL = "smollm2-135m-instruct"
TRAIN_ROWS = 540
LONGEST_ANSWER = 48  # tokens; no right answer has more than 33, and base and tuned model get the same
BATCH = 50  # held-out rows answered at once
ANSWERS, REPORT = "heldout.jsonl", "report.json"  # what the demo adds to the run's folder


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run's folder.")] = Path("runs/demo"),
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out messages to answer.")] = 100,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the generated rows and of the training.")] = 0,
    number_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Number format of the base: nf4, fp4, int8 or none.")
    ] = "nf4",
) -> Answer:
    """Fine-tune SmolLM2-135M on built-in data and compare it with its base: at most ten minutes on two cores.

    Example:  lilliput demo -o runs/demo
    """
    began = time.perf_counter()
    choose(number_format.partition("-")[0], FORMATS, "--format")
    from lilliput.data.demo import demo_rows
    from lilliput.files import write_json

    run = _train(out, seed, number_format)
    trained = time.perf_counter()
    heldout = demo_rows("heldout", rows, seed)
    base, tuned, footprint = _compare(heldout, run.adapter, number_format)
    ended = time.perf_counter()
    results = {
        "rows": rows,
        "base_exact": base.exact,
        "tuned_exact": tuned.exact,
        "base_footprint_bytes": footprint,
        "format": number_format,
        "train_tokens_per_second": round(run.train_tokens_per_second, 1),
        "seconds": round(ended - began, 1),
        "adapter": str(run.adapter),
        "train_rows": run.examples,
        "train_tokens": run.tokens,
        "train_seconds": round(run.seconds, 1),
        "tune_seconds": round(trained - began, 1),
        "answer_seconds": round(ended - trained, 1),
    }
    _write_jsonl(out / ANSWERS, _answers(heldout, base, tuned))
    write_json(out / REPORT, results)
    return Answer(results, Group(_first_three(heldout, base, tuned), "", _table(results, out)))


def _train(out: Path, seed: int, number_format: str) -> RunResult:
    """What `lilliput tune` would do with the generated rows and the recipe `demo`."""
    from lilliput.data.demo import demo_rows
    from lilliput.training import load_recipe, tune
    from lilliput.training.resume import Interrupted

    data = out.with_name(f"{out.name}-train.jsonl")  # beside the run's folder, which `tune` wants for itself
    _write_jsonl(data, [row.as_messages() for row in demo_rows("train", TRAIN_ROWS, seed)])
    _forget_last_answers(out)
    recipe = load_recipe("demo", [f"train.seed={seed}", f"model.format={number_format}"])
    say(f"1/3 {MODEL} in {_numbers(number_format)} learns from {TRAIN_ROWS} messages ({data})")
    try:
        return tune(MODEL, data, out, recipe, overwrite=True)
    except (Interrupted, KeyboardInterrupt) as error:
        again = shlex.join(["lilliput", "tune", MODEL, "--data", str(data), "--recipe", str(out / "recipe.yaml")])
        todo = (
            f"Run the demo again to begin anew, or train to the end with `{again} -o {shlex.quote(str(out))} --resume`"
        )
        raise Stopped("stopped (Ctrl-C)", where=str(out), todo=todo) from error


def _forget_last_answers(out: Path) -> None:
    """Remove what an earlier demo added to a run's folder; a folder that is no run is left alone: `tune` refuses it."""
    from lilliput.training.resume import RUN_FILE

    if (out / RUN_FILE).is_file():
        for name in (ANSWERS, REPORT):
            (out / name).unlink(missing_ok=True)


def _compare(heldout: Sequence[DemoRow], adapter: Path, number_format: str) -> tuple[ExactResult, ExactResult, int]:
    """Answers of the base, of the same base with the adapter on it, and the base's bytes."""
    from lilliput.data import Record, to_chat
    from lilliput.evaluation import exact_match
    from lilliput.lora import load_adapter
    from lilliput.models import load_model, load_tokenizer

    chats = [to_chat(Record(row.as_messages(), f"held-out row {place}")) for place, row in enumerate(heldout, start=1)]
    model = load_model(MODEL, format=number_format)  # double quantization is the default
    tokenizer = load_tokenizer(MODEL)
    footprint = model.get_memory_footprint()
    say(f"2/3 the base answers {len(chats)} held-out messages")
    base = exact_match(model, tokenizer, chats, max_new_tokens=LONGEST_ANSWER, batch_size=BATCH)
    load_adapter(model, adapter)
    say("3/3 the same base answers them with the adapter")
    tuned = exact_match(model, tokenizer, chats, max_new_tokens=LONGEST_ANSWER, batch_size=BATCH)
    return base, tuned, footprint


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from lilliput.files import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answers(heldout: Sequence[DemoRow], base: ExactResult, tuned: ExactResult) -> list[dict[str, Any]]:
    """One object a held-out row: the message, the right answer, what the two said, whether the tuned one is exact."""
    from lilliput.evaluation import same_answer

    lines = []
    for row, before, after in zip(heldout, base.answers, tuned.answers, strict=True):
        exact = same_answer(after, row.answer)
        lines.append({"message": row.message, "right": row.answer, "base": before, "tuned": after, "exact": exact})
    return lines


def _numbers(number_format: str) -> str:
    return "float32" if number_format == "none" else f"{number_format}, double quantization"


def _first_three(heldout: Sequence[DemoRow], base: ExactResult, tuned: ExactResult) -> Table:
    """The first three held-out rows, whatever became of them."""
    table = Table(title="The first three held-out messages", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row, before, after in zip(heldout[:3], base.answers, tuned.answers, strict=False):
        for name, text in (("message", row.message), ("base", before), ("tuned", after), ("right", row.answer)):
            table.add_row(name, Text(" ".join(text.split())), end_section=name == "right")
    return table


def _table(results: dict[str, Any], out: Path) -> Table:
    """Base against tuned, and what it took."""
    rows = results["rows"]
    table = Table(title=f"Base against tuned: {rows} held-out messages", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("base", "tuned"):
        exact = results[f"{name}_exact"]
        table.add_row(f"{name}, exact answers", f"[bold]{exact}[/bold] of {rows} ({exact / rows:.0%})")
    memory = size(results["base_footprint_bytes"])
    table.add_row("memory of the base", f"{memory} ({_numbers(results['format'])})")
    speed = f"{results['train_tokens_per_second']:,.0f} tokens/s"
    table.add_row("training", f"{results['train_tokens']:,} tokens of {results['train_rows']} messages, {speed}")
    spent = f"training and its checks {results['tune_seconds']:.0f}, answering {results['answer_seconds']:.0f}"
    table.add_row("time", f"{results['seconds']:.0f} s ({spent})")
    table.add_row("adapter", Text(results["adapter"]))
    table.add_row("all answers", Text(str(out / ANSWERS)))
    return table
