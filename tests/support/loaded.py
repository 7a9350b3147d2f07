"""What the server of forked processes loads last: no process that it forks has to do this again."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2_vl")  # the table of all families is made once
gc.collect()
gc.freeze()  # the trainer collects garbage, and need not look at the libraries each time
