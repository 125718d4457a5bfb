"""The one error type that crosses the wire and reaches the user: a code for scripts, a message and a hint for people."""


class KilnError(Exception):
    """Something a person can act on.

    `code` is stable and listed in SPEC.md; `message` says what happened, with which value; `hint` says what to do.
    """

    def __init__(self, code: str, message: str, hint: str = ""):
        super().__init__(f"{message} {hint}".strip())
        self.code, self.message, self.hint = code, message, hint

    def to_wire(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}

    @classmethod
    def from_wire(cls, error: dict) -> "KilnError":
        return cls(str(error.get("code", "internal")), str(error.get("message", "")), str(error.get("hint", "")))


class Cancelled(Exception):
    """Raised inside a step at its next progress report once its job was cancelled. Not an error: nobody shows it."""
