"""smol_post: the post-training pipeline from a base checkpoint to a dual-mode reasoner."""

__version__ = "0.1.0"
