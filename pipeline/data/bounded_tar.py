"""Tar files that strangers have made: their headers are bounded before they are read.

`tarfile` reads the long name of a member whole, however long its header claims it to be, and follows maps of holes.
"""

import tarfile
from typing import Any

MAX_HEADER_BYTES = 1 << 14
_OF_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


class BoundedTarInfo(tarfile.TarInfo):
    """The header of a member, to be given to `tarfile.open` as `tarinfo`.

    Raises:
        tarfile.ReadError: when a header is read that is too long, has a negative size or describes holes.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        self._check_size()
        if self.type in _OF_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {self.size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a member has holes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found

    def _apply_pax_info(self, *arguments: Any) -> None:
        super()._apply_pax_info(*arguments)  # type: ignore[misc]
        self._check_size()

    def _check_size(self) -> None:
        """A negative size would lead back to the same header again and again (CVE-2025-8194)."""
        if self.size < 0:
            raise tarfile.ReadError(f"a member has {self.size:,} bytes")

    def _refuse_holes(self, *_: Any) -> None:
        raise tarfile.ReadError("a member has holes")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_holes
