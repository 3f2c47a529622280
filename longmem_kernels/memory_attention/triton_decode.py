from typing import Any


def few_queries(T: int) -> bool:
    return False


def decode_forward(*a: Any) -> Any: ...
