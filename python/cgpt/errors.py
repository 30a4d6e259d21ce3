"""The one exception for what a user can cause and mend."""


class InputError(ValueError):
    """Bad input: one line naming what was wanted, what came, and where (path, flag or field).

    `cgpt` prints it as `cgpt: <message>` and exits with code 2; library callers catch it as a ValueError.
    """
