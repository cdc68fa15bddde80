"""What ends a job without being a defect: the user's mistakes, and a request to stop."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: it names the file or the option and says what to change. The command line prints it and
    exits with code 2, without a traceback.
    """


class Stopped(Exception):  # noqa: N818, since it is no error
    """A job was asked to stop (SIGTERM) and has: what it had done is saved, and the same command continues.

    All of its processes raise it. The command line prints the message and exits with code 143.
    """
