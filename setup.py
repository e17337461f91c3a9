"""What pyproject.toml cannot say: the C extension, and that the package does without it.

Where there is no C compiler the build says so and goes on: `migrd.core.bits` then takes numpy.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "migrd.core._bits",
            sources=["migrd/core/_bits.c"],
            depends=["migrd/core/_bits_words.h"],
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
