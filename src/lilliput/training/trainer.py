"""transformers' Trainer with our rows, our loss and our journal, through its public hooks only.

The loss of a step is (sum of cross entropies at its labelled tokens) / (number of its labelled tokens), counted over
all batches that the step accumulates: 1 x 8 rows and 8 x 1 rows are the same step. Logits exist at labelled positions
only, a chunk at a time (kernels/linear_loss.py). The Trainer sees a plain module that returns this loss, so it saves
and counts nothing of the base.

Not here: checkpoints on disk and Ctrl-C (resume.py), reading a recipe (recipe.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lilliput.data import Pack, collate
from lilliput.data.packing import NO_LABEL
from lilliput.errors import LilliputError, UsageError
from lilliput.files import write_safetensors
from lilliput.kernels.linear_loss import linear_loss
from lilliput.layers import QuantizedWeight
from lilliput.progress import warn
from lilliput.training.attention import (
    additive,
    block_by_block,
    blocks_of,
    longest_block,
    takes_packed_rows,
    unread_mask,
    works_in_blocks,
)
from lilliput.training.recipe import TrainSection

if TYPE_CHECKING:
    from lilliput.training.prefix import Prefix

Batch: TypeAlias = dict[str, Tensor]
Collate: TypeAlias = Callable[[Sequence[Pack], int], Batch]
MakeOptimizer: TypeAlias = Callable[[nn.Module, Sequence[str]], Optimizer | None]

_SAMPLE = Pack([0] * 7, [False] * 7, [0, 1, 2, 0, 1, 2, 3], [0, 0, 0, 1, 1, 1, 1])  # two sequences in a row
_POOL = 64  # steps whose rows are sorted by length together: little padding, and still a new mixture each epoch


class Loss(nn.Module):
    """What the Trainer of a run sees in place of the model: a module that returns {"loss": …} for a batch."""

    accepts_loss_kwargs = True  # asks the Trainer to count the labels of the whole accumulated batch
    _keys_to_ignore_on_save = None  # the Trainer looks for it after loading

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class LabelLoss(Loss):
    """A causal language model that returns the loss of a batch at its labelled positions.

    Args:
        model: the language model, adapters attached.
        direct: whether head(hidden) are its logits, as `head_is_plain` finds out; else the model's own logits are
            taken, at the positions that are labelled in any row of the batch.

    Attributes:
        packs: whether rows may hold several examples.
        prefix: set while the frozen lower layers are reused (prefix.py).
    """

    def __init__(self, model: PreTrainedModel, *, direct: bool | None = None) -> None:
        super().__init__(model)
        self.direct = head_is_plain(model) if direct is None else direct
        self.packs = can_pack(model)
        sample = collate([_SAMPLE], 0)
        self.in_blocks = self.packs and works_in_blocks(model, sample["attention_mask"], sample["position_ids"])
        self.prefix: Prefix | None = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        tokens: Tensor | None = None,
        packs: Sequence[Pack] | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            input_ids: int64 [rows, tokens].
            labels: int64 [rows, tokens], labels[:, t] is the token at t itself where it is a label, else -100.
            attention_mask: bool [rows, 1, tokens, tokens], True where a token may look; None: at all before it.
            position_ids: int64 [rows, tokens]; None: counted from 0 in each row.
            num_items_in_batch: what the sum of cross entropies is divided by; None: the labels of this batch.
            tokens: how many tokens are no padding; not needed here.
            packs: the rows themselves, by which the frozen prefix knows them; None: all layers run.

        Returns: {"loss": scalar}.
        Raises UsageError for packed rows where the model cannot keep them apart.
        """
        if attention_mask is not None and not self.packs:
            refuse_packing(self.model)
        wanted = labels[:, 1:]  # the token at t is predicted from t - 1
        with (
            self.called(input_ids, attention_mask, position_ids) as plain,
            self.prefix.reused(plain, packs) if self.prefix and packs else nullcontext(plain) as inputs,
        ):
            total = self._direct(inputs, wanted) if self.direct else self._own_logits(inputs, wanted)
        count = wanted.ne(NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    @contextmanager
    def called(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Iterator[dict[str, Any]]:
        """What the model is to be called with for a batch; inside the block its attention is the one for it.

        The arguments are those of `forward`.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if blocks := self._blocks(position_ids):
            with block_by_block(self.model):
                yield {**inputs, "attention_mask": unread_mask(input_ids.device), "blocks": blocks}
        else:
            yield {**inputs, "attention_mask": None if attention_mask is None else additive(attention_mask, self.model)}

    def _blocks(self, position_ids: Tensor | None) -> list[list[int]] | None:
        """The sequences of a packed batch, where attention can take them one by one."""
        if position_ids is None or not self.in_blocks or self.recomputes():
            return None  # recomputing, backward would see another attention
        blocks, limit = blocks_of(position_ids), longest_block(self.model)
        return None if limit and max(map(max, blocks)) > limit else blocks

    def recomputes(self) -> bool:
        """Whether layers run once more in backward (gradient checkpointing)."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def _direct(self, inputs: dict[str, Any], wanted: Tensor) -> Tensor:
        hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1]
        flat = wanted.reshape(-1)
        rows = flat.ne(NO_LABEL).nonzero().squeeze(1)
        head = self.model.get_output_embeddings()
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
        return linear_loss(picked, head.weight, flat[rows], getattr(head, "bias", None))

    def _own_logits(self, inputs: dict[str, Any], wanted: Tensor) -> Tensor:
        places = wanted.ne(NO_LABEL).any(0).nonzero().squeeze(1)
        logits = self.model(**inputs, logits_to_keep=places).logits
        picked = wanted[:, places]
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), picked.flatten(), ignore_index=NO_LABEL, reduction="sum"
        )


def can_pack(model: PreTrainedModel) -> bool:
    """Whether each example of a packed row is to this model as if it were alone; tried on a few tokens."""
    sample = collate([_SAMPLE], 0)
    return takes_packed_rows(model, sample["attention_mask"], sample["position_ids"])


class ClassLoss(Loss):
    """A classifier that returns the loss of a batch of rows, and its logits."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            input_ids, attention_mask: int64 [rows, tokens].
            labels: int64 [rows], numbers of the classes.
            num_items_in_batch: what the sum of cross entropies is divided by; None: the rows of this batch.
            tokens: how many tokens are no padding; not needed here.

        Returns: {"loss": scalar, "logits": float32 [rows, classes]}.
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        total = functional.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (len(labels) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


def refuse_packing(model: PreTrainedModel) -> NoReturn:
    """Raise the UsageError for a model that cannot have packed rows."""
    raise UsageError(
        f"{type(model).__name__} cannot keep the examples of a packed row apart (it takes no mask but padding)",
        where="data.packing",
        todo="Set data.packing=false: a row then holds one example, which costs padding and no exactness.",
    )


@torch.no_grad()
def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embeddings applied to its last hidden state.

    Tried on a few tokens, since families differ: some scale, cap or project their logits, and an adapter may sit on the
    head. Says once when it is not so, since training then costs more memory.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and model.base_model is not model:
        training = model.training
        model.eval()
        ids = torch.arange(8, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        own = model(input_ids=ids, use_cache=False).logits.float()
        ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        model.train(training)
        if own.shape == ours.shape and (own - ours).abs().max() <= 1e-4 * own.abs().max():
            return True
    why = (
        "computes its logits in int8" if isinstance(head, QuantizedWeight) else "does more to its logits than its head"
    )
    warn(
        f"{type(model).__name__} {why}, so they are taken from the model itself: "
        "exact, but all labelled positions of a batch are held at once"
    )
    return False


class Rows(Dataset):
    """Packs, or other things with a length, in the order of an epoch: a function of the seed and the epoch alone.

    Rows of similar length come into the same step, longest last, and steps are shuffled. The order does not depend on
    how a step is divided into batches.
    """

    def __init__(self, packs: Sequence[Sized], *, step_rows: int, seed: int) -> None:
        self.packs, self.step_rows, self.seed = packs, step_rows, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's loader when an epoch begins."""
        rng = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.packs)))
        rng.shuffle(order)
        rest = len(order) % self.step_rows  # the odd rows come last, as the smaller step that they are
        whole, last = order[: len(order) - rest], order[len(order) - rest :]
        pool = self.step_rows * _POOL
        steps = []
        for start in range(0, len(whole), pool):
            rows = sorted(whole[start : start + pool], key=self._length)
            steps += [rows[at : at + self.step_rows] for at in range(0, len(rows), self.step_rows)]
        rng.shuffle(steps)
        self.order = [row for step in steps for row in step] + sorted(last, key=self._length)

    def _length(self, row: int) -> int:
        return len(self.packs[row])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Sized:
        return self.packs[self.order[index]]


def batch_of(packs: Sequence[Pack], pad_token_id: int, collate: Collate = collate) -> Batch:
    """What `LabelLoss` takes, on the CPU: the rows as `data.collate` makes them, and how many tokens are no padding.

    Rows of one example each need no mask: padding stands at the right, where no token looks. Plain causal attention is
    what models do without one, and it reads half as much.
    """
    batch = collate(packs, pad_token_id)
    if all(pack.sequence_ids[-1] == 0 for pack in packs):
        del batch["attention_mask"], batch["position_ids"]
    return {**batch, "tokens": torch.tensor(sum(len(pack) for pack in packs))}


class RunTrainer(Trainer):
    """The Trainer of a run, whatever is learned: counts tokens, ends on a loss that is no number, saves what it trains.

    A batch says under `tokens` how many are no padding.

    Args:
        model, args, kwargs: as the Trainer's.
        make: the optimizer, from what is trained and the names of what decays; None, or a None from it: the Trainer's.
    """

    def __init__(
        self, model: Loss, args: TrainingArguments, *, make: MakeOptimizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.loss, self.make = model, make
        self.step_tokens = 0  # since the journal took them last

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The recipe's optimizer, or the Trainer's own."""
        if self.optimizer is None and self.make is not None:
            self.optimizer = self.make(self.loss, self.get_decay_parameter_names(self.loss))
        return super().create_optimizer(model)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As the Trainer's, but tokens are counted, and a loss that is no number ends the run before it does harm."""
        self.step_tokens += int(inputs["tokens"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise LilliputError(
                f"the loss is {loss.item()}",
                where=f"training step {self.state.global_step + 1}",
                todo="Lower train.learning_rate or train.max_grad_norm; the last checkpoint is untouched.",
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, under this module's own names, and nothing of the base."""
        trained = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        write_safetensors(f"{output_dir or self.args.output_dir}/model.safetensors", trained)

    def say_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log an evaluation's numbers and tell the callbacks, as the Trainer's own `evaluate` ends."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class LabelTrainer(RunTrainer):
    """The Trainer of a language model's run. `model` is a LabelLoss; datasets hold Packs."""

    loss: LabelLoss

    def __init__(self, model: LabelLoss, args: TrainingArguments, *, pad_token_id: int, **kwargs: Any) -> None:
        super().__init__(
            model, args, data_collator=lambda packs: {**batch_of(packs, pad_token_id), "packs": packs}, **kwargs
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean cross entropy over all labelled tokens held out (the Trainer's own weighs batches equally)."""
        self.loss.eval()
        total, labels = 0.0, 0
        for batch in self.get_eval_dataloader(eval_dataset):
            total += self.loss(**batch, num_items_in_batch=1)["loss"].item()
            labels += int(batch["labels"][:, 1:].ne(NO_LABEL).sum())
        return self.say_metrics({f"{metric_key_prefix}_loss": total / max(labels, 1)})


def count_steps(rows: int, train: TrainSection) -> int:
    """Optimizer steps of a run over so many rows."""
    an_epoch = math.ceil(math.ceil(rows / train.batch_size) / train.accumulation)
    return train.max_steps or math.ceil(train.epochs * an_epoch)


def eval_interval(steps: int, train: TrainSection) -> int:
    """Steps between evaluations: what the recipe says, or ten evaluations in a run."""
    return train.eval_every or max(1, math.ceil(steps / 10))


def make_arguments(
    train: TrainSection, output_dir: str, steps: int, *, evaluate: bool, resumed: bool
) -> TrainingArguments:
    """The Trainer's arguments for a recipe: quiet, nothing sent anywhere, the base's own number type."""
    watched: dict[str, Any] = {}
    if evaluate:
        watched = {
            "eval_strategy": "steps",
            "eval_steps": eval_interval(steps, train),
            "eval_on_start": not resumed,
            "per_device_eval_batch_size": train.batch_size,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup,
        optim="adamw_torch_fused",  # where the recipe's section `optim` names no other (optimizer.py)
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        data_seed=train.seed,
        save_strategy="steps",
        save_steps=train.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",  # Rows shuffles
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        **watched,
    )


def pad_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """A token to fill rows with. Any will do: padding is no label, and no other token sees it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    vocabulary = len(embeddings.weight)  # type: ignore[arg-type]
    return next(token for token in known if token is not None and token < vocabulary)
