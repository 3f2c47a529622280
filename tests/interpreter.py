"""Make Triton's interpreter, which the tests of the Triton kernels run under, fast enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def prepare_once_per_launch() -> None:
    """The interpreter replaces the functions of triton.language again for every device function that a kernel calls, in
    milliseconds each time. Once per kernel launch is enough."""
    prepare: Callable[[Any], Any] = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    prepared: set[frozenset[int]] = set()

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    def prepare_what_is_new(function: Any) -> Any:
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages in prepared:
            return interpreter._LangPatchScope()  # nothing to restore
        prepared.add(languages)
        return prepare(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = prepare_what_is_new
