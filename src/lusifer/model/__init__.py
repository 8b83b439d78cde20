"""The model: a multilingual encoder, a connector and an English LLM that together embed texts (arXiv 2501.00874).

Read `modeling` first; it holds the forward pass. What it is put together from:

- `configuration`, `connector`, `pooling`, `packing`, `token_batches`: settings, the part between the backbones, and how
  rows of different length go through a model.
- `backbones`, `backbone_pair`, `published_adapters`, `backbone_alone`: one backbone, both together with all that is
  checked of them, adapters they are published with, and one by itself as a baseline.
- `adapters`: LoRA adapters, trainable beside the weights or merged for speed.
- `checkpoint`, `fingerprint`, `sentence_transformer`, `card`: what is stored, which model it is, the folder on disk.
- `text_encoder`: from texts to vectors, fast and from several threads.
"""
