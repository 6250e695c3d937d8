"""The family of errors a user may meet; the message of each says what to change.

Exit codes of the command line: every ``MeshwrightError`` ends with 1, anything else is our own fault and ends with 3.
"""


class MeshwrightError(ValueError):
    """The request cannot be met; the one-line message says why and what to do next."""


class ClusterError(MeshwrightError):
    """A cluster name or machine file is unknown, damaged or physically impossible."""


class ModelError(MeshwrightError):
    """A model name or spec is unknown, or the model cannot be traced as asked."""


class PlanError(MeshwrightError):
    """The request cannot become a plan, or a plan file cannot be used."""


class ScheduleError(MeshwrightError):
    """A schedule cannot be made for these stages and micro-batches, or a program is not valid."""


class ExecutionError(MeshwrightError):
    """The plan cannot be run here: MPI is missing, devices do not match, a rank failed."""
