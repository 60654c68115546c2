"""Local and ``gs://`` files and folders: atomic writes, and messages for failed writes."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellplm_jax.errors import CellPLMError, InputError, explain

if TYPE_CHECKING:
    import tensorstore

_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL = ("no space left", "enospc", "file too large", "disk quota", "quota exceeded")


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is an object store address, such as ``gs://bucket/folder``."""
    return "://" in os.fspath(path)


# Partial outputs of this process. While the lock is held, no output is created or renamed.
_partials: set[Path] = set()
_lock = threading.Lock()
_STRAY = re.compile(r"\..*\.partial-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}")


def _forget() -> None:
    """Forget, in a forked process, the partial outputs of its parent and a lock that a thread held."""
    global _lock
    _lock = threading.Lock()
    _partials.clear()


if hasattr(os, "register_at_fork"):
    # A child must not remove the outputs of its parent.
    os.register_at_fork(after_in_child=_forget)

# Whether a caller further up converts the errors of a full disk, with a better description.
_explaining = contextvars.ContextVar("explaining", default=False)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, room: int = 0) -> Iterator[Path]:
    """Yield a temporary path next to a file or folder; it is renamed if the block ends without an error.

    After an error it is removed, and ``path`` is unchanged. Temporary paths that dead processes left in the same folder
    are removed.

    Args:
        path: A local file or folder. An existing file is replaced, a folder only if it is empty.
        room: Bytes that the output needs; checked against the free space first.

    Yields:
        A path that does not exist yet, in the same folder.

    Raises:
        InputError: ``path`` exists and is neither a regular file nor a folder, or the disk is full.
    """
    path = Path(path)
    check_replaceable(path)
    # A killed process cannot clean up after itself.
    remove_strays(path.parent)
    # Without a part of the name: a name may have the maximum length already.
    name = (
        path.name if len(os.fsencode(path.name)) < 160 else f"{zlib.crc32(path.name.encode()):08x}"
    )
    partial = path.with_name(f".{name}.partial-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with _lock:
        _partials.add(partial)
    try:
        with _explain_full_disk(path):
            check_free_space(path, room)
            yield partial
            with _lock:
                # Under the lock, so that a signal handler finds the output either partial or complete.
                os.replace(partial, path)
    finally:
        remove_path(partial)
        with _lock:
            _partials.discard(partial)


@contextlib.contextmanager
def removed_when_stopped(path: Path) -> Iterator[Path]:
    """Let :func:`stop_writing` remove a path while the context is open."""
    with _lock:
        _partials.add(path)
    try:
        yield path
    finally:
        with _lock:
            _partials.discard(path)


@contextlib.contextmanager
def scratch_folder(prefix: str = "cellplm-") -> Iterator[Path]:
    """Yield a temporary folder that is removed afterwards, also by :func:`stop_writing`."""
    with tempfile.TemporaryDirectory(prefix=prefix) as name, removed_when_stopped(Path(name)):
        yield Path(name)


def stop_writing(seconds: float = 1.0) -> None:
    """Remove all partial outputs of this process, and let no other thread finish one. The process must end next.

    Args:
        seconds: Maximum time to wait for an output that is being renamed, and for threads that still write.
    """
    # Never released: other threads wait here until the process ends.
    _lock.acquire(timeout=seconds)
    for partial in list(_partials):
        remove_path(partial)


def remove_strays(folder: Path) -> None:
    """Remove temporary paths of :func:`atomic_write` whose processes are dead.

    Paths of other machines that share the folder remain: their processes may be alive.

    Args:
        folder: A local folder.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            match = _STRAY.fullmatch(name)
            if match and match["machine"] == _machine() and not _is_alive(int(match["process"])):
                remove_path(Path(folder) / name)


def check_replaceable(path: Path) -> None:
    """Reject an output that exists and is a device, a pipe or a socket.

    Args:
        path: The output; a link is followed.

    Raises:
        InputError: It is neither a regular file nor a folder.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(
            f"'{path}' is a device, a pipe or a socket",
            "a new or a regular file, because the output replaces it",
            "Choose another output",
        )


def check_free_space(path: Path, room: int) -> None:
    """Check in advance that an output fits on its disk.

    Args:
        path: The output; its folder exists.
        room: Bytes that it needs.

    Raises:
        InputError: The disk has less free space.
    """
    if room <= 0:
        return
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        if free < room:
            raise InputError(
                f"'{path}' cannot be written because the disk is full ({free / 1e6:,.1f} MB are free)",
                f"{room / 1e6:,.1f} MB",
                "Free some space or choose another folder",
            )


def reserve(path: Path, size: int) -> None:
    """Extend a partial file to a size, so that later writes into it cannot fail because the disk is full.

    Args:
        path: An existing file. HDF5 removes what it does not use.
        size: Bytes.

    Raises:
        OSError: The disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            # HDF5 ends the process if a flush fails; reserved space cannot run out.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # Some file systems cannot reserve space.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


@contextlib.contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """Convert the errors of a full disk, unless a caller does it; libraries raise them in many forms."""
    try:
        yield
    except CellPLMError:
        raise
    except Exception as error:
        if _explaining.get():
            raise
        _, full, _ = _diagnosis(error)
        with contextlib.suppress(OSError):
            full = full or shutil.disk_usage(path.parent).free < 2**16
        # A missing permission for another file, such as an input, has another cause.
        denied = isinstance(error, PermissionError) and error.filename in (None, str(path))
        if not (full or denied):
            raise
        if full and not _diagnosis(error)[1]:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with explain_write_errors(f"'{path}'", catch=Exception):
            raise error


def _machine() -> str:
    """Return a short name of this machine and its process numbers (a container has its own)."""
    try:
        # Containers of one machine have the same name, but their own process numbers.
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def remove_path(path: Path) -> None:
    """Remove a file or folder if it exists; other threads may still be writing into a folder."""
    for trial in range(6):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not os.path.lexists(path):
            return
        time.sleep(0.01 * 2**trial)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write a small UTF-8 file atomically, to a local path or a ``gs://`` address.

    Args:
        path: The file; an existing one is replaced.
        text: Its contents.
    """
    if is_remote(path):
        from etils import epath

        # Object stores replace objects atomically.
        epath.Path(path).write_text(text, encoding="utf-8")
        return
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def explain_write_errors(
    what: str,
    *,
    room: str = "enough space",
    again: str = "",
    catch: type[Exception] | None = None,
    raises: type[CellPLMError] = InputError,
) -> Iterator[None]:
    """Convert errors of a full disk or an unwritable folder to one clear message.

    Args:
        what: Description of the output for the message.
        room: Required disk space.
        again: What happens if the same command is run again; "": omitted from the message.
        catch: Convert all errors of this type; None: only those of a full disk or a missing permission.
        raises: Class of the raised error.

    Raises:
        CellPLMError: Of class ``raises``, instead of the error of the operating system or of TensorStore.
    """
    # Inner contexts then leave the error to this one, which describes the work.
    token = _explaining.set(True)
    try:
        yield
    except CellPLMError:
        raise
    except Exception as error:
        if not isinstance(error, catch or (OSError, ValueError, RuntimeError)):
            raise
        reason, full, denied = _diagnosis(error)
        if catch is None and not (full or denied):
            raise
        rerun = f", and run the same command again: {again}" if again else ""
        if full:
            msg = explain(
                f"{what} cannot be written because the disk is full ({reason})",
                room,
                f"Free some space or choose another folder{rerun}",
            )
        else:
            msg = explain(
                f"{what} cannot be written ({reason})",
                "a writable folder" if denied else f"a writable folder with {room}",
                f"Correct its permissions or choose another folder{rerun}",
            )
        raise raises(msg) from error
    finally:
        _explaining.reset(token)


def _diagnosis(error: Exception) -> tuple[str, bool, bool]:
    """Return the reason of an error in one short line, and whether it is a full disk or a missing permission."""
    # Libraries wrap the error of the system; its number is somewhere in the chain.
    chain, inner = [error], error
    while (inner := inner.__cause__ or inner.__context__) is not None and inner not in chain:
        chain.append(inner)
    number = error.errno if isinstance(error, OSError) else None
    lines = str(error).strip().splitlines()
    reason = " ".join(lines[0].split()) if lines else type(error).__name__
    if len(reason) > 160:
        # Long reasons contain paths, and the end of a path is the most specific part.
        reason = f"... {reason[-160:].partition(' ')[2]}"
    everything = " ".join(map(str, chain))
    full = any(getattr(e, "errno", None) in _FULL_NUMBERS for e in chain)
    full = full or any(sign in everything.lower() for sign in _FULL)
    # Wording of TensorStore.
    denied = number in (errno.EACCES, errno.EPERM, errno.EROFS) or everything.startswith(
        "PERMISSION_DENIED"
    )
    return reason, full, denied


class Folder:
    """A local folder or gs:// prefix accessed through TensorStore.

    Args:
        path: Local path or gs:// prefix; it need not exist yet.
        context: TensorStore context; None: one without a cache.

    Attributes:
        path: The given path.
        local: The local folder; None for a gs:// prefix.
    """

    def __init__(self, path: str | os.PathLike, context: Any = None):
        text = os.fspath(path)
        self.path = text.rstrip("/")
        if context is None:
            import tensorstore

            context = tensorstore.Context()
        self.context = context
        self.local: Path | None = None
        if text.startswith("gs://"):
            bucket, _, prefix = self.path.removeprefix("gs://").partition("/")
            self._driver = {"driver": "gcs", "bucket": bucket}
            self._prefix = f"{prefix}/" if prefix else ""
        else:
            self._driver = {"driver": "file"}
            self.local = Path(text).expanduser().resolve()
            self._prefix = f"{self.local}/"
        self._opened: Any = None

    @property
    def _store(self) -> Any:
        if self._opened is None:
            import tensorstore

            kvstore = {**self._driver, "path": self._prefix}
            self._opened = tensorstore.KvStore.open(kvstore, context=self.context).result()
        return self._opened

    def spec(self, name: str) -> dict[str, Any]:
        """Return the TensorStore specification of a folder inside."""
        return {**self._driver, "path": f"{self._prefix}{name}/"}

    def request(self, name: str) -> Callable[[], bytes | None]:
        """Start reading a small file; call the result for its bytes, or None if the file does not exist.

        Raises:
            InputError: The file cannot be read; also raised by the result.
        """
        try:
            pending = self._store.read(name)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(self._unreachable(name, error)) from error

        def wait() -> bytes | None:
            try:
                result = pending.result()
            except (ValueError, RuntimeError, OSError) as error:
                raise InputError(self._unreachable(name, error)) from error
            return bytes(result.value) if result.state == "value" else None

        return wait

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a small file, or None if it does not exist."""
        return self.request(name)()

    def write(self, name: str, text: bytes) -> None:
        """Write a small file atomically."""
        self._store.write(name, text).result()

    def copy_in(self, source: Path, last: str) -> None:
        """Copy a local folder of small files into this folder.

        Args:
            source: The local folder.
            last: File that marks the copy as complete; written after all others.
        """
        paths = {p.relative_to(source).as_posix(): p for p in source.rglob("*") if p.is_file()}
        final = paths.pop(last)
        # Concurrently: each file is a request of tens of milliseconds.
        waiting = [self._store.write(name, path.read_bytes()) for name, path in paths.items()]
        for written in waiting:
            written.result()
        # Readers take its existence as the sign that all others are complete.
        self.write(last, final.read_bytes())

    def names(self, inside: str) -> list[str]:
        """Return the names of all files in a subfolder, relative to this folder."""
        keys = self._store.list(_inside(inside)).result()
        return sorted(name.decode() for name in keys)

    def fetch(self, inside: str, target: Path) -> None:
        """Copy a subfolder of small files to a new local folder."""
        waiting = {name: self.request(name) for name in self.names(inside)}
        for name, wait in waiting.items():
            path = target / name.removeprefix(f"{inside}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wait() or b"")

    def remove(self, inside: str) -> None:
        """Remove a subfolder if it exists."""
        if self.local is not None:
            shutil.rmtree(self.local / inside, ignore_errors=True)
        else:
            self._store.delete_range(_inside(inside)).result()

    def _unreachable(self, name: str, error: Exception) -> str:
        reason = " ".join(str(error).split())[:240]
        return explain(
            f"'{self.path}/{name}' cannot be read ({reason})",
            "a location with read permission",
            "Check the path and, for gs://, the credentials (gcloud auth application-default login)",
        )


def _inside(folder: str) -> tensorstore.KvStore.KeyRange:
    """Return the key range of a folder; "0" follows "/"."""
    import tensorstore

    return tensorstore.KvStore.KeyRange(f"{folder}/", f"{folder}0")
