"""The bench's one error."""


class BenchError(Exception):
    """It cannot be measured; the text says why."""
