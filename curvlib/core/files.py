r"""Files: one safetensors file holds tensors as tensors and everything else as JSON.

Results and checkpoints share this format. Nothing is pickled, so that a file from elsewhere is
safe to open, and every file is written to a temporary name in the same folder, flushed to disk
and renamed: a reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.ranks import file_parts as with_parts
from curvlib.core.ranks.file_parts import Later, Stored

if TYPE_CHECKING:
    from curvlib.core.ranks.group import Group

#: Version of the layout that :func:`write_record` writes.
FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there becomes ``path`` at the end.

    The temporary file is flushed to disk and renamed when the block ends, and removed when the
    block raises: ``path`` then keeps what it held.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If ``path`` is a folder.
        OSError: If the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "numbers.txt"
        ...     with atomic_write(target) as temporary:
        ...         _ = temporary.write_text("1 2 3")
        ...     target.read_text()
        '1 2 3'
    """
    path = Path(path)
    require_writable(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Checks that a file could be written at ``path``, by writing an empty one beside it.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If ``path`` is a folder.
        OSError: If the folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected the path of a file, got the folder {str(path)!r}")
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write {str(path)!r}: there is no folder {str(folder)!r}; create it first"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"cannot write {str(path)!r}: the folder {str(folder)!r} is not writable "
            f"({error.strerror}); choose another"
        ) from error


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes temporary files of ``path`` that killed processes of this machine left behind."""
    path = Path(path)
    start = f".{path.name}.{socket.gethostname()}-"
    for file in path.parent.glob(f"{start}*.tmp"):
        pid = file.name.removeprefix(start).removesuffix(".tmp")
        if pid.isdecimal() and not _alive(int(pid)):
            file.unlink(missing_ok=True)


def write_record(
    path: str | os.PathLike[str], kind: str, content: dict[str, Any], group: Group | None = None
) -> None:
    """Writes tensors, numbers, strings and nested lists, tuples and dictionaries of them.

    Args:
        path: Where to.
        kind: What is written: the name of a class.
        content: The values, by name. Dictionaries have string keys. Tensors may be
            :class:`~curvlib.core.ranks.file_parts.Later`.
        group: The ranks that have the content together, and make what is made later, one tensor
            after the other; the first of them writes.

    Raises:
        TypeError: If a value is of another type.
        OSError: If the file cannot be written; what was there is kept. If the disk is full, says
            how much is needed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    used: set[int] = set()
    document = {
        "class": kind,
        "format": FORMAT_VERSION,
        "curvlib": curvlib_version(),
        "content": {name: _encode(value, name, tensors, used) for name, value in content.items()},
    }
    text = json.dumps(document, allow_nan=False)
    if group is not None:
        with_parts.write(atomic_write(path), tensors, text, group)
        return
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"curvlib": text})
        except SafetensorError as error:
            needed = len(text) + sum(t.numel() * t.element_size() for t in tensors.values())
            raise _unwritten(path, needed, error) from error


def _unwritten(path: str | os.PathLike[str], needed: int, error: Exception) -> OSError:
    """The error of a file that the system did not let be written: the disk is full, say."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(
        int(found[1]) if found else errno.EIO,
        f"cannot write {str(path)!r} ({error}): it needs {needed} bytes, and "
        f"{shutil.disk_usage(Path(path).parent).free} are free; make room (what was at this "
        "place is kept)",
    )


def read_record(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, stored: bool = False
) -> tuple[str, dict[str, Any]]:
    """Reads what :func:`write_record` wrote.

    Args:
        path: The file.
        device: Where tensors go that were not on the CPU when they were written.
        stored: Whether tensors stay in the file, and :class:`~curvlib.core.ranks.file_parts.Stored`
            is returned in their places.

    Returns:
        The kind and the values by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, not curvlib's, or of another version of the format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get("curvlib")
            if header is None:
                raise ValueError(f"{str(path)!r} is a safetensors file, but none of curvlib's")
            document = json.loads(header)
            if document["format"] != FORMAT_VERSION:
                raise ValueError(
                    f"{str(path)!r} has format {document['format']} (curvlib "
                    f"{document['curvlib']}), this curvlib reads format {FORMAT_VERSION}; "
                    "use the version that wrote it"
                )

            def tensor(value: dict[str, Any]) -> Any:
                name = value["!tensor"]
                if stored:
                    shape = tuple(file.get_slice(name).get_shape())
                    return Stored(path, name, shape, value["rows"])
                return _read(file.get_tensor(name), value, device)

            content = {n: _decode(v, tensor) for n, v in document["content"].items()}
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or not a safetensors file ({error}); "
            "nothing can be read from it"
        ) from error
    return str(document["class"]), content


def shared_record(
    path: str | os.PathLike[str], device: torch.device | str, group: Group
) -> tuple[str, dict[str, Any]] | None:
    """What :func:`read_record` finds on the first rank's disk, on every rank; ``None`` if nothing.

    Raises:
        ValueError: As :func:`read_record`, on every rank.
    """
    content = None
    with group.together(f"reading {str(path)!r}"):
        if group.first and Path(path).exists():
            content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
    received = group.from_first(content)
    if not received.numel():
        return None
    with tempfile.TemporaryDirectory() as folder:  # the format is read from files
        copy = Path(folder) / Path(path).name
        copy.write_bytes(received.cpu().numpy().tobytes())
        return read_record(copy, device)


def curvlib_version() -> str:
    """The installed version of curvlib, ``"unknown"`` where it runs from a bare checkout."""
    try:
        return importlib.metadata.version("curvlib")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _encode(value: Any, name: str, tensors: dict[str, Any], used: set[int]) -> Any:
    """The value for JSON; tensors are put aside, each of a memory of its own, of those ``used``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"!float": repr(value)}
    if isinstance(value, Tensor):
        value = value.detach()
        # Column-contiguous blocks are written as rows, so that no copy of them is made.
        rows = value.ndim == 2 and not value.is_contiguous() and value.mT.is_contiguous()
        stored = value.mT if rows else value.contiguous()
        if stored.untyped_storage().data_ptr() in used:
            stored = stored.clone()
        used.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
        return {"!tensor": name, "rows": rows, "cpu": value.device.type == "cpu"}
    if isinstance(value, Later):
        tensors[name] = value
        return {"!tensor": name, "rows": False, "cpu": value.like.device.type == "cpu"}
    if isinstance(value, tuple):
        return {"!tuple": [_encode(v, f"{name}.{i}", tensors, used) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, f"{name}.{i}", tensors, used) for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("!"):
                raise TypeError(f"{name} has the key {key!r}; keys must be strings without '!'")
        return {k: _encode(v, f"{name}.{k}", tensors, used) for k, v in value.items()}
    raise TypeError(
        f"cannot write {name} of type {type(value).__name__}: files hold tensors, numbers, "
        "strings, None, and lists, tuples and dictionaries of them"
    )


def _decode(value: Any, tensor: Callable[[dict[str, Any]], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if "!float" in value:
        return float(value["!float"])
    if "!tuple" in value:
        return tuple(_decode(v, tensor) for v in value["!tuple"])
    if "!tensor" in value:
        return tensor(value)
    return {k: _decode(v, tensor) for k, v in value.items()}


def _read(tensor: Tensor, value: dict[str, Any], device: torch.device | str) -> Tensor:
    # a file's own memory is aligned by chance, on which the last bits of products depend
    tensor = tensor.clone() if value["cpu"] else tensor.to(device)
    return tensor.mT if value["rows"] else tensor


def _flush_folder(folder: Path) -> None:
    """Makes a renaming durable, where the system lets folders be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
