"""What ``tools.python_sandbox`` is made of.

``pool`` runs in the trainer: it starts a ``zygote`` per isolation level and hands it jobs. A zygote is a Python with everything
imported that forks one process a job; the process locks itself up (``confine``, ``seccomp``) and then runs code (``notebook``).
``wire`` is what the two sides write to one another, ``shell`` how a zygote is started, ``packages`` what it may read.

``zygote``, ``confine``, ``seccomp``, ``notebook`` and ``wire`` run where only Python, NumPy, Pillow and what was asked for can
be read: they import nothing else of this project.
"""
