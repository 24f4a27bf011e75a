"""Triton's interpreter in this process: import it before anything imports triton.

Triton 3.6 turns arrays of one element into Python numbers in a way that numpy has refused since
2.4, and takes the bits of bfloat16 for whole numbers in products and in conversions from integers;
`interpret` puts that right for this process.
"""

import os


def interpret() -> None:
    """Have kernels run by the interpreter, on CPU tensors."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor  # pyright: ignore

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched  # pyright: ignore
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(part):
        import triton.language as tl

        if part.dtype is not tl.bfloat16:
            return part
        exact = interpreter._convert_float(part.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(exact.view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot  # pyright: ignore
    cast = builder.cast_impl

    def cast_impl(self, src, dst_type):
        import triton.language as tl

        kind = tl.float32
        if dst_type.scalar is tl.bfloat16 and src.dtype.scalar.is_int():
            wide = tl.block_type(kind, dst_type.shape) if dst_type.is_block() else kind
            src = cast(self, src, wide)
        return cast(self, src, dst_type)

    for name in ("cast_impl", "create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, cast_impl)
