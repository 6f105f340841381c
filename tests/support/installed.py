"""Packages that a test installs for itself, and vqllm in a process that finds them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pip_install(project: Path, target: Path) -> Path:
    """Build the project in a folder with pip, without a network, and install it into `target`."""
    source = shutil.copytree(project, target.with_name(f"{target.name}-build") / project.name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def write_package(
    folder: Path, name: str, entry_points: dict[str, dict[str, str]], **modules: str
) -> Path:
    """Write the modules of a package and what importlib.metadata reads of it, without a build.

    Args:
        entry_points: name and value by group.
        modules: source by the module's name.
    """
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text, encoding="utf-8")
    return folder


def run_python(
    *arguments: str | Path, path: tuple[Path, ...] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python process that finds vqllm and what lies in the folders `path`."""
    folders = [*map(str, path), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        capture_output=True,
        text=True,
    )
