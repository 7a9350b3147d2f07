"""``python -m muco`` is the command ``muco``, also for launchers: ``torchrun --nproc-per-node 8 -m muco train …``."""

from muco.cli import main

raise SystemExit(main())
