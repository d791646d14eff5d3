"""The passport of an adapter: what it remembers of its birth, so that it is not put on another base by mistake.

It lies in the metadata of `adapter_model.safetensors` under the key `lilliput_passport`, as JSON, where PEFT and others
pass over it. An adapter without one (from PEFT) is taken on trust, with a note.
Not here: how a base is hashed (layers/identity.py).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from lilliput.errors import CheckpointError, WrongBaseError
from lilliput.files import sha256_text
from lilliput.layers import BaseIdentity, identity_of
from lilliput.lora.adapters import base_only

METADATA_KEY = "lilliput_passport"


@dataclass(frozen=True)
class Passport:
    """Hashes are hexadecimal SHA-256; None where the thing was not there or not known.

    Attributes:
        base_name: the MODEL the adapter was trained over.
        base_weights_sha256: its checkpoint's numbers, whatever the number format they were computed in.
        base_quantized_sha256: its quantized numbers; None when it was not quantized.
        format: the number format of the base while training.
        tokenizer_sha256: the tokenizer's rules and vocabulary.
        chat_template_sha256: the chat template's text.
        data_sha256: the training data.
        versions: package name -> version.
    """

    base_name: str
    base_weights_sha256: str
    base_quantized_sha256: str | None = None
    format: str = "none"
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    data_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The entry for a safetensors file's metadata."""
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, where: str) -> Passport | None:
        """Read it back; None when there is none. Raises CheckpointError when it is there but broken."""
        text = (metadata or {}).get(METADATA_KEY)
        if text is None:
            return None
        try:
            said = json.loads(text)
            return cls(**{entry.name: said[entry.name] for entry in fields(cls) if entry.name in said})
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"its passport is broken ({error})", where=where) from error


def make_passport(model: nn.Module, tokenizer: Any = None, data_sha256: str | None = None) -> Passport:
    """Write the passport of an adapter on `model`: its base's identity (the adapters aside), tokenizer, data, versions.

    Reads the base's checkpoint once to hash it, unless that was done before.
    """
    with base_only(model):
        identity = identity_of(model)
    template = getattr(tokenizer, "chat_template", None)
    return Passport(
        base_name=identity.name,
        base_weights_sha256=identity.weights_sha256,
        base_quantized_sha256=identity.quantized_sha256,
        format=identity.format,
        tokenizer_sha256=None if tokenizer is None else hash_tokenizer(tokenizer),
        chat_template_sha256=None if template is None else _hash_template(template),
        data_sha256=data_sha256,
        versions=_versions(),
    )


def check_base(passport: Passport, model: nn.Module, where: str) -> str | None:
    """Compare an adapter's passport with the base of `model`.

    Returns None when base and format agree, or a note when the same base is in another number format.
    Raises WrongBaseError, with both names and hashes, when it is another base.
    """
    with base_only(model):
        base = identity_of(model)
    if base.weights_sha256 != passport.base_weights_sha256:
        raise WrongBaseError(
            f"this adapter was trained over '{passport.base_name}' ({_short(passport.base_weights_sha256)}), "
            f"the model is '{base.name}' ({_short(base.weights_sha256)}). "
            f"SHA-256 of the weights: {passport.base_weights_sha256} and {base.weights_sha256}",
            where=where,
            todo="Load it over its own base, or allow another one if you are sure (allow_other_base).",
        )
    if (base.format, base.quantized_sha256) == (passport.format, passport.base_quantized_sha256):
        return None
    return f"the adapter was trained over {_numbers(passport.format)}, the model holds {_numbers_of(base, passport)}"


def tokenizer_notes(passport: Passport, tokenizer: Any) -> list[str]:
    """What differs between the tokenizer the adapter was trained with and this one; empty when nothing is known to."""
    notes = []
    if passport.tokenizer_sha256 not in (None, hash_tokenizer(tokenizer)):
        notes.append("the adapter was trained with another tokenizer")
    template = getattr(tokenizer, "chat_template", None)
    if passport.chat_template_sha256 not in (None, None if template is None else _hash_template(template)):
        notes.append("the adapter was trained with another chat template")
    return notes


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what maps text to ids: rules and vocabulary, without the padding and truncation of the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    passing = ("padding", "truncation")
    return sha256_text(json.dumps({k: v for k, v in rules.items() if k not in passing}, sort_keys=True))


def _hash_template(template: Any) -> str:
    """A template is a text, or several by name."""
    return sha256_text(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def _short(sha256: str) -> str:
    return sha256[:12]


def _numbers(format: str) -> str:
    return "the checkpoint's own numbers" if format == "none" else format


def _numbers_of(base: BaseIdentity, passport: Passport) -> str:
    same = base.format == passport.format
    return f"{_numbers(base.format)} with other constants (double quantization)" if same else _numbers(base.format)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lilliput", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "not installed"
    return found
