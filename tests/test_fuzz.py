"""Three hundred damaged files, settings and names, of which each is taken or refused in one line; see fuzz.py."""

import json
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="alarms")
def test_what_comes_in_is_taken_or_refused_in_one_line(run_script, tmp_path):
    done = run_script("tests/fuzz.py", tmp_path / "fuzz" / "work", "--count", 300, threads=1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["faults"] == [] and not result["code ran"] and result["megabytes"] < 2000
    assert result["taken"] > 50 and result["refused"] > 100
