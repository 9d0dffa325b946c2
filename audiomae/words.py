"""Numbers in sentences."""


def plural(count: int, noun: str) -> str:
    """ "1 clip", "2 clips", "3 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count} {noun}{ending}"
