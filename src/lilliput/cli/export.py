"""`lilliput export`: a tuned model as files for other programs, with a certificate that it is still the tuned model.

    open      the adapter as it was trained: its base in the number format of its passport, the adapter beside it
    read      what that predicts on held-out text; only the last hidden states are kept
    merge     W + s B A, tensor by tensor, into a plain directory; then the model goes
    write     that directory in the wanted format, beside the place where it is to be
    certify   load what was written, from its files, and compare
    publish   rename it into its place; or refuse, and nothing was written

Not here: the formats (export_targets.py), truth and certificate (certificate.py).
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lilliput.cli.base import facts, size
from lilliput.cli.certificate import HeldOut, certify, compare, files_of, open_tuned, read_and_merge
from lilliput.cli.door import FORMATS, Adapter, AllowOtherBase, Answer, Model, choose, plain
from lilliput.cli.export_targets import CERTIFICATE, Plan, better_choices, options_of
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from lilliput.data import Example

_ONTO = ("trained", "original")


def export(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="Directory to write; for gguf the file, NAME.gguf.")
    ],
    to: Annotated[
        str, typer.Option("--format", metavar="NAME", help="hf, gguf, gptq, nf4 (Lilliput's own), bnb (bitsandbytes).")
    ],
    adapter: Adapter = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="NAME", help="gguf: q8_0 (default), q4_1, q4_0, f16, f32.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="hf: float32 (default: exact), bfloat16, float16.")
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", help="gptq: bits a weight, 4 (default), 3, 2 or 8.")] = None,
    group: Annotated[
        int | None, typer.Option(metavar="N", help="gptq: weights that share a scale (128); -1: a whole row.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gptq: text, or rows, like those that the model will read.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="gptq: segments of the text that are taken (128).")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="gptq: tokens of a segment (2048, or what the model can).")
    ] = None,
    adapter_only: Annotated[
        bool | None, typer.Option("--adapter-only", help="gguf: the adapter alone, for llama.cpp's --lora.")
    ] = None,
    onto: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="trained: merge into the base's numbers that the adapter was trained over; original: into the "
            "checkpoint's own.",
        ),
    ] = "trained",
    base_format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Number format that the adapter was trained over, where it has no passport."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to compare on; by default the rows that the run held out.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Or rows to compare on; of the run's own only those that it held out."),
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in a segment of the text.")] = 512,
    segments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Compare on N segments of the text, or rows of as many tokens.")
    ] = 16,
    max_kl: Annotated[
        float, typer.Option(metavar="X", help="Refuse an export whose mean KL divergence is larger, nats a token.")
    ] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that is there.")] = False,
    allow_other_base: AllowOtherBase = False,
) -> Answer:
    """Write a model, with its adapter merged, for other programs; and certify it against the adapter as trained.

    Example:  lilliput export smollm2-135m-instruct --adapter runs/mine --format gguf -o mine.gguf

    Example:  lilliput export MODEL --adapter DIR --format hf --dtype bfloat16 --text book.txt -o DIR
    """
    given = {
        "type": kind, "dtype": dtype, "bits": bits, "group": group, "calibration": calibration, "samples": samples,
        "length": length, "adapter_only": adapter_only,
    }  # fmt: skip
    plan = Plan(
        model=model, adapter=adapter, base_format=base_format, onto=choose(onto, _ONTO, "--onto"),
        allow_other_base=allow_other_base, format=to, options=options_of(to, given), out=out, max_kl=max_kl,
        overwrite=overwrite,
    )  # fmt: skip
    _check(plan)
    if text is not None and data is not None:
        raise UsageError("--text and --data exclude each other")
    if plan.options.get("adapter_only"):
        return _export_adapter(plan)
    held_out = HeldOut(text, data, context, segments)
    return _export(plan, held_out, held_out.read(plan))


# ---- what cannot be, before a model is looked for ----------------------------------------------------------------


def _check(plan: Plan) -> None:
    if plan.base_format is not None:
        choose(plan.base_format.partition("-")[0], FORMATS, "--base-format")
    if math.isnan(plan.max_kl) or plan.max_kl < 0:
        raise UsageError(f"{plan.max_kl} is not a number from 0 up", where="--max-kl")
    if plan.adapter is None:
        _check_without_adapter(plan)
    else:
        _check_adapter(plan.adapter)
    (_check_file if plan.target.is_file else _check_directory)(plan)


def _check_without_adapter(plan: Plan) -> None:
    wanting = {"--adapter-only": plan.options.get("adapter_only"), "--onto original": plan.onto == "original"}
    for option, given in {**wanting, "--base-format": plan.base_format}.items():
        if given:
            raise UsageError(f"{option} is about an adapter, and there is none", todo="Add --adapter DIR.")


def _check_adapter(adapter: str) -> None:
    from lilliput.lora import read_passport
    from lilliput.models.heads import CLASSIFIER_FILE

    read_passport(adapter)  # a wrong path is told at once
    if any((Path(adapter) / part / CLASSIFIER_FILE).is_file() for part in ("", "adapter")):
        todo = "Use it with `lilliput eval classify`."
        raise UsageError("is a classifier's; export takes models that continue a text", where=adapter, todo=todo)


def _check_file(plan: Plan) -> None:
    out, where = plan.out, str(plan.out)
    if out.suffix != ".gguf":
        raise UsageError("the name of a GGUF file ends in .gguf", where=where, todo=f"Give -o {out.name}.gguf.")
    if out.is_dir():
        raise UsageError("is a directory", where=where, todo="Give -o a file, NAME.gguf.")
    if out.exists() and not plan.overwrite:
        raise UsageError("is there already", where=where, todo="Choose another name, or add --overwrite.")


def _check_directory(plan: Plan) -> None:
    """Whether OUT is free, or an export of ours that may be replaced."""
    out, where = plan.out, str(plan.out)
    if out.exists() and not out.is_dir():
        raise UsageError("is a file", where=where, todo="Give -o a directory.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CERTIFICATE).is_file():
        raise UsageError("is not empty and holds no export of ours", where=where, todo="Choose another directory.")
    if not plan.overwrite:
        raise UsageError("holds an export", where=where, todo="Choose another directory, or add --overwrite.")


# ---- the story ---------------------------------------------------------------------------------------------------


def _export(plan: Plan, held_out: HeldOut, found: str | list[Example]) -> Answer:
    from lilliput.files import workplace

    started = time.perf_counter()
    with workplace(plan.out.resolve()) as work:
        merged, made = work / "merged", work / f"made{plan.out.suffix if plan.target.is_file else ''}"
        truth = read_and_merge(plan, held_out, found, merged)
        plan.target.write(plan, merged, made)
        said = certify(plan, truth, held_out, made)
        if not said["passed"]:
            said["merged_kl"] = compare(truth, merged).kl if merged.is_dir() else None
            return _refusal(plan, said)
        said["files"] = _publish(plan, made, said)
    seconds = round(time.perf_counter() - started, 2)
    return Answer({**said, "path": str(plan.out), "total_seconds": seconds}, _table(plan, said))


def _publish(plan: Plan, made: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Write the certificate, with the files' hashes, and give all their final names; returns the files."""
    from lilliput.files import put_directory, read_json, sha256_file, write_json

    root = made if made.is_dir() else made.parent
    names = {file: plan.out.name if made.is_file() else file.relative_to(root).as_posix() for file in files_of(made)}
    files = {name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file, name in names.items()}
    content = plain({**said, "files": files})
    if plan.target.is_file:
        _rename(made, plan.out)
        write_json(plan.certificate, content)
    else:
        before = read_json(plan.certificate).get("files", {}) if plan.certificate.is_file() else {}
        write_json(made / CERTIFICATE, content)
        put_directory(made, plan.out, replaced=(*before, CERTIFICATE))
    return files


def _rename(made: Path, out: Path) -> None:
    """Onto what was there before, through `files.replace`, which flushes it to disk."""
    from lilliput.files import replace

    with replace(out) as temporary:
        os.replace(made, temporary)


def _export_adapter(plan: Plan) -> Answer:
    """The adapter alone as GGUF: nothing is merged or rounded, so that there is nothing to certify."""
    from lilliput.models import save_lora_gguf

    save_lora_gguf(open_tuned(plan).model, plan.out)
    written = plan.out.stat().st_size
    results = {
        "model": plan.model, "adapter": plan.adapter, "format": "gguf", "adapter_only": True, "path": str(plan.out),
        "bytes": written,
    }  # fmt: skip
    said = {"written": f"{plan.out}, {size(written)}", "to use it": f"llama-cli -m BASE.gguf --lora {plan.out}"}
    return Answer(results, facts(f"The adapter {plan.adapter} alone", said))


# ---- for people --------------------------------------------------------------------------------------------------


def _refusal(plan: Plan, said: dict[str, Any]) -> Answer:
    """The verdict where the export is too far from the truth, with the better choices."""
    better = better_choices(plan, said["merged_kl"])
    fault = f"refused, nothing was written: the mean KL is {said['kl']:.2g}, above --max-kl {plan.max_kl:g}"
    results = {**said, "better": better, "path": None}
    return Answer(results, _table(plan, said), f"{fault}. Better: {'; '.join(better)}")


def _table(plan: Plan, said: dict[str, Any]) -> Table:
    base = "as its checkpoint is" if said["base_format"] == "none" else said["base_format"]
    beside = f", {plan.adapter} beside it" if plan.adapter else ""
    rows = {
        "KL divergence": f"{said['kl']:.2g} nats a token in the mean ({plan.max_kl:g} allowed), {said['kl_max']:.2g} "
        "the largest",
        "greedy token": f"the same at {said['same_greedy']:.2%} of {said['tokens']:,} tokens",
        "perplexity": f"{said['perplexity']:.4f}, as trained {said['reference_perplexity']:.4f} "
        f"(x {said['perplexity_ratio']:.5f})",
        "logits": f"{said['logit_difference']:.3g} the largest difference",
        "compared with": f"{plan.model} ({base}){beside}",
        "on": f"{said['text']['source']}, {said['passages']:,} passages",
    }
    if said.get("merged_kl") is not None:
        rows["merged, not rounded"] = f"{said['merged_kl']:.2g} nats a token in the mean"
    rows |= (
        {"written": f"{plan.out}, {size(said['bytes'])}", "certificate": str(plan.certificate)}
        if said["passed"]
        else {"refused": "nothing was written"}
    )
    return facts(f"{plan.name} as {plan.format}{_chosen(plan.options)}", rows)


def _chosen(options: dict[str, Any]) -> str:
    """The format's options as a title has them."""
    shown = [str(options[name]) for name in ("type", "dtype") if name in options]
    shown += [f"{options['bits']} bits, groups of {options['group']}"] if "bits" in options else []
    return f" ({', '.join(shown)})" if shown else ""
