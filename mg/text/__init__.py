"""Text conditioning of denoisers: text encoders, caption cleaning, stored embeddings.

encoder = create_text_encoder("t5", "t5-v1_1-xxl", model_max_length=200, dtype="bf16")
y, mask = encoder.encode([clean_caption("A cat, www.cats.com", times=2)])    # (1, 1, 200, 4096), (1, 200)

encoder = open_embeddings("outputs/embeddings")     # stored by mg-encode-text: the same without the weights
y, mask = encoder.encode(["a cat,"])
"""

from mg.text.captions import clean_caption
from mg.text.encoders import TextEncoder, create_text_encoder
from mg.text.stored import StoredEmbeddings, open_embeddings

__all__ = ["StoredEmbeddings", "TextEncoder", "clean_caption", "create_text_encoder", "open_embeddings"]
