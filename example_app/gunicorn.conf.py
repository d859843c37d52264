"""gunicorn -c example_app/gunicorn.conf.py "example_app:create_app()" """

# ruff: noqa: N999 - the name by which gunicorn knows it
from __future__ import annotations

import os

# Hooks, which gunicorn knows by these names. The model is loaded when a worker starts; with the
# first question nothing else in the worker would run meanwhile. Ctrl-C tells the streams under
# way "server_shutdown"; SIGTERM does so without a hook.
from flask_llmstream.gunicorn import post_worker_init, worker_int  # noqa: F401

# Local unless told otherwise: a proxy with TLS belongs in front.
bind = os.environ.get("BIND") or f"127.0.0.1:{os.environ.get('PORT', '8000')}"

# A stream holds its connection for as long as the model writes. On gevent that is a
# parked greenlet of some 15 KiB; on gthread it would be a whole thread.
worker_class = "gevent"

# Each worker process loads a model of its own (about 350 MB) and queues on its own. One
# process feeds a model that decodes on a thread or two; add workers when HTTP itself,
# not the model, is what a core is busy with.
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))

# Streams open at the same time in one worker; what comes beyond waits in the kernel's
# backlog, unseen by the app's own queue and its 429. So: more than the app ever admits.
# Each also takes a file descriptor: keep `ulimit -n` above it.
worker_connections = 2000

# How long SIGTERM leaves to the streams under way; after that they are told
# "server_shutdown" instead of being cut. Keep it below what the supervisor waits before
# SIGKILL: Kubernetes waits 30 s by default, `docker stop` 10 s (raise that, or lower this).
graceful_timeout = 25

# For gevent this is no limit on a request: it is how long the worker's event loop may hang
# before it is replaced. Loading the model counts: half a second for this one, but a large one
# may need more.
timeout = 30

# Seconds an idle connection stays open. Longer than the proxy keeps its own (nginx: 60),
# so that it is the proxy that closes, and no request meets a connection just closed.
keepalive = 75

# The app is loaded in each worker, after fork: threads and a loaded model do not survive
# a fork, and gevent patches the worker before it imports the app.
preload_app = False

# Nothing here uses it, and two servers of one user would fight over its path. (gunicorn
# before 25.1 has none, and ignores the name.)
control_socket_disable = True

# To stdout, where a supervisor collects it. %(L)s is the time to the last byte.
accesslog = "-"
access_log_format = '%(h)s "%(r)s" %(s)s %(B)s %(L)ss'
