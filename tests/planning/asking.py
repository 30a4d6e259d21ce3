"""`cgpt plan` asked in the process: its JSON, its text, or its one line of refusal."""

import json

from cgpt import cli


def answer(capsys, *argv):
    return json.loads(text(capsys, *argv, "--json"))


def text(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["plan", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err.strip().removeprefix("cgpt: ")
