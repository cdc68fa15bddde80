"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: it names the file or the option and says what to change. The command line prints it and
    exits with code 2, without a traceback.
    """
