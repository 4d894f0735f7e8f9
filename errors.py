"""A user's mistake, as an exception that carries what it is about."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that holds the numbers and the way out.

    `param` names the setting, flag or request field that is wrong, where there is one."""

    def __init__(self, sentence: str, param: str | None = None):
        super().__init__(sentence)
        self.param = param


def require(condition: bool, sentence: str, param: str | None = None) -> None:
    """Raise UserError(sentence, param) unless the condition holds."""
    if not condition:
        raise UserError(sentence, param)
