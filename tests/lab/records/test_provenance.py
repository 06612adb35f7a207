"""Where numbers come from."""

import re

import torch

import hzo
from hzo_lab.records.provenance import commit, environment, processor


def test_versions_are_those_that_run():
    found = environment()
    assert (found["hzo"], found["torch"], found["device"]) == (hzo.__version__, torch.__version__, "cpu")
    assert found["hardware"] == processor() != ""
    assert found["threads"] == torch.get_num_threads()


def test_a_commit_is_whole_and_says_whether_files_differ():
    found = commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}\+?", found)


def test_outside_of_a_checkout_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    commit.cache_clear()
    try:
        assert commit() is None
    finally:
        commit.cache_clear()
