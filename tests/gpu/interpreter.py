"""Triton's interpreter, in which a rehearsal runs the kernels on CPU tensors."""

from importlib.util import find_spec
from typing import Any


def fix_interpreter() -> None:
    """Triton 3.6 reads the end of a kernel's loop in a way that NumPy 2.4 refuses; read it as Triton 3.7 does."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
