"""A row becomes a batch: records, chats, examples, packs. A tokenizer is handed in; no model is known here."""

from lilliput.data.chats import Chat, Turn
from lilliput.data.confusion import Confusion
from lilliput.data.conversion import Converted, convert, detect
from lilliput.data.examples import Example, ExampleSet, end_of_turn_id, load_examples, make_example, prompt_ids
from lilliput.data.forms import FORMS, to_chat
from lilliput.data.labelled import (
    ClassExample,
    ClassSet,
    LabelledText,
    LabelledTexts,
    collate_labelled,
    encode_labelled,
    read_labelled,
)
from lilliput.data.packing import Pack, collate, pack
from lilliput.data.portrait import figures, show_example
from lilliput.data.reading import Choices
from lilliput.data.records import Record, Records, SkippedRow, read_records, stream_records

__all__ = [
    "FORMS",
    "Chat",
    "Choices",
    "ClassExample",
    "ClassSet",
    "Confusion",
    "Converted",
    "Example",
    "ExampleSet",
    "LabelledText",
    "LabelledTexts",
    "Pack",
    "Record",
    "Records",
    "SkippedRow",
    "Turn",
    "collate",
    "collate_labelled",
    "convert",
    "detect",
    "encode_labelled",
    "end_of_turn_id",
    "figures",
    "load_examples",
    "make_example",
    "pack",
    "prompt_ids",
    "read_labelled",
    "read_records",
    "show_example",
    "stream_records",
    "to_chat",
]
