"""Texts with their vectors, whoever made them; `lusifer.data.vector_tables` opens them by their names.

`rows` is what every such table can do, `agreement` compares a model with stored vectors, and `columns` finds out which
column is the text. `files` reads Parquet and NumPy, `stores` the folders of LanceDB and Chroma, `qdrant` the
collections of Qdrant.
"""
