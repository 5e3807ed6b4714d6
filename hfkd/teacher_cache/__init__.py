"""Teacher caches: the logits of a teacher, stored once for many students, and the `CachedTeacher` that reads them.

The room holds the cache's files, the format of its rows, the description of teacher and images that a run is compared
with, the writing of caches, and the reading teacher. It never imports training or commands.
"""
