"""Errors that a user can mend."""


class UserError(Exception):
    """Wrong input or broken data: the command line prints it as one line and exits with code 2."""


def reason(error: BaseException) -> str:
    """An exception's cause in a few words: its first line, without errno and path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
