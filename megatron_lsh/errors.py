"""Exceptions for mistakes a user can make. Each message gives the value, the rule and the fix."""

from __future__ import annotations


class MegatronLSHError(Exception):
    """Base of every error this framework raises on purpose."""


class ConfigError(MegatronLSHError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MegatronLSHError, ValueError):
    """A data file or tokenizer that is missing, damaged, or does not fit the model."""


class CheckpointError(MegatronLSHError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model."""
