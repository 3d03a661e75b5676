"""Typed errors. Each says what was given, what was expected, and the way out."""

from __future__ import annotations

from typing import Any


class MmptError(Exception):
    """Base of every error that mmpt raises on purpose."""


class ConfigError(MmptError, ValueError):
    """A configuration that can't work; the message says what to change."""


class UntrustedClassError(ConfigError):
    """A configuration file names a class that the caller did not allow."""


class CheckpointError(MmptError):
    """A model folder or checkpoint is missing, damaged, or belongs to another model."""


class DataError(MmptError, ValueError):
    """A dataset as a whole can't be used: empty, missing columns, wrong format."""


class NonFiniteLossError(MmptError, ArithmeticError):
    """A loss became NaN or infinite; names the part and the step."""


class SampleError(DataError):
    """One raw sample can't be used.

    A processor raises it with the position of the sample in the list that it was given; the data module
    turns the position into a name, lists the sample as skipped and goes on (or stops, `on_error: raise`).

    Args:
        sample: what names the sample to a person: a path, a row number, a short text.
        problem: what is wrong with it.
        expected: what would have been right.
        index: position of the sample in the processed list.
    """

    def __init__(self, sample: object, problem: str, expected: str, index: int = 0) -> None:
        super().__init__(sample, problem, expected, index)
        self.sample = str(sample)[:300]
        self.problem = problem
        self.expected = expected
        self.index = index

    def __str__(self) -> str:
        return f"{self.sample}: {self.problem}; expected {self.expected}"

    def as_record(self) -> dict[str, Any]:
        """The error as a row of the list of skipped inputs."""
        return {"sample": self.sample, "problem": self.problem, "expected": self.expected}
