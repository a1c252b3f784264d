"""The package's names: there at once, whatever was imported before, though torch is imported only when it is needed."""

import subprocess
import sys

import pytest

import testreg


def fresh(code):
    """Run code in a process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_waits_for_no_library():
    fresh("import sys, testreg\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


def test_every_public_name_is_there():
    values = {}
    exec("from testreg import *", values)
    assert set(testreg.__all__) == set(dir(testreg)) == values.keys() - {"__builtins__"}
    assert testreg.__getattr__("find") is values["find"] is testreg.find
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        testreg.nope  # noqa: B018


def test_names_can_be_replaced(monkeypatch):
    monkeypatch.setattr(testreg, "patch", len)
    assert testreg.patch is len
