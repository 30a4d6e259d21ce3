"""The exceptions for what a user can cause and mend."""


class InputError(ValueError):
    """Bad input: one line naming what was wanted, what came, and where (path, flag or field).

    `cgpt` prints it as `cgpt: <message>` and exits with code 2; library callers catch it as a ValueError.
    """


class Diverged(InputError):
    """Training has come to numbers that are not finite: an answer, where runs are compared."""
