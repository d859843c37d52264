"""What a gunicorn.conf.py needs to have the hooks."""

# ruff: noqa: F401, N999 - gunicorn takes them by these names; and this file by its own

from flask_llmstream.gunicorn import post_worker_init, worker_int
