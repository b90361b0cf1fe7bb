"""Errors a user can mend: one line saying what, where and how; the command line exits with status 2."""


class CodesignError(ValueError):
    """Base of every error caused by input; its message is one line for the user."""


class UnknownNameError(CodesignError):
    """A name (task, mechanism, preset, site, option) that does not exist."""


class PresetError(CodesignError):
    """An accelerator file that is malformed, incomplete or inconsistent."""


class InfeasibleBudgetError(CodesignError):
    """A budget below the cost of the cheapest legal policy."""


class InfeasibleCapError(CodesignError):
    """A cap on area or power that no legal machine keeps."""


class MappingError(CodesignError):
    """A layer that cannot be mapped onto a dense machine."""


class CheckpointError(CodesignError):
    """A checkpoint that is missing, corrupted or made by another model."""


class RunDirectoryError(CodesignError):
    """A run directory that exists already, or that is not one."""


class DataError(CodesignError):
    """A data set that is absent, malformed or holds non-finite values."""


class ExportError(CodesignError):
    """An export that is malformed, or of another schema version."""


class NonFiniteError(CodesignError):
    """A loss term that is not finite; names the step and the term."""
