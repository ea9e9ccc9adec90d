"""Certificates of TLS for the tests."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def self_signed(folder: Path, *addresses: str) -> Path:
    """Writes a certificate of IP addresses that no authority has signed, with its key, as one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "both.pem"
    written = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(key.private_bytes(*written) + made.public_bytes(serialization.Encoding.PEM))
    return file


def with_a_password(certificate: Path, file: Path) -> Path:
    """Writes a certificate of `self_signed` with its key encrypted, for which OpenSSL asks the terminal."""
    key = serialization.load_pem_private_key(certificate.read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    written = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    own = x509.load_pem_x509_certificate(certificate.read_bytes())
    file.write_bytes(written + own.public_bytes(serialization.Encoding.PEM))
    return file
