"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one or two lines that name the option or field, the numbers involved and the
    way out. The command line prints it to standard error and exits with code 2.
    """
