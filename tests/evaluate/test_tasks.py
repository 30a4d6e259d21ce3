"""lm_eval's tasks by name, file and folder: what is found, what is refused in a line, and what is printed."""

import json
import math
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", minversion="0.4.13")
import datasets
import lm_eval.tasks
from harness_tasks import CHOICE, LAST, ROLLING, random_reader, write_task, write_tasks

from cgpt.errors import InputError
from cgpt.evaluate import report, tasks
from cgpt.evaluate.harness import RunLM
from cgpt.evaluate.tasks import evaluate_tasks, open_tasks

ROWS = [{"q": "the whale", "c": ["sea", "ship"], "a": i % 2} for i in range(6)]
TEXTS = [{"text": "the whale and the sea"}, {"text": "old sailor"}]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with random_reader(tmp_path_factory.mktemp("reader")) as found:
        yield found


def test_files_and_folders_give_their_tasks(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list(open_tasks(["last.yaml"]).tasks) == ["last"]
    assert list(open_tasks(["./rolling.yaml", str(tmp_path / "choice.yaml")]).tasks) == ["rolling", "choice"]
    monkeypatch.chdir(tmp_path.parent)
    assert list(open_tasks([tmp_path.name]).tasks) == ["choice", "last", "rolling", "until"]


def test_a_name_is_found_where_it_says_and_a_pattern_in_the_whole_index(monkeypatch):
    managers = []
    real = tasks.TaskManager

    class Watched(real):
        def __init__(self, include_path=None, include_defaults=True):
            managers.append((include_path, include_defaults))
            if include_defaults:  # the whole index takes ten seconds
                include_path = os.path.join(os.path.dirname(lm_eval.tasks.__file__), "arc")
            super().__init__(include_path=include_path, include_defaults=False)

        def load(self, names):
            return {
                "tasks": {
                    name: SimpleNamespace(get_config=lambda _: 0, set_fewshot_seed=lambda seed: None) for name in names
                }
            }

    monkeypatch.setattr(tasks, "TaskManager", Watched)
    for name in ("hellaswag", "piqa", "winogrande", "lambada_openai", "arc_easy", "arc_challenge", "openbookqa"):
        assert list(open_tasks([name]).tasks) == [name]
    assert not any(defaults for _, defaults in managers)
    assert list(open_tasks(["arc_*"]).tasks) == ["arc_challenge", "arc_challenge_chat", "arc_easy"]
    assert managers[-1] == (None, True)
    with pytest.raises(InputError, match=r"a task of lm_eval or a YAML file, got arc_esay \(there is arc_easy"):
        open_tasks(["arc_esay"])
    with pytest.raises(InputError, match=r"got zzz \(there is none like it\)$"):
        open_tasks(["zzz"])


def broken(folder, body):
    (folder / "bad.yaml").write_text(body)
    return str(folder / "bad.yaml")


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("task: bad\n  output_type: [", "wanted a task that loads, got "),
        ("no: task\n", "wanted a task that loads, got ValueError: Unknown config shape"),
        ("", "wanted a task that loads, got "),
        ("include: gone.yaml\ntask: bad\n", "wanted a task that loads, got FileNotFoundError: "),
        (
            f"task: bad\ntest_split: test\ndataset_path: json\ndataset_kwargs: {{data_files: gone.jsonl}}\n{CHOICE}",
            "wanted a task that loads, got FileNotFoundError: Unable to find .*gone.jsonl",
        ),
    ],
)
def test_a_file_that_is_no_task_is_one_line(tmp_path, body, wanted):
    path = broken(tmp_path, body)
    with pytest.raises(InputError, match=f"--tasks: .*bad.yaml: {wanted}") as error:
        open_tasks([path])
    assert "\n" not in str(error.value)


def test_what_is_not_there_or_there_twice_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--tasks: .*gone.yaml: no such file"):
        open_tasks([str(tmp_path / "gone.yaml")])
    with pytest.raises(InputError, match=r"--tasks: wanted a folder with tasks in YAML files, got "):
        open_tasks([f"{tmp_path}/"])
    (tmp_path / "two").mkdir()
    one, two = write_task(tmp_path, "same", CHOICE, ROWS), write_task(tmp_path / "two", "same", CHOICE, ROWS)
    with pytest.raises(InputError, match=r"--tasks: wanted each task once, got same by .*same.yaml and by .*two"):
        open_tasks([str(one), str(two)])


def test_a_folder_is_taken_whole_or_not_at_all(tmp_path):
    write_task(tmp_path, "good", CHOICE, ROWS)
    (tmp_path / "_shared.yaml").write_text("output_type: multiple_choice\n")
    assert list(open_tasks([f"{tmp_path}/"]).tasks) == ["good"]
    (tmp_path / "nested").mkdir()
    for body in ("task: bad\n  output_type: [", "task: good\n"):
        (tmp_path / "nested" / "more.yaml").write_text(body)
        with pytest.raises(InputError, match=r"more.yaml: wanted a task, got YAML that cannot be read or a name"):
            open_tasks([f"{tmp_path}/"])


def test_no_network_is_said_with_the_way_out(tmp_path, monkeypatch):
    def unreachable(self, names):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag'\non the Hub")

    path = write_task(tmp_path, "mine", CHOICE, ROWS)
    monkeypatch.setattr(tasks.TaskManager, "load", unreachable)
    with pytest.raises(InputError) as error:
        open_tasks([str(path)])
    why = "ConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub"
    instead = "a YAML file of yours with dataset_path: json needs no network"
    assert str(error.value) == f"--tasks: {path}: wanted its data, got no way to fetch it ({why}); {instead}"


def test_limits_and_examples(tmp_path, reader):
    path = str(write_task(tmp_path, "mine", CHOICE, ROWS))
    own = str(write_task(tmp_path, "fixed", CHOICE + "num_fewshot: 0\n", ROWS))
    lm = RunLM(reader)
    (row,) = evaluate_tasks(lm, open_tasks([path], 2), limit=4)
    assert (row["task"], row["shots"], row["documents"]) == ("mine", 2, 4)
    assert row["metrics"].keys() == {"acc", "acc_norm"}
    assert [evaluate_tasks(lm, open_tasks([each], 2))[0]["shots"] for each in (path, own)] == [2, 0]
    assert evaluate_tasks(lm, open_tasks([path]), limit=100)[0]["documents"] == 6


def test_a_task_that_breaks_is_one_line_and_a_model_that_does_is_not_hidden(tmp_path, reader, monkeypatch):
    path = write_task(tmp_path, "mine", CHOICE, [*ROWS, {"q": "the", "c": None, "a": 0}])
    with pytest.raises(InputError, match=r"^--tasks: wanted tasks that run, got \w+: "):
        evaluate_tasks(RunLM(reader), open_tasks([str(path)]))
    path = write_task(tmp_path, "empty", LAST, TEXTS)
    hopeless = lambda self, requests: [(-1e4, False)] * len(requests)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(RunLM, "loglikelihood", hopeless)
        with pytest.raises(InputError, match=r"^--tasks: wanted a perplexity under 1e308, got more"):
            evaluate_tasks(RunLM(reader), open_tasks([str(path)]))
    monkeypatch.setattr(RunLM, "_encode_pair", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_tasks(RunLM(reader), open_tasks([str(path)]))


def test_values_that_are_no_numbers_are_null(tmp_path, reader, monkeypatch):
    path = write_task(tmp_path, "mine", ROLLING, TEXTS)
    monkeypatch.setattr(RunLM, "loglikelihood_rolling", lambda self, requests: [-math.inf] * len(requests))
    (row,) = evaluate_tasks(RunLM(reader), open_tasks([str(path)]))
    assert row["metrics"]["bits_per_byte"] is None
    assert "rolling" not in report.tasks_table([row], reader.run, 1)
    assert json.dumps(row, allow_nan=False)


def test_a_group_has_a_row_of_its_own(tmp_path, reader):
    for name in ("one", "two"):
        write_task(tmp_path, name, CHOICE, ROWS)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = tasks.Tasks()
    found.add("both", manager.load(["both"]))
    for task in found.tasks.values():
        task.set_config(key="num_fewshot", value=0)
    rows = {row["task"]: row for row in evaluate_tasks(RunLM(reader), found)}
    assert rows.keys() == {"both", "one", "two"}
    assert rows["both"]["metrics"]["acc"] == rows["one"]["metrics"]["acc"] == rows["two"]["metrics"]["acc"]
    assert report.tasks_table(list(rows.values()), reader.run, 5)


def test_a_run_is_set_beside_the_published_ones(folder, tmp_path, said):
    """All of the command: a run of GPT-2's vocabulary, tasks that the tables have, and one that they have not."""
    for name in ("piqa", "arc_easy", "own"):
        write_task(tmp_path, name, CHOICE, ROWS)
    out = tmp_path / "found.json"
    command = "eval", "run", "--tasks", f"{tmp_path}/", "--num-fewshot", "5", "--limit", "4"
    text = said(*command, "--out", out)
    first, second, note = text.strip().split("\n\n")[0], *text.strip().split("\n\n")[1].rsplit("\n", 1)
    assert [line.split()[:4] for line in first.splitlines()][1] == ["arc_easy", "5", "4", "acc"]
    lines = [line.split() for line in second.splitlines()]
    assert lines[0] == ["acc,", "5", "examples", "size", "FLOPs", "piqa", "arc_easy"]
    found = json.loads(out.read_text())
    acc = {row["task"]: row["metrics"]["acc"] for row in found["tasks"]}
    assert lines[1] == ["run", "809", "k", f"{acc['piqa']:.3f}", f"{acc['arc_easy']:.3f}"]
    assert lines[2] == ["Cerebras-GPT", "111M", "2.6e+18", "0.588", "0.356"]
    assert lines[-1] == ["Cerebras-GPT", "muP", "2.7B", "1.1e+21", "0.704", "0.595"]
    assert len(lines) == 14
    assert "2304.03208" in note
    rows = [json.loads(line) for line in said(*command, "--json").splitlines()]
    assert rows == found["tasks"]
    assert (found["texts"], found["step"]) == ([], 3)
    by_name = {row["task"]: row for row in rows}
    assert by_name["own"]["published"] == {}
    assert by_name["piqa"]["published"]["Pythia 12B"] > 0.7
    both = said(*command, "--json", "--data", "other.txt").splitlines()
    assert [json.loads(line).get("task") for line in both] == [None, "arc_easy", "own", "piqa"]
