"""The direction a decoder LLM reads in: both ways for embeddings, causally for stage 1, and never silently otherwise.

`families` says what a configuration alone tells, `measured` asks a loaded model, `masks` writes out attention masks for
decoders that do not follow ``is_causal``.
"""
