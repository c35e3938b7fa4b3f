"""The training stack: a small GPT, and the proof that flash attention trains it like standard.

Run from a checkout: ``python -m train {parity,fit,sample,compare} --help``.
"""


class UsageError(Exception):
    """The request is wrong; printed as one sentence, without a traceback."""


class RunError(Exception):
    """A run ended before its last step; printed as one sentence, without a traceback."""
