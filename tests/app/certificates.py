"""Self-signed certificates for tests."""

import subprocess
from pathlib import Path

ALGORITHMS = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "rsa": ["rsa:2048"]}


def make_certificate(folder: Path, name: str = "server", algorithm: str = "ec") -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1. Returns the files of certificate and key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    run_openssl(
        *["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"],
        *["-addext", "subjectAltName=IP:127.0.0.1", "-newkey", *ALGORITHMS[algorithm]],
        *["-keyout", str(key), "-out", str(certificate)],
    )
    return certificate, key


def encrypt_key(key: Path) -> Path:
    encrypted = key.with_suffix(".encrypted")
    run_openssl("pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(encrypted))
    return encrypted


def run_openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
