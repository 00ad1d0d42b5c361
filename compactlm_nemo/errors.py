"""The errors a user can meet. Each is one line: what was given, the rule it breaks, the way out."""


def listed(problems: list[str]) -> str:
    """Return one message for one or more problems."""
    if len(problems) == 1:
        return problems[0]
    return "\n- ".join([f"{len(problems)} problems:", *problems])


class CompactLMError(Exception):
    """Base of all errors that end a command with exit code 2 and one line."""


class OtherRankError(CompactLMError):
    """What another rank has failed of, on a rank that only takes notice of it."""


class Interrupted(CompactLMError):
    """A run that was asked to stop and has saved what it had; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class GateFailed(CompactLMError):
    """A student that does not keep the limits of the gate; the command ends with an exit code of its own."""


class ConfigError(CompactLMError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(CompactLMError):
    """A text, token file or calibration set that cannot be used."""


class CheckpointError(CompactLMError):
    """A model folder or checkpoint that is missing, damaged or not supported."""


class NumericsError(CompactLMError):
    """A NaN or infinity where a number was needed."""


def require(holds: bool, message: str) -> None:
    """Raise ConfigError(message) unless the rule holds."""
    if not holds:
        raise ConfigError(message)
