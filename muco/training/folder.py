"""The names of the files that a run leaves on disk; whoever reads or writes one takes its name from here.

::

    <output>/
    ├── run.json             what the run is: its recipe, versions and data fingerprints
    ├── digests.json         digests of the data's files, so that a resumed run need not read them again
    ├── skipped-0.jsonl      samples that could not be used, one file per process
    ├── checkpoints/         checkpoint-N: trained weights, optimizer, schedule, random states
    ├── logs/                TensorBoard
    └── model/               the finished model; appears whole or not at all
        ├── recipe.yaml      the resolved recipe
        ├── run.json         as above, with steps, losses and the model's fingerprint
        ├── README.md        the model card
        └── …                a stock SentenceTransformer folder, see muco.model
"""

from __future__ import annotations

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
DIGESTS_FILE = "digests.json"
WEIGHTS_FILE = "trained.safetensors"  # of a checkpoint
CHECKPOINTS = "checkpoints"
LOGS = "logs"
MODEL = "model"
