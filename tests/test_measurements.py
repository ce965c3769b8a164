"""The tables of docs/measurements.md are those that its data give."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_of_starts_are_their_datas() -> None:
    file = ROOT / "tests" / "benchmarks" / "start.py"
    spec = importlib.util.spec_from_file_location("start", file)
    assert spec is not None and spec.loader is not None
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    page = (ROOT / "docs" / "measurements.md").read_text()
    for device, found in json.loads((ROOT / "docs" / "measurements" / "start.json").read_text()).items():
        assert start.page(device, found) in page
