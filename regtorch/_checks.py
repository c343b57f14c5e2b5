"""Checks of arguments that several modules share."""

from __future__ import annotations


def check_bool(name: str, value: object) -> bool:
    """Return a flag, and refuse anything that is not a bool.

    Args:
        name: The name of the argument.
        value: Its value. A string such as "False" is truthy, so truth values are not accepted.

    Returns:
        The value.

    Raises:
        TypeError: `value` is not a bool.

    Examples:
        >>> check_bool("maximize", "False")
        Traceback (most recent call last):
        TypeError: maximize must be True or False; got 'False'.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return value
