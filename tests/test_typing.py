"""The package's types, as its users' mypy sees them."""

from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "typing" / "api.py"


@pytest.mark.timeout(180)  # Without its cache mypy reads Flask and gevent first.
def test_a_strict_app_type_checks():
    mypy = pytest.importorskip("mypy.api")
    out, err, _ = mypy.run(["--strict", str(SAMPLE)])
    assert not err
    assert not [line for line in out.splitlines() if SAMPLE.name in line]  # Its own, no others.
