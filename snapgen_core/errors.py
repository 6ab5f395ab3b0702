"""Errors that a user can mend."""


class UserError(Exception):
    """Wrong input or broken data: the command line prints it as one line and exits with code 2."""
