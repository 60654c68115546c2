"""Check what ``make dist`` built: everything that is tracked is in it, and nothing else.

    python tools/check_dist.py dist

The source distribution has to hold all that the wheel is made of, and the wheel every module, table, data set and model
of the package. Ends with status 1 and the names of what is missing or too many.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
BESIDE_PACKAGE = {"README.md", "LICENSE", "setup.py", "pyproject.toml"}


def tracked() -> set[str]:
    """Return the files of the package that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "cellplm_jax"], cwd=ROOT, check=True, capture_output=True
    )
    return {name for name in listed.stdout.decode().split("\0") if name}


def found(directory: Path, pattern: str) -> Path:
    """Return the one file of a directory that matches; more than one, or none, ends the program."""
    files = sorted(directory.glob(pattern))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        sys.exit(f"{directory}: {names} match {pattern}; expected one. Empty the folder and build")
    return files[0]


def source_names(path: Path) -> set[str]:
    """Return the files of a source distribution, without its top folder."""
    with tarfile.open(path) as archive:
        files = [PurePosixPath(member.name) for member in archive if member.isfile()]
    return {str(PurePosixPath(*file.parts[1:])) for file in files}


def wheel_names(path: Path) -> set[str]:
    """Return the files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def main() -> None:
    """Compare both with what is tracked."""
    directory = Path(sys.argv[1])
    wanted = tracked()
    wheel, source = found(directory, "*.whl"), found(directory, "*.tar.gz")
    in_wheel, in_source = wheel_names(wheel), source_names(source)
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - in_wheel)]
    extra = {name for name in in_wheel - wanted if ".dist-info/" not in name}
    problems += [f"{wheel.name} has {name}, which is not tracked" for name in sorted(extra)]
    lacking = sorted((wanted | BESIDE_PACKAGE) - in_source)
    problems += [f"{source.name} lacks {name}" for name in lacking]
    if problems:
        sys.exit("\n".join(problems))
    sizes = " and ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in (wheel, source))  # fmt: skip
    sys.stdout.write(f"{sizes}: {len(wanted)} files of the package, none too many\n")


if __name__ == "__main__":
    main()
