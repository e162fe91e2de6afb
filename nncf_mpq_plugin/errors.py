"""Errors that a user can act on: each message says what happened, why, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MPQError(Exception):
    """Base class. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class InputError(MPQError):
    """A file, table, model or data set that cannot be used as given."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that is not valid; the message names the key, the value and the nearest valid choice."""


class InfeasibleBudgetError(MPQError):
    """
    No policy meets the budgets.

    :param budget: the name of the budget that cannot be met.
    :param requested: the value asked for.
    :param achievable: the nearest value that some policy reaches (same unit), or None where it is unknown.
    """

    exit_code = 3

    def __init__(self, message: str, budget: str = "", requested: float | None = None, achievable: float | None = None):
        super().__init__(message)
        self.budget = budget
        self.requested = requested
        self.achievable = achievable


class VerificationError(MPQError):
    """
    The deployed model does not agree with the model it was exported from.

    :param report: what was measured, as in verify.json.
    """

    exit_code = 4

    def __init__(self, message: str, report: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.report = report or {}


class TrainingError(MPQError):
    """Training diverged; the message names layer, bit width and step. The last good state was kept."""


class StorageError(MPQError):
    """A file could not be written: the disk is full or failing. What is there is whole; the same command goes on."""


class PeerError(MPQError):
    """Another process of the same training (torchrun) failed or was killed. What was saved is kept."""


class InterruptedRun(MPQError):
    """The user stopped the run; its state was saved and the same command continues it."""

    exit_code = 130


class UnsupportedVersionError(InputError):
    """An installed framework is of a version that the plugin does not know."""


class UnsupportedModelError(InputError):
    """The model has something the plugin cannot place quantizers in, quantize or export."""
