"""A run killed at any of its writes, and started again, ends as if nothing had happened: playground/kills.py."""

import json
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("script", ["prestage_train.py", "stable_diffusion.py", "pixelCNN.py"])
def test_kills_at_every_write_change_nothing(script, tiny_flags, run_script, tmp_path):
    """Weights, averages, optimisers, logs and pictures are equal to the last bit, and nothing temporary is left."""
    flags = tiny_flags[script]
    done = run_script("playground/kills.py", tmp_path / "work", script, *flags, threads=1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] == {} and result["kills"] > 20
