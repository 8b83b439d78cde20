"""Several processes: who waits for whom, and whether they see one folder."""

from __future__ import annotations

import json

import pytest

from lusifer.errors import LusiferError
from lusifer.training.processes import any_process, check_output, first_process_first, wait_for_all
from support.launch import start

# Collectives time out after three seconds here, as NCCL's do after ten minutes.
PROGRAM = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True, timeout=timedelta(seconds=3))
from lusifer.errors import LusiferError
from lusifer.training import processes as p
rank, folder = p.processes().process_index, Path(sys.argv[1])
seen, begun = {"machine": p.on_machine()}, time.monotonic()
with p.first_process_first():
    time.sleep(5 if rank == 0 else 0)
seen["waited"] = time.monotonic() - begun
seen["said"] = p.first_process_says(lambda: time.sleep(5) or "done")
seen["any"] = [p.any_process(rank == 1), p.any_process(False)]
p._VISIBLE_WITHIN = 1.0
for name in ("shared", "own"):
    try:
        p.check_output(folder / (name if name == "shared" else f"{name}-{rank}"))
        seen[name] = None
    except LusiferError as error:
        seen[name] = str(error)
    p.wait_for_all()
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
"""


def test_two_processes_wait_and_see_one_folder(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = start([str(program), str(tmp_path)], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["machine"] for one in seen] == [[0, 2], [1, 2]]
    assert min(one["waited"] for one in seen) > 4
    assert [one["said"] for one in seen] == ["done", "done"]
    assert [one["any"] for one in seen] == [[True, False]] * 2
    assert [one["shared"] for one in seen] == [None, None]
    assert "not shared by all machines" in seen[0]["own"]
    assert "is not the folder that the first process writes to" in seen[1]["own"]
    assert list((tmp_path / "shared").iterdir()) == []


def test_one_process_waits_for_nobody(tmp_path):
    with first_process_first():
        wait_for_all()
    assert any_process(True) and not any_process(False)
    check_output(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_an_output_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LusiferError, match="cannot write into output"):
        check_output(tmp_path / "file" / "run")
