"""Models of others: what comes in from, and goes out to, other formats and hubs.

`authors` converts the checkpoints of LUSIFER's authors (`authors_format` reads them), `llm_embedder` reads what an
English LLM embedder is and `recipe_writer` writes a recipe for it, `hub` uploads a checkpoint.
"""
