"""The information buffer in Python's integers, which have any size: formulas and nothing else."""


def plain_multiply(b: int, h: int, z: int, words: list[int]) -> tuple[int, int]:
    """New buffer and state after `h * z / 1024`; a full word is appended to `words`."""
    if b >= z * 2**21:
        b, word = divmod(b, 2**16)
        words.append(word)
    b, d = divmod(b, z)
    h, u = divmod(h * z + d, 1024)
    return b * 1024 + u, h


def plain_divide(b: int, h: int, z: int, words: list[int]) -> tuple[int, int]:
    """Old buffer and state, before `plain_multiply`."""
    b, u = divmod(b, 1024)
    h, d = divmod(h * 1024 + u, z)
    b = b * z + d
    if b < 2**15:
        b = b * 2**16 + words.pop()
    return b, h
