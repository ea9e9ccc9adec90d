"""The beginning of what a file says, for messages: a name or a list of names in it may have megabytes."""

CHARACTERS = 300


def excerpt(value: object) -> str:
    """`str(value)`, of a long one the first characters and how many there are."""
    try:
        text = str(value)
    except RecursionError:  # lists within lists
        return f"a nested {type(value).__name__}"
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}... ({len(text):,} characters)"
