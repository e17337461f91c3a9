"""Numbers and layouts of the kernel's user-space interface; no call is made here.

Each module mirrors one header and keeps its names, order and case, so that one grep leads from here
to the header and back. The C compiler checks every size, offset and number against the real header
(tests/abi). The verbs live in `migrd.kernel`.
"""
