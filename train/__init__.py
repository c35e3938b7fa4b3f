"""The training stack: a small GPT, and the proof that flash attention trains it like standard.

Run from a checkout: ``python -m train {parity,fit,sample} --help``.
"""


class UsageError(Exception):
    """A mistake in what the user asked for, told in one sentence and nothing else."""


class RunError(Exception):
    """Why a run ended before its last step, told in one sentence and nothing else."""
