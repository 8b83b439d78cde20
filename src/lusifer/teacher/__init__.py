"""A teacher: an English embedder whose vector space another model learns.

`embedder` is any Sentence Transformers model as a function from texts to unit vectors, `vectors` keeps on the disk what
it answered, so that no text is embedded twice, and `loss` says how far a model's vectors are from the teacher's.
`lusifer.adapt` learns from it alone, `lusifer.training` beside the losses of its stages.
"""
