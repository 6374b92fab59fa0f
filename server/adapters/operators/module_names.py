"""Names of the two matrices of the vocabulary, in checkpoints and among modules. No torch."""

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
