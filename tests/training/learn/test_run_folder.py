import json
from pathlib import Path

import pytest

from training.learn.run_folder import RunLog, replaced


def test_log_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for n_seen in (8, 16, 24):
        log.write(n_seen, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"n_seen": 8, "ti')
    log = RunLog(tmp_path, 16)
    log.write(24, {"loss": 2.0})
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["n_seen"], entry["loss"]) for entry in entries] == [(8, 1.0), (16, 1.0), (24, 2.0)]


def test_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), replaced(path) as new:
        new.write_bytes("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "before"
    with replaced(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
