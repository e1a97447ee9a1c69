"""The one exception for input that a person can put right."""


class InputError(Exception):
    """Bad input: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
