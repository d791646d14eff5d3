"""A classifier's run on tiny encoders: it learns, its folder is whole, it resumes bit for bit, PEFT agrees with it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lilliput.data import ClassExample, collate_labelled, encode_labelled, read_labelled
from lilliput.errors import CheckFailed, DataError, UsageError
from lilliput.evaluation import predict, score_classes
from lilliput.lora import load_adapter, read_passport
from lilliput.models import Classifier, load_model, load_tokenizer
from lilliput.models.heads import class_logits
from lilliput.training import Interrupted, Recipe, check_data, load_recipe, tune
from lilliput.training.classify import ClassTrainer
from lilliput.training.report import ClassifyResult, read_journal
from lilliput.training.resume import Checkpoints
from lilliput.training.trainer import ClassLoss
from tests.classifiers import opinions, save_encoder, write_tsv

QUICK = (
    "lora.r=4",
    "data.max_length=32",
    "train.epochs=3",
    "train.batch_size=4",
    "train.accumulation=2",
    "train.learning_rate=1e-2",
    "train.save_every=2",
    "train.eval_every=4",
)
NF4 = ("model.format=nf4", "train.epochs=4")
LABELS = ("neg", "pos")
TEXTS = ["film superb good superb the cast", "film awful bad bad"]
TARGETS = {"gpt2": "lora.target_modules=[c_attn]"}


def quick(*settings: str) -> Recipe:
    """The quick recipe with changes."""
    return load_recipe("classify", [*QUICK, *settings])


def run(model: Path, folder: Path, *settings: str, rows: int = 60, **options: Any) -> ClassifyResult:
    """A run in folder/run on rows that are written into the folder."""
    data = write_tsv(folder / "rows.tsv", opinions(rows, LABELS))
    result = tune(str(model), data, folder / "run", quick(*settings), progress=False, **options)
    assert isinstance(result, ClassifyResult)
    return result


@pytest.fixture(scope="module")
def finished(tiny_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassifyResult, Path]:
    """(result, folder) of a run over an NF4 base, with its checks."""
    folder = tmp_path_factory.mktemp("classified")
    return run(tiny_encoder_dir, folder, *NF4, rows=160), folder / "run"


def test_it_learns(finished: tuple[ClassifyResult, Path]) -> None:
    result, _ = finished
    assert result.confusion is not None
    assert result.confusion.accuracy > 0.9 > 0.7 > result.confusion.majority
    assert result.eval_loss < 0.5 * result.eval_loss_before
    assert result.examples + result.eval_examples == 160
    said = json.loads(json.dumps(result.to_json()))
    assert said["train_counts"] == {name: result.train_counts[name] for name in LABELS}
    assert said["classes"]["pos"].keys() == {"rows", "predicted", "right"}
    assert {"accuracy", "majority_accuracy", "macro_f1", "confusion"} <= said.keys()


def test_the_folder_holds_what_is_promised(finished: tuple[ClassifyResult, Path]) -> None:
    result, out = finished
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml", "report.md", "run.json", "versions.json",
    }  # fmt: skip
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "classifier.json",
    }  # fmt: skip
    assert load_recipe(out / "recipe.yaml").settings() == quick(*NF4).settings()
    report = (out / "report.md").read_text()
    for said in ("held-out accuracy", "padded rows = rows alone: passed", "| true \\ predicted | neg | pos |",
                 "lilliput eval classify", "labels=['neg', 'pos']", "rows.tsv has no header"):  # fmt: skip
        assert said in report, said
    lines = read_journal(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(result.steps + 1))
    assert {line["step"] for line in lines if "eval_accuracy" in line} == {
        line["step"] for line in lines if "eval_loss" in line
    }


def test_the_adapter_holds_the_head_and_knows_its_base_and_its_labels(finished: tuple[ClassifyResult, Path]) -> None:
    _, out = finished
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "classifier" in config["modules_to_save"]
    assert sorted(config["target_modules"]) == ["key", "query", "value"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.weight"].shape == (2, 64)
    assert Classifier.read(out) == Classifier(list(LABELS), 32, 0)
    passport = read_passport(out)
    assert passport is not None
    assert passport.format == "nf4"


def test_loaded_again_it_scores_the_same(finished: tuple[ClassifyResult, Path], tiny_encoder_dir: Path) -> None:
    """The rows held out were predicted by the model in memory; the adapter from disk gives the same table and loss."""
    result, out = finished
    known, tokenizer = Classifier.read(out), load_tokenizer(tiny_encoder_dir)
    rows = encode_labelled(
        read_labelled(out.parent / "rows.tsv"), tokenizer, known.labels, max_length=known.max_length, progress=False
    )
    from lilliput.training.loop import split

    _, held_out = split(rows.examples, 0.1, 1000, 0)
    rows.examples[:] = held_out
    model = load_model(tiny_encoder_dir, format="nf4", labels=known.labels, progress=False)
    load_adapter(model, out)
    score = score_classes(model, rows, known.pad_token_id, progress=False)
    assert score.confusion == result.confusion
    assert score.loss == pytest.approx(result.eval_loss, rel=1e-5)
    words = predict(model, tokenizer, TEXTS, known)
    assert [found.label for found in words] == ["pos", "neg"]
    assert sum(words[0].probabilities.values()) == pytest.approx(1)
    with pytest.raises(DataError, match="text 2: is empty"):
        predict(model, tokenizer, ["good", " "], known)


@pytest.mark.parametrize("kind", ["bert", "bert without pooler", "roberta", "gpt2"])
def test_peft_loads_it_and_gives_equal_logits(kind: str, tmp_path: Path) -> None:
    """Also where more than the head was new (a pooler), and where the head has another name (score)."""
    base = save_encoder(tmp_path / "base", kind)
    settings = [TARGETS[kind]] if kind in TARGETS else []
    run(base, tmp_path, *settings, "train.max_steps=6", check=True)
    known, tokenizer = Classifier.read(tmp_path / "run"), load_tokenizer(base)
    ours = load_model(base, labels=known.labels, progress=False)
    ours.config.pad_token_id = known.pad_token_id
    load_adapter(ours, tmp_path / "run")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=known.pad_token_id)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    batch = collate_labelled([ClassExample(tokenizer(text).input_ids, 0) for text in TEXTS], known.pad_token_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        without = plain.disable_adapter if hasattr(plain, "disable_adapter") else theirs.disable_adapter
        with without():
            untuned = plain(**inputs).logits
    assert torch.allclose(class_logits(ours, batch), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(untuned, expected, atol=1e-2)


def test_the_loss_is_the_mean_cross_entropy_in_float64(tiny_encoder_dir: Path) -> None:
    model = load_model(tiny_encoder_dir, labels=["a", "b", "c"], dtype=torch.float64, progress=False)
    examples = [ClassExample([2, 6, 17, 3], 2), ClassExample([2, 21, 3], 0)]
    batch = collate_labelled(examples, 0)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([e.input_ids])).logits[0].double() for e in examples]
        found = ClassLoss(model)(**batch)["loss"].item()
        half = ClassLoss(model)(**batch, num_items_in_batch=4)["loss"].item()
    expected = -sum((row - row.exp().sum().log())[e.label].item() for row, e in zip(alone, examples, strict=True)) / 2
    assert found == pytest.approx(expected, rel=1e-6)
    assert half == pytest.approx(expected / 2, rel=1e-6)


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Ctrl-C while this batch is computed, counted from 1."""
    original, seen = ClassTrainer.training_step, [0]

    def step(self: ClassTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == batch:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(ClassTrainer, "training_step", step)


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_interrupted_and_resumed_is_bit_for_bit(
    format: str, tiny_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model's own dropout and the adapter's at work, within an epoch."""
    setting = f"model.format={format}"
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = run(tiny_encoder_dir, tmp_path / "whole", setting, check=False)
    with monkeypatch.context() as pressed:
        press_ctrl_c(pressed, 17)
        with pytest.raises(Interrupted, match=r"saved at step 9 of 21.*--resume"):
            run(tiny_encoder_dir, tmp_path / "broken", setting, check=False)
    resumed = run(tiny_encoder_dir, tmp_path / "broken", setting, check=False, resume=True)
    assert whole.confusion == resumed.confusion
    expected, got = (
        load_file(tmp_path / f / "run" / "adapter" / "adapter_model.safetensors") for f in ("whole", "broken")
    )
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    states = [
        torch.load(Checkpoints(tmp_path / f / "run" / "checkpoints").at(21) / "optimizer.pt", weights_only=True)
        for f in ("whole", "broken")
    ]
    for one, other in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_accumulation_is_the_same_run_but_for_rounding(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    """Without dropout, since a batch draws its numbers anew."""
    config = json.loads((tiny_encoder_dir / "config.json").read_text())
    base = save_encoder(tmp_path / "base")
    still = {**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(still))
    losses = []
    for name, batch, accumulation in (("one", 8, 1), ("eight", 1, 8)):
        (tmp_path / name).mkdir()
        settings = (f"train.batch_size={batch}", f"train.accumulation={accumulation}", "lora.lora_dropout=0")
        run(base, tmp_path / name, *settings, "train.max_steps=5", "train.learning_rate=1e-3", check=False)
        losses.append(
            [line["loss"] for line in read_journal(tmp_path / name / "run" / "metrics.jsonl") if "loss" in line]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 5


def test_evaluation_rows_of_their_own_and_long_rows_are_counted(
    tiny_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tsv(tmp_path / "rows.tsv", opinions(20))
    other = write_tsv(tmp_path / "dev.tsv", [*opinions(5), ("good " * 90, "1")])
    recipe = quick("train.max_steps=2")
    result = tune(str(tiny_encoder_dir), data, tmp_path / "run", recipe, check=False, eval_data=other)
    assert isinstance(result, ClassifyResult)
    assert (result.examples, result.eval_examples, result.overlong_rows) == (20, 6, 1)
    assert "1 rows have more than 32 tokens (data.max_length): truncated" in capsys.readouterr().err
    assert result.train_counts == {"0": 10, "1": 10}


def test_without_held_out_rows_there_is_no_accuracy(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    result = run(tiny_encoder_dir, tmp_path, "train.max_steps=2", rows=10, check=False)
    assert result.confusion is None
    assert result.to_json()["accuracy"] is None
    assert "accuracy" not in (tmp_path / "run" / "report.md").read_text()


def test_a_classifier_with_these_labels_is_trained_on(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base, id2label=dict(enumerate(LABELS))).save_pretrained(base)
    head = load_file(base / "model.safetensors")["classifier.weight"]
    run(base, tmp_path, "train.max_steps=2", "train.learning_rate=1e-9", check=False)
    tuned = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.allclose(tuned, head, atol=1e-7)


# ---- checks ------------------------------------------------------------------------------------------------------


def test_check_data_keeps_every_promise_and_leaves_nothing_behind(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "rows.tsv", opinions(30))
    results = check_data(str(tiny_encoder_dir), data, quick("model.format=nf4"), progress=False)
    assert len(results) == 4
    assert all(result.passed for result in results), results


def test_a_model_that_sees_padding_is_caught(
    tiny_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmasked(rows: list[ClassExample], pad_token_id: int) -> dict[str, torch.Tensor]:
        batch = collate_labelled(rows, pad_token_id)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    monkeypatch.setattr("lilliput.training.class_checks.collate_labelled", unmasked)
    with pytest.raises(
        CheckFailed, match="'padded rows = rows alone' is broken.*'accumulation 1 x 8 = 8 x 1' is broken"
    ):
        run(tiny_encoder_dir, tmp_path)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_head_that_is_not_the_saved_one_is_caught(
    tiny_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lilliput.training import class_checks

    save = class_checks.save_adapter

    def other_head(model: torch.nn.Module, folder: str, name: str) -> None:
        copy = model.get_submodule(f"classifier.modules_to_save.{name}")
        copy.weight.data.add_(1)
        save(model, folder, name)
        copy.weight.data.sub_(1)

    monkeypatch.setattr(class_checks, "save_adapter", other_head)
    with pytest.raises(CheckFailed, match="'save, load, same logits' is broken"):
        run(tiny_encoder_dir, tmp_path)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_label_that_only_the_evaluation_has_is_refused(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "rows.tsv", opinions(20))
    other = write_tsv(tmp_path / "dev.tsv", [*opinions(5), ("so so", "2")])
    with pytest.raises(DataError, match=r"dev.tsv:6: the label '2' is none that was learned.*The classes are: 0, 1"):
        tune(str(tiny_encoder_dir), data, tmp_path / "run", quick(), progress=False, eval_data=other)


def test_one_class_only_is_refused(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "rows.tsv", [(text, "1") for text, _ in opinions(20)])
    with pytest.raises(DataError, match=r"rows.tsv: all rows have the label '1'"):
        tune(str(tiny_encoder_dir), data, tmp_path / "run", quick(), progress=False)


def test_bad_rows_are_refused_or_listed(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "rows.tsv", [*opinions(20), ("", "1"), ("good", "")])
    with pytest.raises(DataError, match=r"rows.tsv:21: 'text' is empty; 2 of 22 rows are bad"):
        tune(str(tiny_encoder_dir), data, tmp_path / "run", quick(), progress=False)
    skipping = quick("data.skip_bad_rows=true", "train.max_steps=2")
    result = tune(str(tiny_encoder_dir), data, tmp_path / "run", skipping, progress=False, check=False)
    assert result.skipped_rows == 2
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["origin"] for row in listed] == ["rows.tsv:21", "rows.tsv:22"]


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    """RoBERTa counts positions from behind the padding's index: 64 of its 65 can be used."""
    base = save_encoder(tmp_path / "base", "roberta")
    data = write_tsv(tmp_path / "rows.tsv", [*opinions(6), ("good " * 80, "1")])
    with pytest.raises(UsageError, match=r"rows.tsv:7: 82 tokens, and the model has 64 positions.*max_length=64"):
        tune(str(base), data, tmp_path / "run", quick("data.max_length=100"), progress=False)


def test_projections_of_another_family_are_named(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "gpt2")
    with pytest.raises(UsageError, match=r"target_modules=\['query', 'key', 'value'\] matches no module.*c_attn"):
        run(base, tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("classify", ["data.packing=true"], "data.packing does not go with data.task=classify"),
        ("classify", ["train.reuse_prefix=on"], "reuse_prefix=on does not go with data.task=classify"),
        ("qlora", ["data.text_column=review"], r"the rows are chats.*--task classify"),
        ("qlora", ["data.task=clasify"], "expected one of 'chat', 'classify'"),
        ("classify", ["train.early_stop=2", "data.eval_fraction=0"], "early_stop needs evaluations"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(name: str, settings: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe(name, settings)


def test_early_stop_without_held_out_rows_is_refused(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="early_stop needs held-out rows"):
        run(tiny_encoder_dir, tmp_path, "train.early_stop=1", rows=10)
