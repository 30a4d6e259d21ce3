import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records"


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request):
    return request.param
