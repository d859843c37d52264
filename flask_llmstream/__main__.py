"""``python -m flask_llmstream …`` is ``flask llmstream …``, of this very interpreter."""

from __future__ import annotations

import sys

from flask.cli import cli

cli.main(["llmstream", *sys.argv[1:]], prog_name="python -m flask")
