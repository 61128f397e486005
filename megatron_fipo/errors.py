"""The one exception that the command line prints as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one sentence that names the key, row, file or rank and the mend.

    The command line prints it and exits with code 2. Everything else propagates with its traceback.
    """
