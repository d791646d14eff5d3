"""Instruction data: from templates, and from a language model that writes its own. No engine is known here.

What all methods share is exported here; each method is the function of its file's name (`self_instruct.self_instruct`).
"""

from lilliput.synthesis.endpoint import Endpoint, EndpointSettings
from lilliput.synthesis.journal import read_journal
from lilliput.synthesis.report import write_report
from lilliput.synthesis.rouge import RougePool, rouge_l
from lilliput.synthesis.run import Run
from lilliput.synthesis.seeds import read_seeds
from lilliput.synthesis.teacher import Decoding, Reply, Request, Teacher

__all__ = [
    "Decoding",
    "Endpoint",
    "EndpointSettings",
    "Reply",
    "Request",
    "RougePool",
    "Run",
    "Teacher",
    "read_journal",
    "read_seeds",
    "rouge_l",
    "write_report",
]
