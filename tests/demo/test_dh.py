"""The published group, not one of our own making."""

import subprocess
from pathlib import Path

from migrd.demo.dh import dh_params_pem, ffdhe2048

# First and last words of the prime in RFC 7919, appendix A.1.
HEAD = "FFFFFFFFFFFFFFFFADF85458A2BB4A9AAFDC5620273D3CF1"
TAIL = "886B423861285C97FFFFFFFFFFFFFFFF"


def test_the_prime_is_that_of_the_rfc() -> None:
    text = f"{ffdhe2048():X}"
    assert len(text) == 512
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)


def test_openssl_reads_the_parameters_and_calls_them_safe(tmp_path: Path) -> None:
    path = tmp_path / "dh-params.pem"
    path.write_text(dh_params_pem())
    told = subprocess.run(
        ["openssl", "dhparam", "-in", str(path), "-check", "-noout"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "appear to be ok" in told.stdout + told.stderr
