"""From files to batches: documents, pictures, the token stream, packed shards, the loader.

in: text and pictures; out: `Batch`es, through two formats on disk (stream, shards)
"""
