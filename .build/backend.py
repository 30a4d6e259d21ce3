"""The build backend: setuptools' own, which brings nvcc from the package index where it is asked to (PEP 517).

    pip install . --config-settings cuda=pypi      or CGPT_CUDA=pypi in the environment

A setting stands before the environment; setup.py says what the values mean. Without pypi nothing is added, so that a
build for a CPU downloads no compiler (0.3 GB unpacked).
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

VALUES = ("auto", "0", "1", "pypi")


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + nvcc(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + nvcc(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with told_to_setup(config_settings):
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with told_to_setup(config_settings):
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def cuda(config_settings):
    """What is asked for; ends the build where that means nothing."""
    wish = (config_settings or {}).get("cuda", os.environ.get("CGPT_CUDA", "auto"))
    if wish not in VALUES:
        sys.exit(f"cuda must be one of {', '.join(VALUES)}, got {wish!r}")
    return wish


def nvcc(config_settings):
    """The packages that hold nvcc, where they are asked for."""
    if cuda(config_settings) != "pypi":
        return []
    lines = (Path(__file__).parent / "nvcc.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


@contextmanager
def told_to_setup(config_settings):
    """setup.py runs in this process, sees no settings, and reads CGPT_CUDA."""
    before = os.environ.get("CGPT_CUDA")
    os.environ["CGPT_CUDA"] = cuda(config_settings)
    try:
        yield
    finally:
        del os.environ["CGPT_CUDA"]
        if before is not None:
            os.environ["CGPT_CUDA"] = before
