import json
import math

import pytest

from cgpt.metrics import Metrics, Summary, bits_per_byte, human, peak_memory_bytes, read


def row(step, **more):
    return {"step": step, "tokens": 8 * step, "loss": 10.0 - step, "tokens_per_second": 100.0 * step, **more}


def test_rows_are_lines_of_json(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.append(row(step))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1), row(2), row(3)] == read(tmp_path)


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in (1, 2, 3):
            file.write(json.dumps(row(step)) + "\n")
        file.write('{"step": 4, "tok')
    metrics = Metrics(tmp_path, resume_step=2)
    metrics.append(row(3, loss=0.5))
    metrics.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert read(tmp_path)[-1]["loss"] == 0.5


def test_a_new_run_starts_with_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
    Metrics(tmp_path).close()
    assert read(tmp_path) == []


def test_speed_is_the_median_after_warm_up(tmp_path):
    metrics = Metrics(tmp_path)
    assert metrics.tokens_per_second() is None
    for step in range(1, 10):
        metrics.append(row(step))
    assert metrics.tokens_per_second() == 750.0  # steps 6 to 9
    assert metrics.train_loss() == 1.0  # a tenth of nine steps is one


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 10, 40) == pytest.approx(0.25)
    assert bits_per_byte(1.0, 10, None) is None


def test_numbers_for_people():
    assert human(1234567) == "1.23 M"
    assert human(1.5e12, "FLOP/s") == "1.5 TFLOP/s"
    assert human(12.0, "B") == "12 B"
    assert human(0.0) == "0"


def test_a_summary_is_json_with_every_field(tmp_path):
    names = list(Summary.__dataclass_fields__)
    Summary(**dict.fromkeys(names, 1)).write(tmp_path)
    assert list(json.loads((tmp_path / "summary.json").read_text())) == names
    assert {
        "parameters",
        "steps",
        "tokens",
        "seconds",
        "train_loss",
        "val_loss",
        "unigram_loss",
        "bits_per_byte",
    } <= set(names)


def test_peak_memory_counts_what_was_touched():
    before = peak_memory_bytes()
    held = bytearray(before + (64 << 20))  # past any earlier peak
    assert peak_memory_bytes() - before >= 48 << 20
    assert before > 10 << 20
    assert len(held) > before
