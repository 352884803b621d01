"Anatomical embeddings: views, losses, network, matching, stores, registration"
from benchmarks import _embed_loss, _embed_match, _embed_register, _embed_views

ROWS = {**_embed_register.ROWS, **_embed_loss.ROWS, **_embed_views.ROWS, **_embed_match.ROWS}
