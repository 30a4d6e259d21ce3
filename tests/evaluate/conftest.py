import pytest
import torch

from cgpt import cli, heap
from cgpt.model import presets
from nano import NANO, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of three steps, and texts; nobody writes to it."""
    here, threads = tmp_path_factory.mktemp("eval"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "nano", NANO)
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        patch.chdir(here)
        patch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
        write_corpus(here)
        (here / "other.txt").write_text("the whale and the sea " * 50)
        (here / "rows.jsonl").write_text('{"text": "a ship and a captain"}\n' * 30)
        (here / "short.txt").write_text("the whale")
        torch.set_num_threads(1)
        assert (
            cli.main("train --model nano --data corpus.txt --steps 3 --batch-size 2 --eval-tokens 32 --out run".split())
            == 0
        )
        yield here
    torch.set_num_threads(threads)


@pytest.fixture
def said(capfd):
    """Runs a command that succeeds, and says nothing beside what it prints; that."""

    def said(*argv):
        capfd.readouterr()
        assert cli.main([str(word) for word in argv]) == 0
        found = capfd.readouterr()
        assert found.err == ""
        return found.out

    return said


@pytest.fixture
def refused(capfd):
    """Runs a command that is refused; the one line that it says."""

    def refused(*argv):
        capfd.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        out = capfd.readouterr()
        (line,) = out.err.splitlines()
        assert out.out == ""
        return line

    return refused
