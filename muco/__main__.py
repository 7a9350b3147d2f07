"""``python -m muco`` is the command ``muco``; launchers of several processes need it: ``torchrun … -m muco train …``."""

from muco.cli import main

raise SystemExit(main())
