"""smol_post: the post-training pipeline from a base checkpoint to a dual-mode reasoner."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, which then tells of kernels for other machines.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
