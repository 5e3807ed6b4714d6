"""Caches that others wrote, or that are damaged: one message, before memory is taken for what they say."""

import json
from pathlib import Path

import pytest

from hfkd.errors import HfkdError
from hfkd.teacher_cache.files import CacheFiles, read_facts
from hfkd.teacher_cache.teacher import CachedTeacher
from hfkd.teacher_cache.writing import claim_folder

FACTS = {
    "teacher": {"name": "t", "members": [], "parameters": 1},
    "train": {"rows": 10},
    "evaluation": {"rows": 4},
    "appearance": [],
    "given": [],
    "row": {"classes": 10, "views": 1, "top_k": None, "temperatures": []},
    "epochs": 1,
    "rows_a_shard": 5,
}


def changed(key, value):
    facts = json.loads(json.dumps(FACTS))
    *parents, last = key.split(".")
    inner = facts
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return json.dumps(facts)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cache.json is empty"),
        ("{", "cache.json is damaged"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        (changed("epochs", 10**12), "epochs is 1000000000000, expected 1 to 10,000"),
        (changed("train.rows", -1), "train.rows is -1"),
        (changed("rows_a_shard", 0), "rows_a_shard is 0"),
        (changed("rows_a_shard", 1.5), "rows_a_shard is 1.5"),
        (changed("row.classes", 10**9), "row.classes is 1000000000"),
        (changed("row.top_k", 11), "row.top_k is 11, expected 1 to 10"),
        (changed("row.temperatures", 3), "cannot be read"),
        (changed("teacher.members", [{}]), "cannot be read"),
    ],
)
def test_a_description_that_cannot_be_used(text, message):
    Path("cache.json").write_text(text)
    with pytest.raises(HfkdError, match=message):
        read_facts(".", whole=True)


def test_many_shards_that_are_not_there_are_not_listed():
    Path("cache.json").write_text(changed("train.rows", 2**40))
    with pytest.raises(HfkdError, match="not finished: 219,902,325,556 of its 219,902,325,556 shards are missing"):
        CachedTeacher(".")


def test_files_of_others_stay():
    Path("sub").mkdir()
    Path("sub/film.partial").write_text("mine")
    files = CacheFiles(".", FACTS)
    files.finish()
    Path("evaluation.bin").write_text("mine")
    with pytest.raises(HfkdError, match="cache_dir: . holds evaluation.bin, which hfkd did not write"):
        claim_folder(files)
    assert Path("sub/film.partial").is_file() and not Path("cache.json").exists()
