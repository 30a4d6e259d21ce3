"""Every kernel has been executed: a new one without a test fails here."""

from pathlib import Path

import pytest

from emulator import HERE, device


def test_every_kernel_has_run(request):
    """Runs after all others (conftest.py), and only where all of this folder's tests have."""
    options = request.config.option
    tested = {Path(item.path) for item in request.session.items}
    if options.keyword or options.markexpr or options.deselect or not set(HERE.glob("test_*.py")) <= tested:
        pytest.skip("only some of the emulator's tests were asked for")
    kernels = device().kernels()
    assert len(kernels) > 100
    assert [name for name, ran in kernels.items() if not ran] == []
