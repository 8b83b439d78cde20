"""Data: what is trained on, encoded, indexed and checked.

`sources` finds files and tells their formats; `reading` is the one reader, block by block (`text_files` for lines,
JSON and CSV); `validation` says what counts as a text, an id and a record. On top of it: `rows` (texts with ids, from
any position on), `records` (training sets in the cache), `mixture` and `collate` (which examples a step sees, as
tokens), `check` (duplicates and leaks), `mining` (hard negatives), `prompts`, and `everyday_set` (bundled sentences).

`vector_tables` opens texts with their vectors, whoever made them; the package `vectors` reads each kind.
"""
