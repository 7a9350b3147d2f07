#!/usr/bin/env bash
# Makes the environment of tests/method/test_stock.py: everything that .venv has, and torchvision, but not muco.
# usage: tests/support/make_stock_environment.sh [VENV [STOCK]]
set -euo pipefail
venv=${1:-.venv} stock=${2:-.venv-stock}
torchvision=0.28.0 # the one for the torch in constraints.txt

packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

"$venv/bin/python" -m venv --clear --without-pip "$stock"
# The folder is added to the path, but .pth files in it are not read: so muco, installed by one, cannot be imported.
packages "$venv" > "$(packages "$stock")/packages_of_the_main_environment.pth"
# Without dependencies, for it shall use the torch that is there, of whatever build.
"$venv/bin/python" -m pip --python "$stock/bin/python" install --quiet --no-deps "torchvision==$torchvision"
